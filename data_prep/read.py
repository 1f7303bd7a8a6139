"""Documents out of text files and JSON lines, in an order that depends only on the files' names."""

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import orjson
import zstandard

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PACKED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".parquet")
SURROGATE = re.compile("[\ud800-\udfff]")
CHUNK = 1 << 20


class Document(NamedTuple):
    """One document: `source` is where it came from, relative to the INPUT; `text` has no lone surrogates."""

    source: str
    text: str


@dataclass(frozen=True)
class Source:
    """One INPUT: its name (never an absolute path) and its files as (name below the INPUT, path)."""

    name: str
    files: tuple[tuple[str, Path], ...]


@dataclass
class Counts:
    """What `read_documents` saw: `replaced` documents held broken UTF-8, `empty` ones were skipped."""

    documents: int = 0
    text_bytes: int = 0
    replaced: int = 0
    empty: int = 0


def find_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """The files behind each INPUT, which is a folder (recursive), a file or a glob such as `docs/**/*.md`.

    In a folder, files ending in .txt .md .py .rst .jsonl .jsonl.gz .jsonl.zst count, sorted by their path;
    names that start with a dot are skipped. A file named on its own or matched by a glob may have any
    suffix and is read as text unless it ends in .jsonl(.gz, .zst). Text files named one by one are one source
    called "files". A file reached twice is read once.

    Raises ValueError where an INPUT does not exist, matches nothing, or is an archive this cannot read.
    """
    if not inputs:
        raise ValueError("no input given: name at least one folder, file or glob")
    seen: set[str] = set()
    found: list[tuple[str, list[tuple[str, Path]]]] = []
    lone: list[tuple[str, Path]] = []
    for item in inputs:
        name, files = _find(str(item))
        new = []
        for below, path in files:
            real = os.path.realpath(path)
            if real not in seen:
                seen.add(real)
                new.append((below, path))
        if Path(item).is_file() and not name.endswith(JSONL_SUFFIXES):
            if new and not lone:
                found.append(("files", lone))
            lone += new
        elif new:
            found.append((name, new))
    return [Source(name, tuple(files)) for name, files in found]


def read_documents(source: Source, counts: Counts | None = None) -> Iterator[Document]:
    """Every document of a source, in order, as a stream; adds what it saw to `counts`.

    A text file is one document; so is the "text" field of one JSON line. Text is left exactly as it is, line ends
    and byte order marks included, but for broken UTF-8 and lone surrogates, which become U+FFFD. Empty documents
    are skipped.

    Raises ValueError naming file and line for a JSON line without a string "text", a damaged archive,
    or a file that cannot be read.
    """
    counts = Counts() if counts is None else counts
    for below, path in source.files:
        name = below if source.name == "files" or below == source.name else f"{source.name}/{below}"
        try:
            texts = _read_jsonl(path) if path.name.endswith(JSONL_SUFFIXES) else _read_text(path)
            for text, replaced in texts:
                counts.replaced += replaced
                if not text:
                    counts.empty += 1
                    continue
                counts.documents += 1
                counts.text_bytes += len(text.encode())
                yield Document(name, text)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def _find(item: str) -> tuple[str, list[tuple[str, Path]]]:
    """The name of one INPUT and its files as (name below it, path)."""
    path = Path(item)
    name = _name(path)
    if path.is_file():
        if item.endswith(PACKED_SUFFIXES) and not item.endswith(JSONL_SUFFIXES):
            raise ValueError(f"{item}: expected text or {', '.join(JSONL_SUFFIXES)}; unpack it first")
        return name, [(name, path)]
    if path.is_dir():
        files = list(_walk(path))
        if not files:
            wanted = " ".join(TEXT_SUFFIXES + JSONL_SUFFIXES)
            raise ValueError(f"{item}: no readable file in this folder, expected some ending in {wanted}")
        return name, sorted(files)
    if re.search(r"[*?\[]", item):
        fixed = next(i for i, part in enumerate(path.parts) if re.search(r"[*?\[]", part))
        root, pattern = Path(*path.parts[:fixed]), "/".join(path.parts[fixed:])
        matched = [(p.relative_to(root).as_posix(), p) for p in root.glob(pattern) if p.is_file()]
        visible = [(below, p) for below, p in matched if not re.search(r"(^|/)\.", below)]
        if not visible:
            raise ValueError(f"{item}: no file matches this pattern; check it, and quote it for the shell")
        for _, p in visible:
            if p.name.endswith(PACKED_SUFFIXES) and not p.name.endswith(JSONL_SUFFIXES):
                raise ValueError(f"{p}: expected text or {', '.join(JSONL_SUFFIXES)}; unpack it first")
        return _name(root), sorted(visible)
    raise ValueError(f"{item}: no such file or folder; check the path")


