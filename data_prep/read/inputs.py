"""From INPUTs to files, and from files to units, each of which can be read alone."""

import fnmatch
import glob
import os
import re
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from data_prep.read.pieces import Finding, Unit
from data_prep.read.sniff import HEAD_BYTES, holds_records, sniff_file
from data_prep.read.streams import PACKED, File, Kind, Stored, file_system, is_http, is_url, packing
from data_prep.shards import MANIFEST, PARTIAL, TOKENIZER

JSONL_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (*JSONL_SUFFIXES, ".json")
TEXT_SUFFIXES = (
    *(
        ".txt",
        ".text",
        ".md",
        ".markdown",
        ".rst",
        ".adoc",
        ".org",
        ".tex",
        ".html",
        ".htm",
        ".xhtml",
        ".xml",
    ),
    *(
        ".py",
        ".pyi",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".cxx",
        ".hh",
        ".hpp",
        ".cu",
        ".cuh",
        ".m",
        ".mm",
        ".java",
        ".kt",
    ),
    *(
        ".scala",
        ".groovy",
        ".clj",
        ".js",
        ".mjs",
        ".jsx",
        ".ts",
        ".tsx",
        ".vue",
        ".css",
        ".scss",
        ".go",
        ".rs",
    ),
    *(
        ".swift",
        ".cs",
        ".fs",
        ".vb",
        ".rb",
        ".php",
        ".pl",
        ".pm",
        ".lua",
        ".r",
        ".jl",
        ".f",
        ".f90",
        ".f95",
        ".pas",
    ),
    *(
        ".hs",
        ".ml",
        ".mli",
        ".erl",
        ".ex",
        ".exs",
        ".elm",
        ".lisp",
        ".el",
        ".scm",
        ".rkt",
        ".d",
        ".nim",
        ".zig",
    ),
    *(
        ".dart",
        ".v",
        ".sv",
        ".vhd",
        ".asm",
        ".s",
        ".sh",
        ".bash",
        ".zsh",
        ".fish",
        ".ps1",
        ".bat",
        ".sql",
        ".proto",
    ),
    *(".yaml", ".yml", ".toml", ".ini", ".cfg", ".cmake", ".mk", ".gradle", ".tf"),
)
# What stands beside data to tell of it.
CARD = re.compile(
    r"(?:readme|licen[cs]e)(?:[._-].*)?"
    r"|(?:copying|copyright|notice|citation|changelog|contributing|code_of_conduct|contributors|authors"
    r"|data(?:set)?[_-]?card|model[_-]?card|datasheet)(?:\.\w+)?",
    re.IGNORECASE,
)
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar")
UNIT_BYTES = 64 << 20
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


@dataclass(frozen=True)
class Source:
    """One INPUT, or all text files that were named one by one: its files in reading order, and what was passed over."""

    name: str
    files: tuple[File, ...]
    passed: tuple[Finding, ...] = ()


class _Found(NamedTuple):
    below: str
    path: str
    size: int
    stamp: str


class _Passed(NamedTuple):
    """What is not read: where it is below the INPUT, the kind of finding that this is, and what was found."""

    below: str
    kind: str
    detail: str


class _Input(NamedTuple):
    name: str
    is_file: bool
    files: list[_Found]
    passed: list[_Passed]
    root: str = ""


