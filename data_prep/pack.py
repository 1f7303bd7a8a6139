"""Chunks become shards: the documents that stay, packed into rows, each tar written by itself.

1. Every chunk contributes tokens to each split: "concat" its documents, each followed by eos;
"best_fit" whole rows. 2. The contributions one after the other are the split's stream. Row r begins
at token r * stride of it. 3. So a shard is a function of its number, any process can write it, and
one that is there need not be written again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep import shards
from data_prep.arrays import Flags, Lengths, Tokens
from data_prep.chunks import Chunk
from data_prep.files import write_whole
from data_prep.set_files import shard_name
from data_prep.shards import BLOCK_ROWS, Packing, Shard, SplitName


class StreamSlice(NamedTuple):
    """What one file gives to a split's stream: a chunk, whose documents have numbers from `first`
    on among all, or a .npy of tokens. `tokens` is how many."""

    path: Path
    first: int
    tokens: int


@dataclass(frozen=True)
class Layout:
    """How a set's rows are made. `keep` is a .npy of bool, a document each, or None where all
    stay."""

    packing: Packing
    seq_len: int
    eos_id: int
    dtype: str
    shard_bytes: int
    keep: Path | None

    @property
    def stride(self) -> int:
        """Return the tokens from a row's start to the next one's: rows overlap by one token in
        "concat"."""
        return self.seq_len + (self.packing == "best_fit")

    @property
    def overlap(self) -> int:
        return self.seq_len + 1 - self.stride

    def rows(self, stream_tokens: int) -> int:
        """Return how many whole rows are in a stream."""
        return max(0, stream_tokens - self.overlap) // self.stride

    def shard_rows(self) -> int:
        """Return how many rows are in every shard but the last."""
        row_bytes = (self.seq_len + 1) * np.dtype(self.dtype).itemsize
        return BLOCK_ROWS * shards.blocks_per_shard(row_bytes, self.shard_bytes)


class ShardJob(NamedTuple):
    """A shard to write: `rows` rows that begin `skip` tokens into the first of `parts`."""

    path: Path
    split: SplitName
    first_block: int
    rows: int
    parts: tuple[StreamSlice, ...]
    skip: int


def which_stay(layout: Layout, first: int, documents: int) -> Flags:
    """Return which of the documents from number `first` on stay: bool (documents,)."""
    if layout.keep is None:
        return np.ones(documents, bool)
    return np.array(np.load(layout.keep, mmap_mode="r")[first : first + documents])


def slice_size(layout: Layout, lengths: Lengths) -> int:
    """Return how many tokens documents of these lengths (n,), eos included, give to a stream."""
    if layout.packing == "concat":
        return int(lengths.sum(dtype=np.int64))
    return len(best_fit(lengths, layout.seq_len)) * (layout.seq_len + 1)


def shard_jobs(
    layout: Layout,
    folder: Path,
    split: SplitName,
    parts: Sequence[StreamSlice],
    first_shard: int,
    first_block: int,
) -> list[ShardJob]:
    """Return the shards of a stream, numbered from `first_shard` on, to be written in `folder`."""
    ends = np.cumsum([part.tokens for part in parts], dtype=np.int64)
    rows = layout.rows(int(ends[-1]))
    jobs = []
    for number, first in enumerate(range(0, rows, layout.shard_rows())):
        count = min(layout.shard_rows(), rows - first)
        start = first * layout.stride
        low = int(np.searchsorted(ends, start, side="right"))
        high = (
            int(np.searchsorted(ends, start + count * layout.stride + layout.overlap, side="left"))
            + 1
        )
        jobs.append(
            ShardJob(
                path=folder / shard_name(split, first_shard + number),
                split=split,
                first_block=first_block + first // BLOCK_ROWS,
                rows=count,
                parts=tuple(parts[low:high]),
                skip=start - int(ends[low] - parts[low].tokens),
            )
        )
    return jobs


def shard_writer(layout: Layout) -> Callable[[ShardJob], Shard]:
    """Return a function for `ordered_map` that writes a job's tar, with its record beside it,
    unless both are there already."""

    def write(job: ShardJob) -> Shard:
        record = job.path.with_suffix(".json")
        if record.exists() and job.path.exists():
            shard = Shard.model_validate_json(record.read_bytes())
            if job.path.stat().st_size == shard.bytes:
                return shard
        made: list[Shard] = []
        job.path.unlink(missing_ok=True)
        write_whole(
            job.path,
            lambda beside: made.append(
                shards.write_shard(beside, job.path.name, _blocks(layout, job), job.first_block)
            ),
        )
        write_whole(record, lambda beside: beside.write_text(made[0].model_dump_json()))
        return made[0]

    return write


def tail(layout: Layout, split: SplitName, parts: Sequence[StreamSlice]) -> Tokens:
    """Return what is left of a "concat" stream after its last whole row, from that row's last token
    on."""
    left = sum(part.tokens for part in parts)
    left -= layout.rows(left) * layout.stride
    taken: list[Tokens] = []
    for part in reversed(parts):
        if left <= 0:
            break
        tokens = slice_tokens(layout, split, part)
        taken.append(tokens[max(0, len(tokens) - left) :])
        left -= len(taken[-1])
    return np.concatenate(taken[::-1])


def slice_tokens(layout: Layout, split: SplitName, part: StreamSlice) -> Tokens:
    """Return the tokens (part.tokens,) that a slice gives to its split's stream. Raises ValueError
    if its file is damaged."""
    if part.path.suffix == ".npy":
        given: Tokens = np.load(part.path, allow_pickle=False)
        return given
    ids, held, lengths = Chunk(part.path).read(f"{split}_ids", "held", "lengths")
    here = held == (split == "val")
    lengths, keep = lengths[here], which_stay(layout, part.first, len(held))[here]
    if not keep.all():
        ids, lengths = ids[np.repeat(keep, lengths)], lengths[keep]
    if layout.packing == "concat":
        return ids
    rows = best_fit(lengths, layout.seq_len)
    packed = np.full((len(rows), layout.seq_len + 1), layout.eos_id, ids.dtype)
    for row, pieces in zip(packed, rows, strict=True):
        at = 1
        for start, stop in pieces:
            row[at : at + stop - start] = ids[start:stop]
            at += stop - start
    return packed.ravel()


def predicted_tokens(layout: Layout, lengths: Lengths) -> int:
    """Return how many tokens a model predicts of documents of these lengths (n,), eos included."""
    total = int(lengths.sum(dtype=np.int64))
    if layout.packing == "best_fit":
        total -= int(np.count_nonzero((lengths - 1) % layout.seq_len == 0))
    return total


def best_fit(lengths: Lengths, seq_len: int) -> list[list[tuple[int, int]]]:
    """Return rows of at most `seq_len` tokens, each a list of (start, stop) in the documents one
    after the other.

    Best-fit decreasing: the longest first, each into the row that it leaves least room in (Ding et
    al. 2024, "Fewer truncations improve language modeling", arXiv 2404.10830, algorithm 1).
    Documents longer than a row are cut into pieces of seq_len first; where nothing but the eos
    would be left for a last piece, it is left out (the next row begins with one, and an eos after
    an eos would be padding).
    """
    rows: list[list[tuple[int, int]]] = []
    rest: list[tuple[int, int]] = []
    stop = 0
    for length in lengths.tolist():
        start, stop = stop, stop + length
        while stop - start > seq_len:
            rows.append([(start, start + seq_len)])
            start += seq_len
        if stop - start > 1:
            rest.append((start, stop))
    rest.sort(key=lambda piece: piece[0] - piece[1])
    with_room: list[list[list[tuple[int, int]]]] = [[] for _ in range(seq_len + 1)]
    rooms = 0  # bit r is set where a row has room for r more tokens
    for start, stop in rest:
        size = stop - start
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = seq_len, []
            rows.append(row)
        row.append((start, stop))
        with_room[room - size].append(row)
        rooms |= 1 << (room - size)
    return rows


def _blocks(layout: Layout, job: ShardJob) -> Iterator[Tokens]:
    """Yield the job's rows as arrays (up to BLOCK_ROWS, seq_len + 1)."""
    stride, overlap, left = layout.stride, layout.overlap, job.rows
    pending = np.empty(0, layout.dtype)
    skip = job.skip
    for part in job.parts:
        pending = np.concatenate([pending, slice_tokens(layout, job.split, part)[skip:]])
        skip = 0
        while left and len(pending) >= (count := min(left, BLOCK_ROWS)) * stride + overlap:
            shape, strides = (
                (count, layout.seq_len + 1),
                (stride * pending.itemsize, pending.itemsize),
            )
            yield np.lib.stride_tricks.as_strided(pending, shape, strides, writeable=False)
            pending = pending[count * stride :]
            left -= count
    assert not left, f"{job.path}: {left} rows short"
