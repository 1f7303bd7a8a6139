"""THE FORMAT: token rows in plain WebDataset tars beside a manifest that can prove them whole.

Packing "concat": a split's stream of tokens is `eos doc eos doc eos ... doc eos`. Row i is
`stream[i*seq_len : (i+1)*seq_len + 1]`, so a row's last token is the next row's first and every
token after the first is predicted exactly once. What is left after the last whole row is the
split's `tail` in the manifest.

Packing "best_fit": a row is `eos`, whole documents each followed by eos, and further eos as
padding. A document that is longer than a row is cut into pieces of seq_len tokens, of which all but
the last fill a row each. So an eos after an eos is padding, which is not predicted; every other
token after a row's first is predicted exactly once.
"""

import contextlib
import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from data_prep.arrays import Tokens
from data_prep.set_files import MANIFEST as MANIFEST
from data_prep.set_files import PARTIAL as PARTIAL
from data_prep.set_files import TAR_BLOCK as TAR_BLOCK
from data_prep.set_files import (
    Count,
    HashingFile,
    Positive,
    SetModel,
    Sha256,
    check_equal,
    file_problem,
    new_tar,
    padded,
    read_manifest_as,
    shard_name,
    tar_header,
)
from data_prep.set_files import SplitName as SplitName
from data_prep.set_files import manifest_sha256 as manifest_sha256
from data_prep.set_files import write_manifest as write_manifest

FORMAT = "dnt-shards"
VERSION = 1
TOKENIZER = "tokenizer.model"
FINGERPRINTS = "fingerprints.npy"
BLOCK_ROWS = 512
NPY_HEADER = 128

Packing = Literal["concat", "best_fit"]
Dedup = Literal["none", "exact", "near"]


class Member(SetModel):
    """A block of rows in a tar: `offset` is the byte of row 0, `crc32` that of the rows' bytes."""

    name: Annotated[str, Field(pattern=r"^\d{6,}\.tokens\.npy$")]
    offset: Positive
    rows: Positive
    crc32: Count


class Shard(SetModel):
    """One tar file; `tokens` are the predicted ones, rows * seq_len."""

    file: Annotated[str, Field(pattern=r"^(train|val)-\d{6,}\.tar$")]
    rows: Positive
    tokens: Positive
    bytes: Positive
    sha256: Sha256
    members: tuple[Member, ...]


class Split(SetModel):
    """Train or val: `tokens` are predicted ones. In "concat", `rows * seq_len` of them are in rows,
    the rest in `tail`; in "best_fit" all are in rows, beside padding, and `tail` is empty."""

    documents: Positive
    tokens: Positive
    text_bytes: Positive
    rows: Positive
    tail: tuple[Count, ...]
    shards: tuple[Shard, ...]


class TokenizerInfo(SetModel):
    """`round_trip` is whether a sample of the corpus decoded to exactly the text that went in."""

    file: Literal["tokenizer.model"]
    sha256: Sha256
    vocab_size: Positive
    round_trip: bool


class SourceInfo(SetModel):
    """One INPUT: the documents that stayed; how many of those read held broken UTF-8 (`replaced`)
    or were `empty`, were `dropped` by which cleaning rule or finding, or were `duplicates`; and the
    SHA-256 of the cleaning `rules`."""

    name: str
    documents: Count
    text_bytes: Count
    replaced: Count
    empty: Count
    text_field: str = "text"
    dropped: dict[str, Count] = Field(default_factory=dict)
    duplicates: Count = 0
    rules: Sha256 | None = None


class Options(SetModel):
    """The options that decide the bytes; the first three are null for a tokenizer that was
    given."""

    vocab_size: Positive | None
    kind: Literal["bpe", "unigram"] | None
    sample_bytes: Positive | None
    val_fraction: Annotated[float, Field(ge=0, lt=1)]
    shard_bytes: Positive
    dedup: Dedup = "none"