def find_sources(inputs: Sequence[str | Path], out: Path | None = None) -> list[Source]:
    """The files behind each INPUT: a folder (recursive), a file, or a glob such as `docs/**/*.md`, each as a local path
    or as a URL that fsspec opens.

    In a folder count files ending in .jsonl .ndjson .json .parquet or one of TEXT_SUFFIXES, all but parquet also with
    .gz .zst .bz2 .xz behind it, sorted by their path; names that start with a dot, and texts that tell of the data that
    they stand beside (CARD), are passed over. A file named on its own or matched by a glob may have any suffix, and is
    read as text unless it ends in one of the first four. Links are followed, to each folder once. Text files named one
    by one are one source called "files". A file reached twice is read once. No two sources have one name.

    Of what is made in `out`, or beside it by jobs, nothing is told: it may be there or not.

    Raises ValueError where an INPUT does not exist, matches nothing, or is an archive this cannot read.
    """
    if not inputs:
        raise ValueError("no input given: name at least one folder, file or glob")
    seen: set[str] = set()
    told = (
        {os.path.realpath(path) for path in (out, out.parent / f".{out.name}.prepare")}
        if out
        else set()
    )
    found: list[tuple[str, list[File], list[Finding]]] = []
    lone: list[File] = []
    used: dict[str, int] = {}
    homeless: list[Finding] = []
    for item in map(str, inputs):
        try:
            given = (
                _find_remote(item) if is_url(item) and not _is_there(item) else _find_local(item)
            )
        except ValueError as error:
            raise ValueError(_printable(str(error))) from error
        name = unused(_printable(given.name), used)
        new = []
        for file in given.files:
            real = file.path if is_url(file.path) else os.path.realpath(file.path)
            if real not in seen:
                seen.add(real)
                below = file.below if given.is_file else f"{name}/{file.below}"
                new.append(
                    File(_printable(below), file.path, _kind(file.below), file.size, file.stamp)
                )
        passed = []
        for each in given.passed:
            if (place := os.path.join(given.root, each.below)) not in told:  # noqa: PTH118  # it may be a URL
                told.add(place)
                passed.append(
                    Finding(each.kind, _printable(f"{name}/{each.below}"), 0, each.detail)
                )
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
    return [Source(name, tuple(files), tuple(passed)) for name, files, passed in found]


