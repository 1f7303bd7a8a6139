"""THE FORMAT: token rows in plain WebDataset tars beside a manifest that can prove them whole.

A split's stream of tokens is `eos doc eos doc eos ... doc eos`. Row i is `stream[i*seq_len : (i+1)*seq_len + 1]`, so
a row's last token is the next row's first and every token after the first is predicted exactly once. What is left
after the last whole row is the split's `tail` in the manifest.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FORMAT = "dnt-shards"
VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
BLOCK_ROWS = 512
TAR_BLOCK = 512

Tokens = np.ndarray[Any, np.dtype[Any]]
SplitName = Literal["train", "val"]
Packing = Literal["concat", "best_fit"]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Member(_Part):
    """A block of rows in a tar: `offset` is the byte of row 0, `crc32` that of the rows' bytes."""

    name: Annotated[str, Field(pattern=r"^\d{6,}\.tokens\.npy$")]
    offset: Positive
    rows: Positive
    crc32: Count


class Shard(_Part):
    """One tar file; `tokens` are the predicted ones, rows * seq_len."""

    file: Annotated[str, Field(pattern=r"^(train|val)-\d{6,}\.tar$")]
    rows: Positive
    tokens: Positive
    bytes: Positive
    sha256: Sha256
    members: tuple[Member, ...]


class Split(_Part):
    """Train or val: `tokens` predicted ones in the stream, of which `rows * seq_len` are in rows."""

    documents: Positive
    tokens: Positive
    text_bytes: Positive
    rows: Positive
    tail: tuple[Count, ...]
    shards: tuple[Shard, ...]


class TokenizerInfo(_Part):
    """`round_trip` is whether a sample of the corpus decoded to exactly the text that went in."""

    file: Literal["tokenizer.model"]
    sha256: Sha256
    vocab_size: Positive
    round_trip: bool


class SourceInfo(_Part):
    """One INPUT: its documents, how many of them held broken UTF-8, and how many empty ones were left out."""

    name: str
    documents: Count
    text_bytes: Count
    replaced: Count
    empty: Count


class Options(_Part):
    """The options that decide the bytes; the first three are null for a tokenizer that was given."""

    vocab_size: Positive | None
    kind: Literal["bpe", "unigram"] | None
    sample_bytes: Positive | None
    val_fraction: Annotated[float, Field(ge=0, lt=1)]
    shard_bytes: Positive


class Manifest(_Part):
    """manifest.json: everything about a prepared set; its numbers are checked against one another."""

    format: Literal["dnt-shards"]
    version: Literal[1]
    dtype: Literal["uint16", "uint32"]
    seq_len: Positive
    packing: Packing = "concat"
    tokenizer: TokenizerInfo
    eos_id: Count
    options: Options
    sources: tuple[SourceInfo, ...]
    splits: dict[SplitName, Split]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Little-endian uint16 or uint32."""
        return np.dtype("<u2" if self.dtype == "uint16" else "<u4")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of seq_len + 1 tokens: row r of a member starts at `offset + r * row_bytes`."""
        return (self.seq_len + 1) * self.numpy_dtype.itemsize

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        vocab_size = self.tokenizer.vocab_size
        _same("dtype", self.dtype, dtype_for(vocab_size))
        if self.eos_id >= vocab_size:
            raise ValueError(f"eos_id is {self.eos_id}, expected less than the vocabulary's {vocab_size}")
        if "train" not in self.splits:
            raise ValueError('splits has no "train"')
        for name, split in self.splits.items():
            self._check_split(name, split)
        for field in ("documents", "text_bytes"):
            found = sum(getattr(split, field) for split in self.splits.values())
            _same(f"{field} in splits", found, sum(getattr(source, field) for source in self.sources))
        return self

    def _check_split(self, name: str, split: Split) -> None:
        block = 0
        for number, shard in enumerate(split.shards):
            where = f"splits.{name}.shards.{number}"
            _same(f"{where}.file", shard.file, shard_name(name, number))
            _same(f"{where}.rows", shard.rows, sum(member.rows for member in shard.members))
            _same(f"{where}.tokens", shard.tokens, shard.rows * self.seq_len)
            end = 0
            for member in shard.members:
                _same(f"{where}.members name", member.name, member_name(block))
                if member.offset < end + TAR_BLOCK:
                    raise ValueError(f"{where}: {member.name} at {member.offset} lies on the one before")
                end = member.offset + member.rows * self.row_bytes
                block += 1
            if end > shard.bytes:
                raise ValueError(f"{where}: its members end at {end}, beyond its {shard.bytes} bytes")
        members = [member for shard in split.shards for member in shard.members]
        _same(f"splits.{name}.rows", split.rows, sum(member.rows for member in members))
        for member in members[:-1]:
            _same(f"splits.{name}: rows of {member.name}", member.rows, BLOCK_ROWS)
        _same(f"splits.{name}.tokens", split.tokens, split.rows * self.seq_len + len(split.tail) - 1)
        if not 1 <= len(split.tail) <= self.seq_len:
            raise ValueError(f"splits.{name}.tail has {len(split.tail)} tokens, expected 1 to {self.seq_len}")
        if max(split.tail) >= self.tokenizer.vocab_size:
            raise ValueError(f"splits.{name}.tail holds {max(split.tail)}, beyond the vocabulary")