class Manifest(SetModel):
    """manifest.json: everything about a prepared set; its numbers are checked against one
    another."""

    format: Literal["dnt-shards"]
    version: Literal[1]
    dtype: Literal["uint16", "uint32"]
    seq_len: Positive
    packing: Packing = "concat"
    tokenizer: TokenizerInfo
    eos_id: Count
    options: Options
    sources: tuple[SourceInfo, ...]
    fingerprints: Sha256 | None = None
    splits: dict[SplitName, Split]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Return little-endian uint16 or uint32."""
        return np.dtype("<u2" if self.dtype == "uint16" else "<u4")

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row of seq_len + 1 tokens: row r of a member starts at `offset +
        r * row_bytes`."""
        return (self.seq_len + 1) * self.numpy_dtype.itemsize

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        vocab_size = self.tokenizer.vocab_size
        check_equal("dtype", self.dtype, dtype_for(vocab_size))
        if self.eos_id >= vocab_size:
            raise ValueError(
                f"eos_id is {self.eos_id}, expected less than the vocabulary's {vocab_size}"
            )
        if "train" not in self.splits:
            raise ValueError('splits has no "train"')
        for name, split in self.splits.items():
            self._check_split(name, split)
        for field in ("documents", "text_bytes"):
            found = sum(getattr(split, field) for split in self.splits.values())
            check_equal(
                f"{field} in splits", found, sum(getattr(source, field) for source in self.sources)
            )
        return self

    def _check_split(self, name: str, split: Split) -> None:
        block = 0
        for number, shard in enumerate(split.shards):
            where = f"splits.{name}.shards.{number}"
            check_equal(f"{where}.file", shard.file, shard_name(name, number))
            check_equal(f"{where}.rows", shard.rows, sum(member.rows for member in shard.members))
            check_equal(f"{where}.tokens", shard.tokens, shard.rows * self.seq_len)
            end = 0
            for member in shard.members:
                check_equal(f"{where}.members name", member.name, member_name(block))
                if member.offset < end + TAR_BLOCK:
                    raise ValueError(
                        f"{where}: {member.name} at {member.offset} lies on the one before"
                    )
                end = member.offset + member.rows * self.row_bytes
                block += 1
            if end > shard.bytes:
                raise ValueError(
                    f"{where}: its members end at {end}, beyond its {shard.bytes} bytes"
                )
        members = [member for shard in split.shards for member in shard.members]
        check_equal(f"splits.{name}.rows", split.rows, sum(member.rows for member in members))
        for member in members[:-1]:
            check_equal(f"splits.{name}: rows of {member.name}", member.rows, BLOCK_ROWS)
        if self.packing == "best_fit":
            check_equal(f"splits.{name}.tail", split.tail, ())
            if not split.tokens <= split.rows * self.seq_len:
                raise ValueError(
                    f"splits.{name}.tokens is {split.tokens}, more than its {split.rows} rows hold"
                )
            return
        check_equal(
            f"splits.{name}.tokens", split.tokens, split.rows * self.seq_len + len(split.tail) - 1
        )
        if not 1 <= len(split.tail) <= self.seq_len:
            raise ValueError(
                f"splits.{name}.tail has {len(split.tail)} tokens, expected 1 to {self.seq_len}"
            )
        if max(split.tail) >= self.tokenizer.vocab_size:
            raise ValueError(f"splits.{name}.tail holds {max(split.tail)}, beyond the vocabulary")


