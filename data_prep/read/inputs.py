"""From INPUTs to files, and from files to units, each of which can be read alone."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from data_prep.read.pieces import Unit
from data_prep.read.streams import PACKED, File, Kind, file_system, is_http, is_url, packing
from data_prep.shards import MANIFEST, PARTIAL, TOKENIZER

JSONL_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".html", ".htm", ".xhtml", ".xml"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".m", ".mm", ".java", ".kt"),
    *(".scala", ".groovy", ".clj", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".vue", ".css", ".scss", ".go", ".rs"),
    *(".swift", ".cs", ".fs", ".vb", ".rb", ".php", ".pl", ".pm", ".lua", ".r", ".jl", ".f", ".f90", ".f95", ".pas"),
    *(".hs", ".ml", ".mli", ".erl", ".ex", ".exs", ".elm", ".lisp", ".el", ".scm", ".rkt", ".d", ".nim", ".zig"),
    *(".dart", ".v", ".sv", ".vhd", ".asm", ".s", ".sh", ".bash", ".zsh", ".fish", ".ps1", ".bat", ".sql", ".proto"),
    *(".yaml", ".yml", ".toml", ".ini", ".cfg", ".cmake", ".mk", ".gradle", ".tf"),
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
    """One INPUT, or all text files that were named one by one, and its files in reading order."""

    name: str
    files: tuple[File, ...]


class _Found(NamedTuple):
    below: str
    path: str
    size: int
    stamp: str


def find_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """The files behind each INPUT: a folder (recursive), a file, or a glob such as `docs/**/*.md`, each as a local path
    or as a URL that fsspec opens.

    In a folder count files ending in .jsonl .ndjson .parquet or one of TEXT_SUFFIXES, all but parquet also with .gz
    .zst .bz2 .xz behind it, sorted by their path; names that start with a dot are skipped. A file named on its own or
    matched by a glob may have any suffix, and is read as text unless it ends in .jsonl, .ndjson or .parquet. Text files
    named one by one are one source called "files". A file reached twice is read once. No two sources have one name.

    Raises ValueError where an INPUT does not exist, matches nothing, or is an archive this cannot read.
    """
    if not inputs:
        raise ValueError("no input given: name at least one folder, file or glob")
    seen: set[str] = set()
    found: list[tuple[str, list[File]]] = []
    lone: list[File] = []
    used: dict[str, int] = {}
    for item in map(str, inputs):
        given, is_file, files = _find_remote(item) if is_url(item) else _find_local(item)
        name = unused(_printable(given), used)
        new = []
        for file in files:
            real = file.path if is_url(file.path) else os.path.realpath(file.path)
            if real not in seen:
                seen.add(real)
                below = file.below if is_file else f"{name}/{file.below}"
                new.append(File(_printable(below), file.path, _kind(file.below), file.size, file.stamp))
        if is_file and new and new[0].kind == "text":
            if not lone:
                found.append((unused("files", used), lone))
                used[found[-1][0]] = 1
            lone += new
        elif new:
            found.append((name, new))
            used[name] = 1
    return [Source(name, tuple(files)) for name, files in found]


def plan_units(sources: Sequence[Source]) -> list[Unit]:
    """The units of all sources, in reading order, of up to UNIT_BYTES of stored bytes where they can be: neighbouring
    text files together, plain JSON lines in ranges. A file that is compressed, parquet, or behind http is not cut."""
    units: list[Unit] = []
    for source in sources:
        texts: list[File] = []
        size = 0
        for file in source.files:
            if texts and (file.kind != "text" or size + file.size > UNIT_BYTES):
                units.append(Unit(source.name, tuple(texts)))
                texts, size = [], 0
            if file.kind == "text":
                texts.append(file)
                size += file.size
            elif file.kind == "jsonl" and not packing(file.name) and not is_http(file.path) and file.size > UNIT_BYTES:
                for start in range(0, file.size, UNIT_BYTES):
                    units.append(Unit(source.name, (file,), start, min(start + UNIT_BYTES, file.size)))
            else:
                units.append(Unit(source.name, (file,)))
        if texts:
            units.append(Unit(source.name, tuple(texts)))
    return units


def stored_bytes(unit: Unit) -> int:
    """Bytes that reading a unit takes from disk or network; 0 if they are not known."""
    return sum(file.size for file in unit.files) if unit.end is None else unit.end - unit.start


def unused(name: str, used: dict[str, int]) -> str:
    """The name, or if it is in `used`, "name (2)" or the next that is free; `used` counts what was tried."""
    fresh = name
    while fresh in used:
        used[name] += 1
        fresh = f"{name} ({used[name]})"
    return fresh


def _find_local(item: str) -> tuple[str, bool, list[_Found]]:
    """The name of one INPUT, whether it is a file itself, and its files."""
    try:
        path = Path(item)
        name = _name(path)
        if path.is_file():
            _refuse_archives(item, name)
            return name, True, [_stat(name, path)]
        if path.is_dir():
            if (path / MANIFEST).is_file() and (path / TOKENIZER).is_file():
                raise ValueError(
                    f"{item}: a prepared set, whose documents are tokens already; give the text it was made of"
                )
            return name, False, _some(item, sorted(_stat(below, file) for below, file in _walk(path)))
        if re.search(r"[*?\[]", item):
            fixed = next(i for i, part in enumerate(path.parts) if re.search(r"[*?\[]", part))
            if any("**" in part and part != "**" for part in path.parts):
                raise ValueError(
                    f"{item}: ** stands for folders and must be alone between slashes; write **/*.txt, say"
                )
            root, pattern = Path(*path.parts[:fixed]), "/".join(path.parts[fixed:])
            matched = [(file.relative_to(root).as_posix(), file) for file in root.glob(pattern) if file.is_file()]
            sets = {parent for parent in {file.parent for _, file in matched} if _in_set(parent, root)}
            visible = [
                _stat(below, file) for below, file in matched if not _is_hidden(below) and file.parent not in sets
            ]
            return _name(root), False, _matching(item, sorted(visible))
        if path.exists():
            raise ValueError(f"{item}: neither a file nor a folder; write it to a file, or pipe it to the input -")
    except OSError as error:
        raise ValueError(f"{error.filename or item}: cannot be read: {error.strerror}; check the path") from error
    raise ValueError(f"{item}: no such file or folder; check the path")


def _find_remote(item: str) -> tuple[str, bool, list[_Found]]:
    """As `_find_local`, at a URL."""
    if item.startswith("file://"):
        return _find_local(item.removeprefix("file://"))
    fs, path = file_system(item)
    web = is_http(item)
    try:
        if re.search(r"[*\[]" if web else r"[*?\[]", path):
            root = re.split(r"[^/]*[*?\[]", path)[0].rstrip("/")
            found = {name: info for name, info in fs.glob(path, detail=True).items() if info["type"] == "file"}
            return _last(root), False, _matching(item, sorted(_listed(fs, root, found)))
        if item.endswith("/") if web else fs.isdir(path):
            root = path.rstrip("/")
            found = {name: info for name, info in fs.find(path, detail=True).items() if _is_wanted(name)}
            return _last(root), False, _some(item, sorted(_listed(fs, root, found)))
        name = _last(path.partition("?")[0] if web else path)
        _refuse_archives(item, name)
        return name, True, [_remote(fs, name, path, fs.info(path))]
    except ValueError:
        raise
    except FileNotFoundError as error:
        raise ValueError(f"{item}: not there, or not to be reached; check the URL") from error
    except Exception as error:  # every remote file system has its own classes
        raise ValueError(f"{item}: cannot be read: {type(error).__name__} {error}; check the URL") from error


def _name(path: Path) -> str:
    """The last part of a path, also of "." and "..", which must be looked up."""
    return path.name if path.name not in ("", "..") else path.resolve().name or "root"


def _listed(fs: Any, root: str, found: dict[str, dict[str, Any]]) -> Iterator[_Found]:
    for path, info in found.items():
        below = _readable(path).removeprefix(_readable(root)).lstrip("/")
        if not _is_hidden(below):
            # A web server's list has no sizes.
            yield _remote(fs, below, path, info if info.get("size") is not None else fs.info(path))


def _remote(fs: Any, below: str, path: str, info: dict[str, Any]) -> _Found:
    stamp = next((str(info[key]) for key in STAMPS if info.get(key)), "")
    return _Found(below, str(fs.unstrip_protocol(path)), info.get("size") or 0, stamp)


def _readable(path: str) -> str:
    return unquote(path) if is_http(path) else path


def _last(path: str) -> str:
    return _readable(path).rstrip("/").rpartition("/")[2] or "root"


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files to read below a folder as (name below it, path), in no particular order. Raises OSError."""

    def refuse(error: OSError) -> None:
        raise error

    for here, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not _is_hidden(name) and not _is_set(Path(here, name))]
        for name in names:
            path = Path(here, name)
            if _is_wanted(name) and not _is_hidden(name) and path.is_file():
                yield path.relative_to(folder).as_posix(), path