def plan_units(sources: Sequence[Source]) -> list[Unit]:
    """The units of all sources, in reading order, of up to UNIT_BYTES of stored bytes where they can be: neighbouring
    files of text or JSON together, plain JSON lines in ranges. A file that is compressed, parquet, or behind http is
    not cut, nor one that is something else than its name says.

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
    """The name, or if it is in `used`, "name (2)" or the next that is free; `used` counts what was tried."""
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
    """What is behind an INPUT here."""
    if not item:
        raise ValueError(
            "an INPUT is empty; name a file, a folder or a glob (. is the folder you are in)"
        )
    try:
        path = Path(item)
        if item.startswith("~") and not _is_there(item):
            path = path.expanduser()
        name = _name(path)
        if path.is_file():
            _refuse_archives(item, name)
            return _Input(name, True, [_stat(name, path)], [])
        if path.is_dir():
            if (path / MANIFEST).is_file() and (path / TOKENIZER).is_file():
                raise ValueError(
                    f"{item}: a prepared set, whose documents are tokens already; give the text it was made of"
                )
            found, passed = _walk(path, ["**"])
            files, passed = _without_cards(*_wanted(found, passed))
            return _Input(name, False, _some(item, files, passed), passed, os.path.realpath(path))
        if re.search(r"[*?\[]", str(path)):
            parts = path.parts
            # As far as the path exists it is taken as it stands.
            fixed = next(n for n in range(len(parts), -1, -1) if Path(*parts[:n]).is_dir())
            if any("**" in part and part != "**" for part in parts[fixed:]):
                raise ValueError(
                    f"{item}: ** stands for folders and must be alone between slashes; write **/*.txt, say"
                )
            root = Path(*parts[:fixed])
            files, passed = _walk(root, list(parts[fixed:]))
            return _Input(
                _name(root),
                False,
                _matching(item, files),
                passed + _beside(files),
                os.path.realpath(root),
            )
        if path.is_symlink():
            raise ValueError(
                f"{item}: a link to {path.readlink()}, which is not there; check the path"
            )
        if path.exists():
            raise ValueError(
                f"{item}: neither a file nor a folder; write it to a file, or pipe it to the input -"
            )
    except OSError as error:
        raise ValueError(
            f"{error.filename or item}: cannot be read: {error.strerror}; check the path"
        ) from error
    except RuntimeError as error:  # no such user behind ~
        raise ValueError(f"{item}: {error}; write the path out") from error
    raise ValueError(f"{item}: no such file or folder; check the path")


def _find_remote(item: str) -> _Input:
    """As `_find_local`, at a URL."""
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
            files, passed = _listed(fs, root, found)
            return _Input(_last(root), False, _matching(item, files), passed + _beside(files), root)
        if item.endswith("/") if web else fs.isdir(path):
            root = path.rstrip("/")
            files, passed = _without_cards(*_wanted(*_listed(fs, root, fs.find(path, detail=True))))
            return _Input(_last(root), False, _some(item, files, passed), passed, root)
        name = _last(path.partition("?")[0] if web else path)
        _refuse_archives(item, name)
        return _Input(name, True, [_remote(fs, name, path, fs.info(path))], [])
    except ValueError:
        raise
    except FileNotFoundError as error:
        raise ValueError(f"{item}: not there, or not to be reached; check the URL") from error
    except Exception as error:  # every remote file system has its own classes
        raise ValueError(
            f"{item}: cannot be read: {type(error).__name__} {error}; check the URL"
        ) from error


def _name(path: Path) -> str:
    """The last part of a path, also of "." and "..", which must be looked up."""
    return path.name if path.name not in ("", "..") else path.resolve().name or "root"


def _listed(
    fs: Any, root: str, found: dict[str, dict[str, Any]]
) -> tuple[list[_Found], list[_Passed]]:
    files, passed = [], []
    for path, info in found.items():
        below = _readable(path).removeprefix(_readable(root)).lstrip("/")
        if _is_hidden(below):
            passed.append(_Passed(below, "hidden", "a name that begins with a dot"))
        elif not _is_wanted(below) and not info.get("size"):
            files.append(
                _Found(below, path, 0, "")
            )  # perhaps not to be read, so a web server is not asked
        else:
            # A web server's list has no sizes.
            files.append(
                _remote(fs, below, path, info if info.get("size") is not None else fs.info(path))
            )
    return sorted(files), sorted(passed)


def _remote(fs: Any, below: str, path: str, info: dict[str, Any]) -> _Found:
    stamp = next((str(info[key]) for key in STAMPS if info.get(key)), "")
    return _Found(below, str(fs.unstrip_protocol(path)), info.get("size") or 0, stamp)


def _readable(path: str) -> str:
    return unquote(path) if is_http(path) else path


def _last(path: str) -> str:
    return _readable(path).rstrip("/").rpartition("/")[2] or "root"


def _walk(root: Path, pattern: Sequence[str]) -> tuple[list[_Found], list[_Passed]]:
    """The files below a folder that match the parts of a pattern, sorted by their name below it, and what lies there
    and cannot be read or is not meant to be.

    Links to folders are followed once the real folders are done, each folder once for each part of the pattern, known
    by its real path: so loops end, and a file keeps its real name where it has one. Raises OSError.
    """
    files: dict[str, _Found] = {}
    passed: dict[str, _Passed] = {}
    done: set[tuple[str, int]] = set()
    # Of the folders to look into: its name below the root, and how many parts of the pattern led to it.
    folders, links = deque([("", 0)]), deque[tuple[str, int]]()

    def pass_over(below: str, kind: str, detail: str) -> None:
        passed[below] = _Passed(below, kind, detail)

    def enter(below: str, entry: os.DirEntry[str], parts: int) -> None:
        if _is_set(Path(entry.path)):
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
                    files[below] = _stat(below, path)
                elif entry.is_symlink():
                    target = _printable(str(path.readlink()))
                    pass_over(below, "dead_link", f"a link to {target}, which is not there")
                else:
                    pass_over(below, "not_a_file", "a pipe, a socket or a device")
    return sorted(files.values()), sorted(passed.values())


def _wanted(files: list[_Found], passed: list[_Passed]) -> tuple[list[_Found], list[_Passed]]:
    """Of the files in a folder those of a suffix that is read; the others are passed over."""
    others = [file for file in files if not _is_wanted(file.below)]
    passed = passed + [_Passed(file.below, "other_suffix", _suffix(file.below)) for file in others]
    return [file for file in files if _is_wanted(file.below)], sorted(passed)


def _suffix(below: str) -> str:
    name = Path(below).name
    suffix = Path(_bare(name)).suffix + packing(name)
    return f"the suffix {_printable(suffix)}" if suffix else "a name without a suffix"


def _without_cards(
    files: list[_Found], passed: list[_Passed]
) -> tuple[list[_Found], list[_Passed]]:
    """The files without the texts that only tell of the data beside or below them; of other texts there it is noted
    that they are read."""
    beside = _texts_beside_data(files)
    cards = [file for file in beside if _is_card(file)]
    passed = passed + [
        _Passed(file.below, "card", "it stands beside data, and tells of it") for file in cards
    ]
    gone = {file.below for file in cards}
    files = [file for file in files if file.below not in gone]
    return files, sorted(passed + _noted(files, [file for file in beside if not _is_card(file)]))


def _beside(files: list[_Found]) -> list[_Passed]:
    return _noted(files, _texts_beside_data(files))


def _noted(files: list[_Found], beside: list[_Found]) -> list[_Passed]:
    """That texts are read which stand beside data, where the data is the most: else they are the corpus."""
    data = sum(file.size for file in files if _kind(file.below) != "text")
    if sum(file.size for file in beside) > data:
        return []
    return [
        _Passed(file.below, "beside_data", "a text file beside JSON lines or parquet, read")
        for file in beside
    ]


def _texts_beside_data(files: list[_Found]) -> list[_Found]:
    """Text files that have JSON lines or parquet beside or below them."""
    texts = [file for file in files if _kind(file.below) == "text"]
    folders = {file.below.rpartition("/")[0] for file in texts}
    with_cards = {file.below.rpartition("/")[0] for file in texts if _is_card(file)}
    with_data: set[str] = set()
    for file in files:
        above = _folders_above(file.below)
        kind = _kind(file.below)
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


def _holds_records(file: _Found) -> bool:
    with closing(Stored(File(file.below, file.path, "json", file.size, file.stamp))) as stored:
        head = stored.peek(HEAD_BYTES)
    return holds_records(head, len(head) < HEAD_BYTES)


def _is_card(file: _Found) -> bool:
    name = file.below.rpartition("/")[2]
    return CARD.fullmatch(name.removesuffix(packing(name))) is not None


def _is_set(folder: Path) -> bool:
    """Whether a folder holds a prepared set, or one in the making: its report and rejects are no corpus."""
    return (folder / PARTIAL).is_dir() or (
        (folder / MANIFEST).is_file() and (folder / TOKENIZER).is_file()
    )


def _stat(below: str, path: Path) -> _Found:
    stat = path.stat()
    return _Found(below, str(path), stat.st_size, str(stat.st_mtime_ns))


def _some(item: str, files: list[_Found], passed: list[_Passed]) -> list[_Found]:
    if not files:
        wanted = " ".join((*TEXT_SUFFIXES[:3], "...", *JSON_SUFFIXES, ".parquet"))
        left = (
            f" (passed over: {len(passed):,}, such as {_printable(passed[0].below)})"
            if passed
            else ""
        )
        raise ValueError(
            f"{item}: no readable file in this folder{left}, expected some ending in {wanted}"
        )
    return files


def _matching(item: str, files: list[_Found]) -> list[_Found]:
    if not files:
        raise ValueError(
            f"{item}: no file matches this pattern; check it, and quote it for the shell"
        )
    for file in files:
        _refuse_archives(file.path, file.below)
    return files


def _refuse_archives(path: str, name: str) -> None:
    bare = _bare(name)
    if bare.endswith(ARCHIVES) or (bare.endswith(".parquet") and packing(name)):
        raise ValueError(
            f"{path}: expected text, {', '.join(JSON_SUFFIXES)}, each also with {', '.join(PACKED)}, or .parquet; "
            "unpack it first"
        )


def _is_wanted(name: str) -> bool:
    bare = _bare(name)
    return bare.endswith((*TEXT_SUFFIXES, *JSON_SUFFIXES)) or (
        bare.endswith(".parquet") and not packing(name)
    )


def _is_hidden(below: str) -> bool:
    return any(part.startswith(".") for part in below.split("/"))


def _kind(name: str) -> Kind:
    bare = _bare(name)
    if bare.endswith(JSONL_SUFFIXES):
        return "jsonl"
    return "json" if bare.endswith(".json") else "parquet" if bare.endswith(".parquet") else "text"


def _bare(name: str) -> str:
    return name.lower().removesuffix(packing(name))


def _printable(name: str) -> str:
    """A name without what could break a line, a terminal or an encoding."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
