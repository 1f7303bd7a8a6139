"""Read a set of shards again, every byte of it, and compare it with its manifest."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from data_prep.arrays import Tokens
from data_prep.files import sha256_of
from data_prep.shards import (
    FINGERPRINTS,
    MANIFEST,
    TAR_BLOCK,
    TOKENIZER,
    Manifest,
    Member,
    Shard,
    read_manifest,
    size_problem,
)


def verify(folder: Path, progress: Callable[[int], object] | None = None) -> list[str]:
    """Read everything again and compare it with the manifest; `progress` is told the bytes of each
    read.

    Checks the sizes and SHA-256 of the shards and the tokenizer; every member's name, place, shape,
    type and CRC; that ids lie in the vocabulary, rows overlap by one token, and the documents are
    as many as they should be. Returns the problems, a line each, naming the file and where possible
    the member; [] if it is whole.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    problems = list(check_file(folder / TOKENIZER, manifest.tokenizer.sha256))
    if manifest.fingerprints:
        problems += check_file(folder / FINGERPRINTS, manifest.fingerprints)
    for name, split in manifest.splits.items():
        check = _StreamCheck(manifest)
        bad = [
            p
            for shard in split.shards
            for p in _check_shard(folder, manifest, shard, check, progress)
        ]
        problems += bad
        if bad:
            continue
        if split.tail and check.last != split.tail[0]:
            problems.append(f"{MANIFEST}: splits.{name}.tail does not go on from the last row")
        # The stream has one eos in front and one after each document; rows count without their last
        # token.
        documents = check.documents + split.tail.count(manifest.eos_id) - bool(split.tail)
        if not split.tail and check.predicted != split.tokens:
            problems.append(
                f"{MANIFEST}: splits.{name}.tokens is {split.tokens}, the rows hold "
                f"{check.predicted}"
            )
        # In "best_fit" a document that ends with its row has no eos there.
        if documents > split.documents or (split.tail and documents < split.documents):
            problems.append(
                f"{MANIFEST}: splits.{name}.documents is {split.documents}, the rows hold "
                f"{documents}"
            )
    return problems


class _StreamCheck:
    """What `verify` carries from member to member: the last token seen, and the documents, which
    end in eos; in "best_fit", also the tokens that are predicted."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self.last: int | None = manifest.eos_id
        self.documents = self.predicted = 0

    def problem(self, rows: Tokens) -> str | None:
        """Take in the next rows (n, seq_len + 1); what is wrong with them, if anything."""
        last, self.last = self.last, int(rows[-1, -1])
        eos = rows == self.manifest.eos_id
        if (top := int(rows.max())) >= (size := self.manifest.tokenizer.vocab_size):
            return f"holds token id {top}, expected less than {size}"
        if self.manifest.packing == "best_fit":
            padding = eos[:, 1:] & eos[:, :-1]
            self.documents += int(np.count_nonzero(eos[:, 1:] & ~padding))
            self.predicted += int(np.count_nonzero(~padding))
            if not eos[:, 0].all():
                return f"row {int(np.flatnonzero(~eos[:, 0])[0])} does not begin with eos"
            if (padding[:, :-1] & ~padding[:, 1:]).any():
                return "holds a document after the padding"
            return None
        self.documents += int(np.count_nonzero(eos[:, :-1]))
        if last is not None and rows[0, 0] != last:
            return "its first row does not begin with the last token before it"
        if (rows[1:, 0] != rows[:-1, -1]).any():
            row = int(np.flatnonzero(rows[1:, 0] != rows[:-1, -1])[0]) + 1
            return f"row {row} does not begin with the last token of the row before"
        return None


def check_file(path: Path, sha256: str) -> Iterator[str]:
    """Yield what is wrong with a file that should have this SHA-256, if anything."""
    if not path.is_file():
        yield f"{path}: missing"
        return
    if (found := sha256_of(path)) != sha256:
        yield f"{path}: SHA-256 is {found[:12]}..., the manifest says {sha256[:12]}..."


def _check_shard(
    folder: Path,
    manifest: Manifest,
    shard: Shard,
    check: _StreamCheck,
    progress: Callable[[int], object] | None,
) -> Iterator[str]:
    path = folder / shard.file
    if problem := size_problem(folder, shard):
        yield problem
        if not path.is_file():
            check.last = None
            return
    digest = hashlib.sha256()

    def read(file: IO[bytes], size: int) -> bytes:
        raw = file.read(size)
        digest.update(raw)
        if progress:
            progress(len(raw))
        return raw

    problems = 0
    try:
        with path.open("rb") as file:
            for problem in _check_members(partial(read, file), manifest, shard, check):
                problems += 1
                yield f"{path}: {problem}"
            if check.last is None:
                return
            padding = read(file, -1)
            if padding.strip(b"\0") or len(padding) < 2 * TAR_BLOCK:
                problems += 1
                last = shard.members[-1].name
                yield f"{path}: the end-of-archive mark after {last} is damaged"
    except OSError as error:
        yield f"{path}: cannot be read: {error.strerror}"
        check.last = None
        return
    # Where a member is known to be damaged, the whole file's hash says no more.
    if digest.hexdigest() != shard.sha256 and not problems:
        found, expected = digest.hexdigest()[:12], shard.sha256[:12]
        yield f"{path}: SHA-256 is {found}..., the manifest says {expected}..."


def _check_members(
    read: Callable[[int], bytes], manifest: Manifest, shard: Shard, check: _StreamCheck
) -> Iterator[str]:
    """Yield what is wrong with the members of a tar, given what reads on in it. Where the file ends
    inside of one it is the last, and `check.last` is None afterwards."""
    position = 0
    for member in shard.members:
        end = member.offset + member.rows * manifest.row_bytes
        end += -end % TAR_BLOCK
        raw = read(end - position)
        if len(raw) < end - position:
            yield f"{member.name}: the file ends inside it"
            check.last = None
            return
        if problem := _check_member(raw, member.offset - position, manifest, member, check):
            yield f"{member.name}: {problem}"
        position = end


def _check_member(
    raw: bytes, start: int, manifest: Manifest, member: Member, check: _StreamCheck
) -> str | None:
    """Return what is wrong with a member, given its bytes in the tar, of which the rows begin at
    `start`."""
    size = member.rows * manifest.row_bytes
    data = raw[start : start + size]
    rows = np.frombuffer(data, manifest.numpy_dtype).reshape(member.rows, manifest.seq_len + 1)
    stream_problem = check.problem(rows)
    try:
        header = tarfile.TarInfo.frombuf(raw[:TAR_BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"its tar header is damaged ({error})"
    if header.name != member.name or header.size != start - TAR_BLOCK + size or not header.isreg():
        return f"its tar header tells of {header.name!r}, {header.size} bytes"
    npy = io.BytesIO(raw[TAR_BLOCK:start])
    try:
        np.lib.format.read_magic(npy)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(npy)
    except Exception as error:  # what numpy raises for a damaged header is not documented
        return f"its .npy header is damaged ({type(error).__name__})"
    if (shape, fortran, dtype, npy.tell()) != (rows.shape, False, rows.dtype, start - TAR_BLOCK):
        return f"its .npy header tells of {dtype} {shape}, expected {rows.dtype} {rows.shape}"
    if zlib.crc32(data) != member.crc32:
        return (
            f"its rows are altered: CRC-32 is {zlib.crc32(data)}, the manifest says {member.crc32}"
        )
    return stream_problem