def dtype_for(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Return the narrower of the two that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def member_name(block: int) -> str:
    """Return the name in the tar of a split's n-th block."""
    return f"{block:06d}.tokens.npy"


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a prepared set, and check that every file it names is there and of the
    right size.

    Raises ValueError naming the file and what is wrong: no such folder, no manifest, a truncated or
    altered one, another format or version, a missing or truncated shard.
    """
    manifest = read_manifest(Path(folder))
    if problems := [
        p
        for split in manifest.splits.values()
        for s in split.shards
        if (p := size_problem(folder, s))
    ]:
        raise ValueError(problems[0])
    if not Path(folder, TOKENIZER).is_file():
        raise ValueError(
            f"{Path(folder, TOKENIZER)}: missing; copy the set again or prepare it again"
        )
    return manifest


def read_block(folder: Path, manifest: Manifest, split: str, block: int) -> Tokens:
    """Read the block-th member of a split: an array (rows, seq_len + 1), little-endian uint16 or
    uint32.

    Raises ValueError naming shard and member if the bytes are not those that were written,
    IndexError if there is no such block.
    """
    first = 0
    for shard in manifest.splits[_split_name(manifest, split)].shards:
        if 0 <= block - first < len(shard.members):
            return _read_member(folder, manifest, shard, shard.members[block - first])
        first += len(shard.members)
    raise IndexError(f"block {block} of {split}, which has {first}")


def iter_documents(folder: Path, split: str) -> Iterator[list[int]]:
    """Yield the token ids of every document of a split, without eos: "concat" in the order they
    went in, "best_fit" in the order of the rows and longer ones than a row in pieces.

    Raises ValueError as `load_manifest` and `read_block` do, and for a split that the set does not
    have.
    """
    manifest = load_manifest(folder)
    part = manifest.splits[_split_name(manifest, split)]
    if manifest.packing == "best_fit":
        for shard in part.shards:
            for member in shard.members:
                for row in _read_member(folder, manifest, shard, member):
                    ends = np.flatnonzero(row == manifest.eos_id)
                    yield from (
                        ids.tolist()
                        for a in np.split(row, ends)
                        if len(ids := a[a != manifest.eos_id])
                    )
        return
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


def blocks_per_shard(row_bytes: int, shard_bytes: int) -> int:
    """Return how many whole blocks of BLOCK_ROWS rows fit a tar of `shard_bytes`; at least one."""
    member = TAR_BLOCK + padded(NPY_HEADER + BLOCK_ROWS * row_bytes)
    return max(1, (shard_bytes - TAR_BLOCK) // member)


def write_shard(path: Path, name: str, blocks: Iterable[Tokens], first_block: int) -> Shard:
    """Write the tar `name`, for now at `path`: blocks (rows, seq_len + 1) of uint16 or uint32,
    numbered from `first_block`; fsynced.

    The bytes are those that `webdataset.TarWriter` writes (a test compares them), and depend on the
    arguments alone. Raises OSError if writing fails, FileExistsError if the file is there.
    """
    members: list[Member] = []
    with contextlib.closing(HashingFile(path)) as file:
        tar = new_tar(file)
        for number, block in enumerate(blocks, first_block):
            little = np.ascontiguousarray(block, block.dtype.newbyteorder("<"))
            npy = io.BytesIO()
            np.lib.format.write_array(npy, little, version=(1, 0))
            info = tar_header(member_name(number), npy.tell())
            offset = tar.offset + TAR_BLOCK + npy.tell() - little.nbytes
            tar.addfile(info, io.BytesIO(npy.getbuffer()))
            crc32 = zlib.crc32(little.data)
            members.append(Member(name=info.name, offset=offset, rows=len(little), crc32=crc32))
        tar.close()
        file.sync()
    rows = sum(member.rows for member in members)
    return Shard(
        file=name,
        rows=rows,
        tokens=rows * (little.shape[1] - 1),
        bytes=file.size,
        sha256=file.digest.hexdigest(),
        members=tuple(members),
    )


def size_problem(folder: Path, shard: Shard) -> str | None:
    """Return what is wrong with a shard's file, seen from outside; else None."""
    return file_problem(Path(folder, shard.file), shard.bytes)


def _read_member(folder: Path, manifest: Manifest, shard: Shard, member: Member) -> Tokens:
    path = Path(folder, shard.file)
    with path.open("rb") as file:
        file.seek(member.offset)
        raw = file.read(member.rows * manifest.row_bytes)
    if zlib.crc32(raw) != member.crc32:
        raise ValueError(
            f"{path}: {member.name} is damaged (CRC-32 differs); copy the set again or prepare it "
            "again"
        )
    return np.frombuffer(raw, manifest.numpy_dtype).reshape(member.rows, manifest.seq_len + 1)


def _stream(folder: Path, manifest: Manifest, split: Split) -> Iterator[Tokens]:
    """Yield the stream of tokens of a split of packing "concat" in parts, each once."""
    for shard in split.shards:
        yield from shard_stream(folder, manifest, shard)
    yield np.array(split.tail, manifest.numpy_dtype)


def shard_stream(folder: Path, manifest: Manifest, shard: Shard) -> Iterator[Tokens]:
    """Yield a shard's tokens, a block at a time and each once: "concat" without the last of a row,
    which is in the next."""
    for member in shard.members:
        rows = _read_member(folder, manifest, shard, member)
        yield (rows[:, :-1] if manifest.packing == "concat" else rows).ravel()


def _split_name(manifest: Manifest, split: str) -> SplitName:
    for name in manifest.splits:
        if name == split:
            return name
    raise ValueError(f"split: found {split!r}, expected one of {', '.join(manifest.splits)}")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest by itself, without a look at the files beside it. Raises ValueError."""
    return read_manifest_as(Manifest, folder, FORMAT, VERSION)