def _name(path: Path) -> str:
    """The last part of a path, also of "." and "..", which must be looked up."""
    return path.name if path.name not in ("", "..") else path.resolve().name or "root"


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files to read below a folder as (name below it, path), in no particular order."""
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(here, name)
            wanted = not name.startswith(".") and name.endswith(TEXT_SUFFIXES + JSONL_SUFFIXES)
            if wanted and path.is_file():
                yield path.relative_to(folder).as_posix(), path


def _read_text(path: Path) -> Iterator[tuple[str, bool]]:
    yield _decode(path.read_bytes())


def _read_jsonl(path: Path) -> Iterator[tuple[str, bool]]:
    """(text, whether something was replaced) for each line that is not blank."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_lines(_unpacked(file, path.suffix)), 1):
                raw = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if raw.strip():
                    yield _json_text(raw, path, number)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise ValueError(
            f"{path}: damaged after line {number}: {error}; expected a whole {path.suffix} file, make it again"
        ) from error


def _json_text(line: bytes, path: Path, number: int) -> tuple[str, bool]:
    decoded, replaced = _decode(line)
    try:
        value = orjson.loads(decoded)
    except orjson.JSONDecodeError:
        # orjson refuses an escaped lone surrogate, which the standard library reads.
        try:
            value = json.loads(decoded)
        except (ValueError, RecursionError) as error:
            start = decoded[:40] + ("..." if len(decoded) > 40 else "")
            raise ValueError(
                f"{path}: line {number}: found {start!r} ({error}), "
                'expected a JSON object with a "text" string; mend or remove the line'
            ) from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        if not isinstance(value, dict):
            found = f"a JSON {type(value).__name__}"
        elif "text" in value:
            found = f'"text" of type {type(text).__name__}'
        else:
            found = f"the fields {', '.join(map(repr, list(value)[:8])) or '(none)'}"
        raise ValueError(
            f'{path}: line {number}: found {found}, expected a JSON object with a "text" string; '
            "mend or remove the line"
        )
    clean = SURROGATE.sub("\ufffd", text)
    return clean, replaced or clean != text


def _decode(raw: bytes) -> tuple[str, bool]:
    try:
        return raw.decode("utf-8"), False
    except UnicodeDecodeError:
        return raw.decode("utf-8", errors="replace"), True


def _unpacked(file: io.BufferedReader, suffix: str) -> Iterator[bytes]:
    """A file's bytes after decompression, in chunks."""
    if suffix == ".gz":
        with gzip.GzipFile(fileobj=file) as unzipped:
            yield from iter(lambda: unzipped.read(CHUNK), b"")
    elif suffix == ".zst":
        yield from _unpacked_zstd(file)
    else:
        yield from iter(lambda: file.read(CHUNK), b"")


def _unpacked_zstd(file: io.BufferedReader) -> Iterator[bytes]:
    # Frame by frame: the library's own stream_reader takes a truncated file for a short one.
    frame = None
    while chunk := file.read(CHUNK):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the last zstd frame is cut short")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines split at b"\\n" alone, without it; linear in the length of a line."""
    open_line: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        open_line.append(first)
        if rest:
            yield b"".join(open_line)
            yield from rest[:-1]
            open_line = [rest[-1]]
    if last := b"".join(open_line):
        yield last
