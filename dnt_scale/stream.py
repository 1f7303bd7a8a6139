"""Shards in, batches out. The order is a pure function; the whole state is one integer, ``consumed_rows``.

1. An epoch visits every row of a split once. Its blocks (tar members of up to 512 rows) are permuted.
2. ``WINDOW_BLOCKS`` consecutive blocks of that permutation form a window, whose rows are permuted.
3. Position p of the endless sequence is row p mod rows of epoch p div rows: ``row_at``.
4. Global batch k is positions [k B, (k+1) B). Rank r takes the r-th of ``world_size`` equal slices of it.
5. A thread reads rows by offset ahead of the training step.

Both permutations are argsorts of Philox output keyed by (seed, epoch, window): numpy keeps a bit generator's
raw stream fixed across versions, and no global generator is touched.
"""

import os
import queue
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.shards import Manifest, Split, SplitName
from dnt_scale.model import IGNORED

Ints = npt.NDArray[np.int64]

WINDOW_BLOCKS = 64
PREFETCH_BATCHES = 4


def permutation(size: int, seed: int, epoch: int, part: int) -> Ints:
    """A permutation of range(size), int64, that depends on nothing but the arguments."""
    key = np.array([seed, epoch << 32 | part], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


class ShardError(ValueError):
    """A shard changed while it was being read; the message names it."""


class Order:
    """Positions of the endless training sequence to rows of a split; see the module's steps 1 to 3."""

    def __init__(self, split: Split, seed: int) -> None:
        self.block_rows: Ints = np.array(
            [member.rows for shard in split.shards for member in shard.members], dtype=np.int64
        )
        self.rows = int(self.block_rows.sum())
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)
        self._window = lru_cache(maxsize=4)(self._plan_window)

    def _plan_epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """The blocks in their order, and the first position of each window plus the end."""
        blocks = permutation(len(self.block_rows), self.seed, epoch, 0)
        ends = np.cumsum(self.block_rows[blocks])
        starts = np.concatenate(([0], ends[WINDOW_BLOCKS - 1 : -1 : WINDOW_BLOCKS], ends[-1:]))
        return blocks, starts

    def _plan_window(self, epoch: int, window: int) -> tuple[Ints, Ints]:
        """Block and row-in-block of every position in the window."""
        blocks, _ = self._epoch(epoch)
        blocks = blocks[window * WINDOW_BLOCKS : (window + 1) * WINDOW_BLOCKS]
        sizes = self.block_rows[blocks]
        block_of = np.repeat(blocks, sizes)
        row_of = np.arange(len(block_of)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        shuffled = permutation(len(block_of), self.seed, epoch, 1 + window)
        return block_of[shuffled], row_of[shuffled]

    def row_at(self, position: int) -> tuple[int, int]:
        """(block, row in block) at ``position``, counted from the beginning of training."""
        epoch, inside = divmod(position, self.rows)
        _, starts = self._epoch(epoch)
        window = int(np.searchsorted(starts, inside, side="right")) - 1
        block_of, row_of = self._window(epoch, window)
        offset = inside - int(starts[window])
        return int(block_of[offset]), int(row_of[offset])


def row_at(manifest: Manifest, seed: int, position: int) -> tuple[int, int]:
    """The order contract as one pure function: (block, row in block) of the training split."""
    return Order(manifest.splits["train"], seed).row_at(position)


class RowReader:
    """Rows of one split by (block, row), with one pread each; keeps the shards' files open."""

    def __init__(self, folder: Path, manifest: Manifest, split: SplitName) -> None:
        self.row_tokens = manifest.seq_len + 1
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self.paths = [folder / shard.file for shard in manifest.splits[split].shards]
        self.blocks = [
            (index, member.offset)
            for index, shard in enumerate(manifest.splits[split].shards)
            for member in shard.members
        ]
        self.files: dict[int, int] = {}

    def read(self, rows: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
        """Token ids, int64, shape (len(rows), seq_len + 1).

        Raises:
            ShardError: a shard ends before the row, naming it.
        """
        out = np.empty((len(rows), self.row_tokens), dtype=self.dtype)
        for index, (block, row) in enumerate(rows):
            shard, offset = self.blocks[block]
            if shard not in self.files:
                self.files[shard] = os.open(self.paths[shard], os.O_RDONLY)
            position = offset + row * out[index].nbytes
            got = os.preadv(self.files[shard], [out[index].data], position)
            if got != out[index].nbytes:
                raise ShardError(
                    f"{self.paths[shard]}: ends inside block {block}, row {row} ({got} of {out[index].nbytes} bytes); "
                    "it was truncated while in use: restore it and check with `dnt data verify`"
                )
        return out.astype(np.int64)

    def close(self) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)
        self.files.clear()


class Stream:
    """This rank's slice of every global batch from ``consumed_rows`` on, read ahead by a thread.

    Iterating yields ``(tokens, consumed_rows)``: int64 tokens of shape (global_batch / world_size, seq_len + 1)
    and the state to store once the batch is trained on. Use it as a context manager: leaving stops the thread.

    Raises:
        ValueError: the global batch does not divide by the ranks; ShardError while iterating.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        seed: int,
        global_batch: int,
        rank: int,
        world_size: int,
        consumed_rows: int = 0,
    ) -> None:
        if global_batch % world_size:
            raise ValueError(
                f"train.global_batch is {global_batch}, not divisible by {world_size} ranks; "
                f"use a multiple of {world_size}"
            )
        self.order = Order(manifest.splits["train"], seed)
        self.reader = RowReader(folder, manifest, "train")
        self.global_batch = global_batch
        self.rows_a_rank = global_batch // world_size
        self.offset = rank * self.rows_a_rank
        self.consumed_rows = consumed_rows
        self.queue: queue.Queue[tuple[Tensor, int] | Exception] = queue.Queue(PREFETCH_BATCHES)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._fill, name="stream", daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        while self.thread.is_alive():  # it may wait for room in the queue
            try:
                self.queue.get_nowait()
            except queue.Empty:
                self.thread.join(timeout=0.01)
        self.reader.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Tensor, int]:
        item = self.queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def _fill(self) -> None:
        consumed = self.consumed_rows
        try:
            while not self.stopping.is_set():
                first = consumed + self.offset
                rows = [self.order.row_at(position) for position in range(first, first + self.rows_a_rank)]
                consumed += self.global_batch
                self.queue.put((torch.from_numpy(self.reader.read(rows)), consumed))
        except Exception as error:
            self.queue.put(error)


def validation_batches(
    folder: Path, manifest: Manifest, *, rows: int, micro_batch: int, rank: int, world_size: int
) -> Iterator[Tensor]:
    """``rows`` validation rows, evenly spread over the split, dealt to the ranks micro-batch by micro-batch.

    Every rank gets the same number of batches of shape (micro_batch, seq_len + 1), int64, as the engines' collectives
    need; places past the end hold ``IGNORED`` and do not count in the loss.
    """
    block_ends = np.cumsum(Order(manifest.splits["val"], 0).block_rows)
    chosen = np.arange(min(rows, block_ends[-1])) * block_ends[-1] // min(rows, block_ends[-1])
    blocks = np.searchsorted(block_ends, chosen, side="right")
    firsts = np.concatenate(([0], block_ends))[blocks]
    order = list(zip(blocks.tolist(), (chosen - firsts).tolist(), strict=True))
    with closing(RowReader(folder, manifest, "val")) as reader:
        for start in range(0, len(order), micro_batch * world_size):
            mine = order[start + rank * micro_batch : start + (rank + 1) * micro_batch]
            batch = torch.full((micro_batch, reader.row_tokens), IGNORED, dtype=torch.int64)
            if mine:
                batch[: len(mine)] = torch.from_numpy(reader.read(mine))
            yield batch
