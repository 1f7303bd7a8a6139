"""From INPUTs to files, and from files to units, each of which can be read alone."""

import glob
import os
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_prep.read.formats import row_suffixes
from data_prep.read.listing import (
    Found,
    Passed,
    last_part,
    list_remote,
    stat_file,
    stat_remote,
    walk,
)
from data_prep.read.pieces import Unit
from data_prep.read.raw import Finding
from data_prep.read.sniff import HEAD_BYTES, holds_records, sniff_file
from data_prep.read.streams import File, Stored, file_system, is_http, is_url, packing
from data_prep.read.suffixes import (
    JSON_SUFFIXES,
    TEXT_SUFFIXES,
    describe_suffix,
    is_card_name,
    is_wanted,
    kind_of,
    printable,
    refuse_archive,
)
from data_prep.shards import MANIFEST, TOKENIZER

UNIT_BYTES = 64 << 20


@dataclass(frozen=True)
class InputSource:
    """One INPUT, or all text files that were named one by one: its files in reading order, and what
    was passed over."""

    name: str
    files: tuple[File, ...]
    passed: tuple[Finding, ...] = ()


class _Input(NamedTuple):
    name: str
    is_file: bool
    files: list[Found]
    passed: list[Passed]
    root: str = ""


def find_sources(inputs: Sequence[str | Path], out: Path | None = None) -> list[InputSource]:
    """Find the files behind each INPUT: a folder (recursive), a file, or a glob such as
    `docs/**/*.md`, each as a local path or as a URL that fsspec opens.

    In a folder count files ending in .jsonl .ndjson .json .parquet or one of TEXT_SUFFIXES, all but
    parquet also with .gz .zst .bz2 .xz behind it, sorted by their path; names that start with a
    dot, and texts that tell of the data that they stand beside (CARD), are passed over. A file
    named on its own or matched by a glob may have any suffix, and is read as text unless it ends in
    one of the first four. Links are followed, to each folder once. Text files named one by one are
    one source called "files". A file reached twice is read once. No two sources have one name.

    Of what is made in `out`, or beside it by jobs, nothing is told: it may be there or not.

    Raises ValueError where an INPUT does not exist, matches nothing, or is an archive this cannot
    read.
    """
    if not inputs:
        raise ValueError("no input given: name at least one folder, file or glob")
    seen: set[str] = set()
    told: set[str] = set()
    if out:
        told = {os.path.realpath(path) for path in (out, out.parent / f".{out.name}.prepare")}
    found: list[tuple[str, list[File], list[Finding]]] = []
    lone: list[File] = []  # text files that were named one by one
    used: dict[str, int] = {}
    homeless: list[Finding] = []  # of INPUTs of which nothing is read
    for item in map(str, inputs):
        given = _find(item)
        name = unused(printable(given.name), used)
        new, passed = _new_files(given, name, seen), _new_findings(given, name, told)
        if given.is_file and new and new[0].kind == "text":
            if not lone:
                found.append((unused("files", used), lone, []))
                used[found[-1][0]] = 1
            lone += new
        elif new:
            found.append((name, new, passed))
            used[name] = 1
        else:
            homeless += passed
    if found:
        found[0][2].extend(homeless)
    return [InputSource(name, tuple(files), tuple(passed)) for name, files, passed in found]


def _find(item: str) -> _Input:
    try:
        return _find_remote(item) if is_url(item) and not _is_there(item) else _find_local(item)
    except ValueError as error:
        raise ValueError(printable(str(error))) from error


def _new_files(given: _Input, name: str, seen: set[str]) -> list[File]:
    """Return the files of an INPUT that are not in `seen` yet by their real paths; add them."""
    new = []
    for file in given.files:
        real = file.path if is_url(file.path) else os.path.realpath(file.path)
        if real not in seen:
            seen.add(real)
            below = printable(file.below if given.is_file else f"{name}/{file.below}")
            new.append(File(below, file.path, kind_of(file.below), file.size, file.stamp))
    return new


def _new_findings(given: _Input, name: str, told: set[str]) -> list[Finding]:
    """Return what an INPUT passes over and is not in `told` yet, by its place, and add it."""
    new = []
    for each in given.passed:
        place = os.path.join(given.root, each.below)  # noqa: PTH118 (it may be a URL)
        if place not in told:
            told.add(place)
            new.append(Finding(each.kind, printable(f"{name}/{each.below}"), 0, each.detail))
    return new


