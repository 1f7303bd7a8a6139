"""What lies below a folder or a URL: the files, and what is passed over."""

import fnmatch
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, overload
from urllib.parse import unquote

from data_prep.read.streams import is_http
from data_prep.read.suffixes import is_hidden, is_wanted, printable
from data_prep.set_files import MADE_BY, MANIFEST, PARTIAL, format_of
from data_prep.shards import TOKENIZER

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


Row = TypeVar("Row")


class MadeRows(Sequence[Row], Generic[Row]):
    """A sequence whose items are made each time that they are asked for: what they are made of
    takes a fraction of their memory, and a folder may hold millions of files."""

    def __init__(self, count: int, make: Callable[[int], Row]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> "MadeRows[Row]": ...
    def __getitem__(self, at: int | slice) -> "Row | MadeRows[Row]":
        places = range(self._count)[at]
        if isinstance(places, int):
            return self._make(places)
        return MadeRows(len(places), lambda place: self._make(places[place]))

    def __iter__(self) -> Iterator[Row]:
        return map(self._make, range(self._count))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MadeRows) and (
            len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]


class Passed(NamedTuple):
    """What is not read: where it is below the INPUT, the kind of finding that this is, and what was
    found."""

    below: str
    kind: str
    detail: str


def walk(root: Path, pattern: Sequence[str]) -> tuple[Sequence[Found], list[Passed]]:
    """Find the files below a folder that match the parts of a pattern, sorted by their name below
    it, and what lies there and cannot be read or is not meant to be.

    Links to folders are followed once the real folders are done, each folder once for each part of
    the pattern, known by its real path: so loops end, and a file keeps its real name where it has
    one. Raises OSError.
    """
    return _Walk(root, pattern).run()


class _Walk:
    """The state of a walk: what was found, and where to look yet."""

    def __init__(self, root: Path, pattern: Sequence[str]) -> None:
        self._root, self._pattern = root, pattern
        # Of each file its name below the root, its size and the time of its last change.
        self._names: list[str] = []
        self._sizes, self._times = array("q"), array("q")
        self._passed: dict[str, Passed] = {}
        self._done: set[tuple[str, int]] = set()
        # Folders to look into, by their names below the root, each with the number of parts of the
        # pattern that led to it.
        self._folders: deque[tuple[str, int]] = deque([("", 0)])
        self._links: deque[tuple[str, int]] = deque()

    def run(self) -> tuple[Sequence[Found], list[Passed]]:
        """Look into one folder after another, links last."""
        while self._folders or self._links:
            here, at = self._folders.popleft() if self._folders else self._links.popleft()
            real = os.path.realpath(self._root / here)
            if (real, at) not in self._done:
                self._done.add((real, at))
                self._look_into(here, at)
        return self._sorted_files(), sorted(self._passed.values())

    def _sorted_files(self) -> MadeRows[Found]:
        """Return the files by their names, each once, though parts of the pattern led there by
        several ways."""
        names, sizes, times = self._names, self._sizes, self._times
        order = array("q", sorted(range(len(names)), key=names.__getitem__))
        once = array(
            "q",
            (at for n, at in enumerate(order) if n == 0 or names[at] != names[order[n - 1]]),
        )
        prefix = str(Path(self._root, "x"))[:-1]

        def make(place: int) -> Found:
            at = once[place]
            return Found(names[at], prefix + names[at], sizes[at], str(times[at]))

        return MadeRows(len(once), make)

    def _look_into(self, here: str, at: int) -> None:
        part, is_last = self._pattern[at], at == len(self._pattern) - 1
        if part == "..":
            self._folders.append((f"{here}/..".lstrip("/"), at + 1))
            return
        if part == "**" and not is_last:
            self._folders.append((here, at + 1))
        with os.scandir(self._root / here) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                fits = entry.name == part or fnmatch.fnmatchcase(entry.name, part)
                if part == "**" or fits:
                    self._take(entry, f"{here}/{entry.name}".lstrip("/"), at)

    def _take(self, entry: os.DirEntry[str], below: str, at: int) -> None:
        """Take a file, a folder or a link that matches part `at` of the pattern."""
        part, is_last = self._pattern[at], at == len(self._pattern) - 1
        path = Path(entry.path)
        is_folder = path.is_dir() if entry.is_symlink() else entry.is_dir()
        if entry.name.startswith("."):
            if is_folder:
                detail = "a folder whose name begins with a dot, not entered"
                self._pass_over(below, "hidden", detail)
            elif is_last:
                self._pass_over(below, "hidden", "a name that begins with a dot")
        elif is_folder:
            if part == "**" or not is_last:
                self._enter(below, entry, at if part == "**" else at + 1)
        elif is_last:
            self._take_file(entry, below, path)

    def _take_file(self, entry: os.DirEntry[str], below: str, path: Path) -> None:
        if path.is_file():
            stat = path.stat()
            self._names.append(below)
            self._sizes.append(stat.st_size)
            self._times.append(stat.st_mtime_ns)
        elif entry.is_symlink():
            target = printable(str(path.readlink()))
            self._pass_over(below, "dead_link", f"a link to {target}, which is not there")
        else:
            self._pass_over(below, "not_a_file", "a pipe, a socket or a device")

    def _enter(self, below: str, entry: os.DirEntry[str], parts: int) -> None:
        if is_prepared_set(Path(entry.path)):
            self._pass_over(below, "prepared_set", "a folder with a prepared set, not entered")
        else:
            (self._links if entry.is_symlink() else self._folders).append((below, parts))

    def _pass_over(self, below: str, kind: str, detail: str) -> None:
        self._passed[below] = Passed(below, kind, detail)


def is_prepared_set(folder: Path) -> bool:
    """Return whether a folder holds a prepared set, or one in the making: its report and rejects
    are no corpus."""
    return (folder / PARTIAL).is_dir() or (
        (folder / MANIFEST).is_file()
        and ((folder / TOKENIZER).is_file() or format_of(folder) in MADE_BY)
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