def _in_set(folder: Path, root: Path) -> bool:
    return any(_is_set(parent) for parent in (folder, *folder.parents) if parent.is_relative_to(root))


def _is_set(folder: Path) -> bool:
    """Whether a folder holds a prepared set, or one in the making: its report and rejects are no corpus."""
    return (folder / PARTIAL).is_dir() or ((folder / MANIFEST).is_file() and (folder / TOKENIZER).is_file())


def _stat(below: str, path: Path) -> _Found:
    stat = path.stat()
    return _Found(below, str(path), stat.st_size, str(stat.st_mtime_ns))


def _some(item: str, files: list[_Found]) -> list[_Found]:
    if not files:
        wanted = " ".join((*TEXT_SUFFIXES[:3], "...", *JSONL_SUFFIXES, ".parquet"))
        raise ValueError(f"{item}: no readable file in this folder, expected some ending in {wanted}")
    return files


def _matching(item: str, files: list[_Found]) -> list[_Found]:
    if not files:
        raise ValueError(f"{item}: no file matches this pattern; check it, and quote it for the shell")
    for file in files:
        _refuse_archives(file.path, file.below)
    return files


def _refuse_archives(path: str, name: str) -> None:
    bare = _bare(name)
    if bare.endswith(ARCHIVES) or (bare.endswith(".parquet") and packing(name)):
        raise ValueError(
            f"{path}: expected text, {', '.join(JSONL_SUFFIXES)}, each also with {', '.join(PACKED)}, or .parquet; "
            "unpack it first"
        )


def _is_wanted(name: str) -> bool:
    bare = _bare(name)
    return bare.endswith((*TEXT_SUFFIXES, *JSONL_SUFFIXES)) or (bare.endswith(".parquet") and not packing(name))


def _is_hidden(below: str) -> bool:
    return any(part.startswith(".") for part in below.split("/"))


def _kind(name: str) -> Kind:
    bare = _bare(name)
    return "jsonl" if bare.endswith(JSONL_SUFFIXES) else "parquet" if bare.endswith(".parquet") else "text"


def _bare(name: str) -> str:
    return name.lower().removesuffix(packing(name))


def _printable(name: str) -> str:
    """A name without what could break a line, a terminal or an encoding."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