def plan_units(sources: Sequence[InputSource]) -> list[Unit]:
    """Return the units of all sources, in reading order, of up to UNIT_BYTES of stored bytes where
    they can be: neighbouring files of text or JSON together, plain JSON lines in ranges. A file
    that is compressed, parquet, or behind http is not cut, nor one that is something else than its
    name says.

    Raises ValueError for a file that cannot be read.
    """
    units: list[Unit] = []
    for source in sources:
        texts: list[File] = []
        size = 0
        for file in source.files:
            is_text = file.kind in ("text", "json")
            if texts and (not is_text or size + file.size > UNIT_BYTES):
                units.append(Unit(source.name, tuple(texts)))
                texts, size = [], 0
            if is_text:
                texts.append(file)
                size += file.size
            elif file.kind == "jsonl" and file.size > UNIT_BYTES and _is_plain_lines(file):
                for start in range(0, file.size, UNIT_BYTES):
                    units.append(
                        Unit(source.name, (file,), start, min(start + UNIT_BYTES, file.size))
                    )
            else:
                units.append(Unit(source.name, (file,)))
        if texts:
            units.append(Unit(source.name, tuple(texts)))
    return units


def _is_plain_lines(file: File) -> bool:
    if packing(file.name) or is_http(file.path):
        return False
    with closing(Stored(file)) as stored:
        found = sniff_file(
            file.name, file.kind, stored.peek(HEAD_BYTES), file.size <= HEAD_BYTES, ""
        )
    return found.form == "lines" and found.encoding == "utf-8"


def unused(name: str, used: dict[str, int]) -> str:
    """Return the name, or if it is in `used`, "name (2)" or the next that is free; `used` counts
    what was tried."""
    fresh = name
    while fresh in used:
        used[name] += 1
        fresh = f"{name} ({used[name]})"
    return fresh


def _is_there(item: str) -> bool:
    try:
        return os.path.lexists(item)
    except ValueError:  # a NUL in it
        return False


def _find_local(item: str) -> _Input:
    """Find what is behind an INPUT here."""
    if not item:
        raise ValueError(
            "an INPUT is empty; name a file, a folder or a glob (. is the folder you are in)"
        )
    try:
        path = Path(item)
        if item.startswith("~") and not _is_there(item):
            path = path.expanduser()
        if path.is_file():
            name = _name(path)
            refuse_archive(item, name)
            return _Input(name, True, [stat_file(name, path)], [])
        if path.is_dir():
            return _find_in_folder(item, path)
        if re.search(r"[*?\[]", str(path)):
            return _find_by_pattern(item, path)
        raise ValueError(_why_no_input(item, path))
    except OSError as error:
        raise ValueError(
            f"{error.filename or item}: cannot be read: {error.strerror}; check the path"
        ) from error
    except RuntimeError as error:  # no such user behind ~
        raise ValueError(f"{item}: {error}; write the path out") from error


def _find_in_folder(item: str, path: Path) -> _Input:
    if (path / MANIFEST).is_file() and (path / TOKENIZER).is_file():
        raise ValueError(
            f"{item}: a prepared set, whose documents are tokens already; give the text it was "
            "made of"
        )
    found, passed = walk(path, ["**"])
    files, passed = _without_cards(*_wanted(list(found), passed))
    return _Input(_name(path), False, _some(item, files, passed), passed, os.path.realpath(path))


def _find_by_pattern(item: str, path: Path) -> _Input:
    parts = path.parts
    # As far as the path exists it is taken as it stands.
    fixed = next(n for n in range(len(parts), -1, -1) if Path(*parts[:n]).is_dir())
    if any("**" in part and part != "**" for part in parts[fixed:]):
        raise ValueError(
            f"{item}: ** stands for folders and must be alone between slashes; write **/*.txt, say"
        )
    root = Path(*parts[:fixed])
    found, passed = walk(root, list(parts[fixed:]))
    files = list(found)
    matching = _matching(item, files)
    return _Input(_name(root), False, matching, passed + _beside(files), os.path.realpath(root))


def _why_no_input(item: str, path: Path) -> str:
    """Say why a path is neither a file nor a folder. Raises OSError."""
    if path.is_symlink():
        return f"{item}: a link to {path.readlink()}, which is not there; check the path"
    if path.exists():
        return f"{item}: neither a file nor a folder; write it to a file, or pipe it to the input -"
    return f"{item}: no such file or folder; check the path"


