"""What lies below a folder or a URL: the files, and what is passed over."""

import fnmatch
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from data_prep.read.streams import is_http
from data_prep.read.suffixes import is_hidden, is_wanted, printable
from data_prep.shards import MANIFEST, PARTIAL, TOKENIZER

# What file systems call the mark of a file's content or last change.
STAMPS = (
    "ETag",
    "etag",
    "md5Hash",
    "Content-MD5",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "updated",
    "mtime",
)


class Found(NamedTuple):
    below: str
    path: str
    size: int
    stamp: str


class Passed(NamedTuple):
    """What is not read: where it is below the INPUT, the kind of finding that this is, and what was
    found."""

    below: str
    kind: str
    detail: str


def walk(root: Path, pattern: Sequence[str]) -> tuple[list[Found], list[Passed]]:
    """Find the files below a folder that match the parts of a pattern, sorted by their name below
    it, and what lies there and cannot be read or is not meant to be.

    Links to folders are followed once the real folders are done, each folder once for each part of
    the pattern, known by its real path: so loops end, and a file keeps its real name where it has
    one. Raises OSError.
    """
    files: dict[str, Found] = {}
    passed: dict[str, Passed] = {}
    done: set[tuple[str, int]] = set()
    # Of the folders to look into: its name below the root, and how many parts of the pattern led to
    # it.
    folders, links = deque([("", 0)]), deque[tuple[str, int]]()

    def pass_over(below: str, kind: str, detail: str) -> None:
        passed[below] = Passed(below, kind, detail)

    def enter(below: str, entry: os.DirEntry[str], parts: int) -> None:
        if is_prepared_set(Path(entry.path)):
            pass_over(below, "prepared_set", "a folder with a prepared set, not entered")
        else:
            (links if entry.is_symlink() else folders).append((below, parts))

    while folders or links:
        here, at = folders.popleft() if folders else links.popleft()
        real = os.path.realpath(root / here)
        if (real, at) in done:
            continue
        done.add((real, at))
        part, last = pattern[at], at == len(pattern) - 1
        if part == ".." or (part == "**" and not last):
            folders.append((f"{here}/..".lstrip("/") if part == ".." else here, at + 1))
        if part == "..":
            continue
        with os.scandir(root / here) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if (
                    part != "**"
                    and entry.name != part
                    and not fnmatch.fnmatchcase(entry.name, part)
                ):
                    continue
                below, path = f"{here}/{entry.name}".lstrip("/"), Path(entry.path)
                is_folder = path.is_dir() if entry.is_symlink() else entry.is_dir()
                if entry.name.startswith("."):
                    if is_folder:
                        pass_over(
                            below, "hidden", "a folder whose name begins with a dot, not entered"
                        )
                    elif last:
                        pass_over(below, "hidden", "a name that begins with a dot")
                elif is_folder and (part == "**" or not last):
                    enter(below, entry, at if part == "**" else at + 1)
                elif is_folder or not last:
                    continue
                elif path.is_file():
                    files[below] = stat_file(below, path)
                elif entry.is_symlink():
                    target = printable(str(path.readlink()))
                    pass_over(below, "dead_link", f"a link to {target}, which is not there")
                else:
                    pass_over(below, "not_a_file", "a pipe, a socket or a device")
    return sorted(files.values()), sorted(passed.values())


def is_prepared_set(folder: Path) -> bool:
    """Return whether a folder holds a prepared set, or one in the making: its report and rejects
    are no corpus."""
    return (folder / PARTIAL).is_dir() or (
        (folder / MANIFEST).is_file() and (folder / TOKENIZER).is_file()
    )


def stat_file(below: str, path: Path) -> Found:
    stat = path.stat()
    return Found(below, str(path), stat.st_size, str(stat.st_mtime_ns))


def list_remote(
    fs: Any, root: str, found: dict[str, dict[str, Any]]
) -> tuple[list[Found], list[Passed]]:
    files, passed = [], []
    for path, info in found.items():
        below = readable_path(path).removeprefix(readable_path(root)).lstrip("/")
        if is_hidden(below):
            passed.append(Passed(below, "hidden", "a name that begins with a dot"))
        elif not is_wanted(below) and not info.get("size"):
            # It is perhaps not to be read, so a web server is not asked for its size.
            files.append(Found(below, path, 0, ""))
        else:
            # A web server's list has no sizes.
            files.append(
                stat_remote(
                    fs, below, path, info if info.get("size") is not None else fs.info(path)
                )
            )
    return sorted(files), sorted(passed)


def stat_remote(fs: Any, below: str, path: str, info: dict[str, Any]) -> Found:
    stamp = next((str(info[key]) for key in STAMPS if info.get(key)), "")
    return Found(below, str(fs.unstrip_protocol(path)), info.get("size") or 0, stamp)


def readable_path(path: str) -> str:
    return unquote(path) if is_http(path) else path


def last_part(path: str) -> str:
    return readable_path(path).rstrip("/").rpartition("/")[2] or "root"