def dtype_for(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The narrower of the two that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def shard_name(split: str, number: int) -> str:
    """File name of a split's n-th tar."""
    return f"{split}-{number:06d}.tar"


def member_name(block: int) -> str:
    """Name in the tar of a split's n-th block."""
    return f"{block:06d}.tokens.npy"


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared set, after checking that every file it names is there and of the right size.

    Raises ValueError naming the file and what is wrong: no such folder, no manifest, a truncated or altered one,
    another format or version, a missing or truncated shard.
    """
    manifest = read_manifest(Path(folder))
    if problems := [p for split in manifest.splits.values() for s in split.shards if (p := size_problem(folder, s))]:
        raise ValueError(problems[0])
    if not Path(folder, TOKENIZER).is_file():
        raise ValueError(f"{Path(folder, TOKENIZER)}: missing; copy the set again or prepare it again")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json: the same bytes for the same manifest."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
    # Lists of numbers and objects of plain values on one line each: a member is a line, not five.
    text = re.sub(r"\[[\d,\s]+\]|\{[^{}\[\]]*\}", lambda found: re.sub(r"\n\s*", " ", found[0]), text)
    with Path(folder, MANIFEST).open("wb") as file:
        file.write(text.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def manifest_sha256(folder: Path) -> str:
    """Hex SHA-256 of the manifest file: the identity of a prepared set. Raises ValueError if it is not there."""
    return hashlib.sha256(_manifest_bytes(Path(folder))).hexdigest()


def read_block(folder: Path, manifest: Manifest, split: str, block: int) -> Tokens:
    """The block-th member of a split: an array (rows, seq_len + 1), little-endian uint16 or uint32.

    Raises ValueError naming shard and member if the bytes are not those that were written, IndexError if
    there is no such block.
    """
    first = 0
    for shard in manifest.splits[_split_name(manifest, split)].shards:
        if 0 <= block - first < len(shard.members):
            return _read_member(folder, manifest, shard, shard.members[block - first])
        first += len(shard.members)
    raise IndexError(f"block {block} of {split}, which has {first}")


def iter_documents(folder: Path, split: str) -> Iterator[list[int]]:
    """The token ids of every document of a split, in the order they went in, without eos.

    Raises ValueError as `load_manifest` and `read_block` do, and for a split that the set does not have.
    """
    manifest = load_manifest(folder)
    part = manifest.splits[_split_name(manifest, split)]
    open_document: list[int] = []
    first = True
    for ids in _stream(folder, manifest, part):
        start = 0
        for end in np.flatnonzero(ids == manifest.eos_id).tolist():
            open_document += ids[start:end].tolist()
            start = end + 1
            if not first:
                yield open_document
            open_document, first = [], False
        open_document += ids[start:].tolist()


class SplitWriter:
    """Packs a split's documents into rows and writes its tars: `add` as often as you like, then `finish`."""

    def __init__(self, folder: Path, split: SplitName, seq_len: int, dtype: str, eos_id: int, shard_bytes: int):
        self._folder, self._split, self._seq_len, self._shard_bytes = folder, split, seq_len, shard_bytes
        self._dtype = np.dtype("<u2" if dtype == "uint16" else "<u4")
        self._pending = [np.array([eos_id], self._dtype)]
        self._held = 1
        self._documents = self._text_bytes = self._blocks = 0
        self._shards: list[Shard] = []
        self._members: list[Member] = []
        self._file: _HashingFile | None = None
        self._tar: Any = None

    def add(self, ids: Tokens, documents: int, text_bytes: int) -> None:
        """Append documents: `ids` (n,) holds each one's tokens followed by eos. Raises OSError if writing fails."""
        self._pending.append(ids.astype(self._dtype, copy=False))
        self._held += len(ids)
        self._documents += documents
        self._text_bytes += text_bytes
        step = BLOCK_ROWS * self._seq_len
        if self._held > step:
            stream = np.concatenate(self._pending)
            start = 0
            while len(stream) - start > step:
                self._write_block(stream[start : start + step + 1])
                start += step
            self._pending = [stream[start:].copy()]
            self._held = len(stream) - start

    def finish(self) -> Split:
        """Write what is pending and close. Raises ValueError if there is not one whole row."""
        stream = np.concatenate(self._pending)
        rows = (len(stream) - 1) // self._seq_len
        if not rows and not self._blocks:
            raise ValueError(
                f"the {self._split} split has {len(stream) - 1} tokens in {self._documents} documents, "
                f"but one row needs {self._seq_len}; give more text, a smaller --seq-len, or "
                f"{'a smaller' if self._split == 'train' else 'a larger (or 0)'} --val-fraction"
            )
        if rows:
            self._write_block(stream[: rows * self._seq_len + 1])
        if self._tar:
            self._close_shard()
        all_rows = sum(shard.rows for shard in self._shards)
        tail = stream[rows * self._seq_len :].tolist()
        return Split(
            documents=self._documents,
            tokens=all_rows * self._seq_len + len(tail) - 1,
            text_bytes=self._text_bytes,
            rows=all_rows,
            tail=tuple(tail),
            shards=tuple(self._shards),
        )

    def abort(self) -> None:
        """Close an unfinished tar without writing to it; for use after an error, when nothing more may fail."""
        if self._file:
            self._file.discard()
        if self._tar:
            self._tar.close()

    def _write_block(self, stream: Tokens) -> None:
        """Write (rows * seq_len + 1,) tokens as one member of rows that overlap by one token."""
        rows = (len(stream) - 1) // self._seq_len
        shape, strides = (rows, self._seq_len + 1), (self._seq_len * stream.itemsize, stream.itemsize)
        block = np.ascontiguousarray(np.lib.stride_tricks.as_strided(stream, shape, strides, writeable=False))
        npy = io.BytesIO()
        np.lib.format.write_array(npy, block, version=(1, 0))
        header = len(npy.getvalue()) - block.nbytes
        if self._tar and self._tar.tarstream.offset + 2 * TAR_BLOCK + len(npy.getvalue()) > self._shard_bytes:
            self._close_shard()
        if not self._tar:
            self._open_shard()
        offset = self._tar.tarstream.offset + TAR_BLOCK + header
        name = member_name(self._blocks)
        key, extension = name.split(".", 1)
        self._tar.write({"__key__": key, extension: npy.getvalue()})
        self._members.append(Member(name=name, offset=offset, rows=rows, crc32=zlib.crc32(block.data)))
        self._blocks += 1

    def _open_shard(self) -> None:
        # Here, because webdataset imports torch where it is installed, and readers have no need of it.
        from webdataset.writer import TarWriter

        self._file = _HashingFile(self._folder / shard_name(self._split, len(self._shards)))
        self._tar = TarWriter(self._file, user="dnt", group="dnt", mode=0o444, mtime=0, compress=False, encoder=False)

    def _close_shard(self) -> None:
        assert self._file
        self._tar.close()
        self._file.close()
        rows = sum(member.rows for member in self._members)
        self._shards.append(
            Shard(
                file=shard_name(self._split, len(self._shards)),
                rows=rows,
                tokens=rows * self._seq_len,
                bytes=self._file.size,
                sha256=self._file.digest.hexdigest(),
                members=tuple(self._members),
            )
        )
        self._members, self._tar, self._file = [], None, None


class _HashingFile:
    """A new file that counts and hashes what goes through it."""

    def __init__(self, path: Path):
        self._file = path.open("xb")
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        if not self._file.closed:
            self._file.write(data)
            self.digest.update(data)
            self.size += len(data)
        return len(data)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        # What is still buffered may not fit the disk. The tar writer flushes once more, which `write` then ignores.
        with contextlib.suppress(OSError):
            self._file.close()


def size_problem(folder: Path, shard: Shard) -> str | None:
    """What is wrong with a shard's file, seen from outside: missing or of another size; else None."""
    path = Path(folder, shard.file)
    if not path.is_file():
        return f"{path}: missing; copy the set again or prepare it again"
    if (found := path.stat().st_size) != shard.bytes:
        kind = "truncated" if found < shard.bytes else "altered"
        return f"{path}: {kind}, {found} bytes where the manifest says {shard.bytes}; copy or prepare the set again"
    return None


def _read_member(folder: Path, manifest: Manifest, shard: Shard, member: Member) -> Tokens:
    path = Path(folder, shard.file)
    with path.open("rb") as file:
        file.seek(member.offset)
        raw = file.read(member.rows * manifest.row_bytes)
    if zlib.crc32(raw) != member.crc32:
        raise ValueError(f"{path}: {member.name} is damaged (CRC-32 differs); copy the set again or prepare it again")
    return np.frombuffer(raw, manifest.numpy_dtype).reshape(member.rows, manifest.seq_len + 1)


def _stream(folder: Path, manifest: Manifest, split: Split) -> Iterator[Tokens]:
    """The split's stream of tokens in parts, each once."""
    for shard in split.shards:
        for member in shard.members:
            yield _read_member(folder, manifest, shard, member)[:, :-1].ravel()
    yield np.array(split.tail, manifest.numpy_dtype)


def _split_name(manifest: Manifest, split: str) -> SplitName:
    for name in manifest.splits:
        if name == split:
            return name
    raise ValueError(f"split: found {split!r}, expected one of {', '.join(manifest.splits)}")


def _manifest_bytes(folder: Path) -> bytes:
    path = folder / MANIFEST
    try:
        return path.read_bytes()
    except OSError as error:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; expected one made by `dnt data prepare`") from error
        reason = "no manifest here" if isinstance(error, FileNotFoundError) else error.strerror
        raise ValueError(f"{path}: {reason}; expected a folder made by `dnt data prepare`") from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest by itself, without a look at the files beside it."""
    path = folder / MANIFEST
    raw = _manifest_bytes(folder)
    try:
        value = json.loads(raw.decode())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); copy the set again or prepare it again") from error
    found = (value.get("format"), value.get("version")) if isinstance(value, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise ValueError(
            f"{path}: found format {found[0]!r} version {found[1]!r}, expected {FORMAT!r} version {VERSION}; "
            "prepare the set again with this release"
        )
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        given = f" (found {first['input']!r:.60})" if where else ""
        raise ValueError(
            f"{path}: {f'{where}: ' if where else ''}{message}{given}; copy the set again or prepare it again"
        ) from error


def _same(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise ValueError(f"{what} is {found}, expected {expected}")