def _find_remote(item: str) -> _Input:
    """Do as `_find_local`, at a URL."""
    if item.startswith("file://"):
        return _find_local(item.removeprefix("file://"))
    fs, path = file_system(item)
    web = is_http(item)
    try:
        magic = re.search(r"[*\[]" if web else r"[*?\[]", path)
        if magic and (web or not fs.exists(path)):
            root = re.split(r"[^/]*[*?\[]", path)[0].rstrip("/")
            if not web:
                parts = path.split("/")
                ends = range(len(parts) - 1, 0, -1)
                root = next((there for n in ends if fs.isdir(there := "/".join(parts[:n]))), root)
            pattern = glob.escape(root) + path[len(root) :]
            found = {
                name: info
                for name, info in fs.glob(pattern, detail=True).items()
                if info["type"] == "file"
            }
            files, passed = list_remote(fs, root, found)
            return _Input(
                last_part(root), False, _matching(item, files), passed + _beside(files), root
            )
        if item.endswith("/") if web else fs.isdir(path):
            root = path.rstrip("/")
            files, passed = _without_cards(
                *_wanted(*list_remote(fs, root, fs.find(path, detail=True)))
            )
            return _Input(last_part(root), False, _some(item, files, passed), passed, root)
        name = last_part(path.partition("?")[0] if web else path)
        refuse_archive(item, name)
        return _Input(name, True, [stat_remote(fs, name, path, fs.info(path))], [])
    except ValueError:
        raise
    except FileNotFoundError as error:
        raise ValueError(f"{item}: not there, or not to be reached; check the URL") from error
    except Exception as error:  # every remote file system has its own classes
        raise ValueError(
            f"{item}: cannot be read: {type(error).__name__} {error}; check the URL"
        ) from error


def _name(path: Path) -> str:
    """Return the last part of a path, also of "." and "..", which must be looked up."""
    return path.name if path.name not in ("", "..") else path.resolve().name or "root"


def _wanted(files: list[Found], passed: list[Passed]) -> tuple[list[Found], list[Passed]]:
    """Keep of the files in a folder those of a suffix that is read; the others are passed over."""
    others = [file for file in files if not is_wanted(file.below)]
    passed = passed + [
        Passed(file.below, "other_suffix", describe_suffix(file.below)) for file in others
    ]
    return [file for file in files if is_wanted(file.below)], sorted(passed)


def _without_cards(files: list[Found], passed: list[Passed]) -> tuple[list[Found], list[Passed]]:
    """Return the files without the texts that only tell of the data beside or below them; of other
    texts there it is noted that they are read."""
    beside = _texts_beside_data(files)
    cards = [file for file in beside if is_card_name(file.below)]
    passed = passed + [
        Passed(file.below, "card", "it stands beside data, and tells of it") for file in cards
    ]
    gone = {file.below for file in cards}
    files = [file for file in files if file.below not in gone]
    return files, sorted(
        passed + _noted(files, [file for file in beside if not is_card_name(file.below)])
    )


def _beside(files: list[Found]) -> list[Passed]:
    return _noted(files, _texts_beside_data(files))


def _noted(files: list[Found], beside: list[Found]) -> list[Passed]:
    """Note that texts are read which stand beside data, where the data is the most: else they are
    the corpus."""
    data = sum(file.size for file in files if kind_of(file.below) != "text")
    if sum(file.size for file in beside) > data:
        return []
    return [
        Passed(file.below, "beside_data", "a text file beside JSON lines or parquet, read")
        for file in beside
    ]


def _texts_beside_data(files: list[Found]) -> list[Found]:
    """Return the text files that have JSON lines or parquet beside or below them."""
    texts = [file for file in files if kind_of(file.below) == "text"]
    folders = {file.below.rpartition("/")[0] for file in texts}
    with_cards = {file.below.rpartition("/")[0] for file in texts if is_card_name(file.below)}
    with_data: set[str] = set()
    for file in files:
        above = _folders_above(file.below)
        kind = kind_of(file.below)
        # Plain JSON may be settings: it is looked into, but only where that decides on a card.
        unsure = kind == "json" and not packing(file.below)
        if kind == "text" or (with_cards if unsure else folders).isdisjoint(above - with_data):
            continue
        if not unsure or _holds_records(file):
            with_data |= above
    return [file for file in texts if file.below.rpartition("/")[0] in with_data]


def _folders_above(below: str) -> set[str]:
    parts = below.split("/")[:-1]
    return {"/".join(parts[:n]) for n in range(len(parts) + 1)}


def _holds_records(file: Found) -> bool:
    with closing(Stored(File(file.below, file.path, "json", file.size, file.stamp))) as stored:
        head = stored.peek(HEAD_BYTES)
    return holds_records(head, len(head) < HEAD_BYTES)


def _some(item: str, files: list[Found], passed: list[Passed]) -> list[Found]:
    if not files:
        wanted = " ".join((*TEXT_SUFFIXES[:3], "...", *JSON_SUFFIXES, *row_suffixes()))
        left = (
            f" (passed over: {len(passed):,}, such as {printable(passed[0].below)})"
            if passed
            else ""
        )
        raise ValueError(
            f"{item}: no readable file in this folder{left}, expected some ending in {wanted}"
        )
    return files


def _matching(item: str, files: list[Found]) -> list[Found]:
    if not files:
        raise ValueError(
            f"{item}: no file matches this pattern; check it, and quote it for the shell"
        )
    for file in files:
        refuse_archive(file.path, file.below)
    return files
