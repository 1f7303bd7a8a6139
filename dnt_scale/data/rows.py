"""Rows of token ids out of shard files, by offset."""

import os
import resource
from collections.abc import Iterable
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from data_prep.shards import Manifest, SplitName
from dnt_scale.data.order import WINDOW_BLOCKS, Ints
from dnt_scale.data.token_sets import TokenSet
from dnt_scale.model.batch import IGNORED

Bytes = npt.NDArray[np.uint8]


OPEN_FILES = 2 * WINDOW_BLOCKS  # that a set has use for: a window and the one before it


class ShardError(ValueError):
    """A shard changed while it was being read; the message names it."""


class OpenFiles:
    """Files open for reading, by path, ``most`` at a time: one more, and the one that was opened
    first is closed.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.descriptors: dict[str, int] = {}

    def open(self, path: str) -> int:
        """The descriptor of a file. Raises OSError if it cannot be opened."""
        if (found := self.descriptors.get(path)) is not None:
            return found
        if len(self.descriptors) >= self.most:
            os.close(self.descriptors.pop(next(iter(self.descriptors))))
        self.descriptors[path] = os.open(path, os.O_RDONLY)
        return self.descriptors[path]

    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()


def files_for(sets: int) -> int:
    """How many shards a stream of so many sets keeps open: what they have use for, within half of
    what the process may open at all. That limit, often 1024, is raised where the system lets us."""
    wanted = sets * OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < 2 * wanted:  # -1 is no limit
        with suppress(ValueError, OSError):  # then it stays as it is
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (2 * wanted if hard < 0 else min(2 * wanted, hard), hard)
            )
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft < 0 else max(1, min(wanted, soft // 2))


class RowReader:
    """Rows of one split by (block, row), with one pread each, through ``files``."""

    def __init__(self, source: TokenSet, split: SplitName, files: OpenFiles) -> None:
        shards = source.manifest.splits[split].shards
        self.row_bytes = source.manifest.row_bytes
        self.paths = [str(source.folder / shard.file) for shard in shards]
        self.shards: Ints = np.repeat(
            np.arange(len(shards)), [len(shard.members) for shard in shards]
        )
        self.offsets: Ints = np.array(
            [member.offset for shard in shards for member in shard.members], dtype=np.int64
        )
        self.files = files

    def read(self, blocks: Ints, rows: Ints, places: Iterable[memoryview]) -> None:
        """Read each row into its place, of row_bytes bytes, as it stands in the shard.

        Raises:
            ShardError: a shard ends before the row, naming it.
        """
        positions = self.offsets[blocks] + rows * self.row_bytes
        wanted = zip(self.shards[blocks].tolist(), positions.tolist(), places, strict=True)
        for index, (shard, position, place) in enumerate(wanted):
            got = os.preadv(self.files.open(self.paths[shard]), [place], position)
            if got != self.row_bytes:
                raise ShardError(
                    f"{self.paths[shard]}: ends inside block {blocks[index]}, row {rows[index]} "
                    f"({got} of {self.row_bytes} bytes); it was truncated while in use: restore it "
                    "and check with `dnt data verify`"
                )


def token_ids(raw: Bytes, manifest: Manifest, padded: npt.NDArray[np.bool_]) -> Ints:
    """Rows as they stand in shards to int64 token ids (rows, seq_len + 1), ``IGNORED`` for padding.

    Args:
        raw: uint8 (rows, row_bytes).
        padded: bool (rows,), whether a row is of packing "best_fit", where an eos after an eos is
            padding.
    """
    ids = raw.view(manifest.numpy_dtype)
    tokens = ids.astype(np.int64)
    if padded.any():
        eos = ids == manifest.eos_id
        tokens[:, 1:][eos[:, 1:] & eos[:, :-1] & padded[:, None]] = IGNORED
    return tokens
