"""Shards in, batches out. The order is a pure function; the whole state is one integer, ``consumed_rows``.

1. An epoch visits every row of a split once. Its blocks (tar members of up to 512 rows) are permuted.
2. ``WINDOW_BLOCKS`` consecutive blocks of that permutation form a window, whose rows are permuted.
3. Position p of the endless sequence is row p mod rows of epoch p div rows: ``row_at``.
4. Of several sets, position p is the next row of the one that ``deal`` names; each has its own epochs and seed.
5. Global batch k is positions [k B, (k+1) B). Rank r takes the r-th of ``world_size`` equal slices of it.
6. A thread reads rows by offset ahead of the training step.

Both permutations are argsorts of Philox output keyed by (seed, epoch, window): numpy keeps a bit generator's
raw stream fixed across versions, and no global generator is touched.
"""

import queue
import threading
from collections.abc import Iterator
from contextlib import closing
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dnt_scale.data.order import Ints, Order, rows_from
from dnt_scale.data.rows import OpenFiles, RowReader, files_for, token_ids
from dnt_scale.data.sources import Source, Sources
from dnt_scale.model.dnt import IGNORED

PREFETCH_BATCHES = 4


def rows_a_rank(global_batch: int, world_size: int) -> int:
    """Raises ValueError when the global batch does not divide by the ranks."""
    if global_batch % world_size:
        raise ValueError(
            f"train.global_batch is {global_batch}, not divisible by {world_size} ranks; use a multiple of {world_size}"
        )
    return global_batch // world_size


class Stream:
    """This rank's slice of every global batch from ``consumed_rows`` on, read ahead by a thread.

    Iterating yields ``(tokens, consumed_rows)``: int64 tokens of shape (global_batch / world_size, seq_len + 1),
    ``IGNORED`` where a row holds padding, and the state to store once the batch is trained on. Use it as a context
    manager: leaving stops the thread.

    Args:
        sources: of the same row length and dtype, as ``load_sources`` gives them.

    Raises:
        ValueError: the global batch does not divide by the ranks; ShardError while iterating.
    """

    def __init__(
        self, sources: Sources, *, seed: int, global_batch: int, rank: int, world_size: int, consumed_rows: int = 0
    ) -> None:
        self.rows_a_rank = rows_a_rank(global_batch, world_size)
        self.manifest = sources[0].manifest
        self.padded = np.array([source.manifest.packing == "best_fit" for source in sources])
        self.shares = [source.share for source in sources]
        self.orders = [Order(source.manifest.splits["train"], source.shuffle_seed(seed)) for source in sources]
        self.files = OpenFiles(files_for(len(sources)))
        self.readers = [RowReader(source, "train", self.files) for source in sources]
        self.global_batch = global_batch
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
        self.files.close()

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
                tokens = self._read(consumed + self.offset)
                consumed += self.global_batch
                self.queue.put((torch.from_numpy(tokens), consumed))
        except Exception as error:
            self.queue.put(error)

    def _read(self, first: int) -> Ints:
        """The rows at ``rows_a_rank`` positions from ``first`` on."""
        source, blocks, rows = rows_from(self.shares, self.orders, first, self.rows_a_rank)
        raw = np.empty((self.rows_a_rank, self.manifest.row_bytes), dtype=np.uint8)
        row_places = [row.data for row in raw]
        for index, reader in enumerate(self.readers):
            here = np.flatnonzero(source == index)
            reader.read(blocks[here], rows[here], [row_places[place] for place in here.tolist()])
        return token_ids(raw, self.manifest, self.padded[source])


def validation_batches(source: Source, *, rows: int, micro_batch: int, rank: int, world_size: int) -> Iterator[Tensor]:
    """``rows`` validation rows, evenly spread over the split, dealt to the ranks micro-batch by micro-batch.

    Every rank gets the same number of batches of shape (micro_batch, seq_len + 1), int64, as the engines' collectives
    need; padding and places past the end hold ``IGNORED`` and do not count in the loss.
    """
    manifest = source.manifest
    block_ends = np.cumsum(Order(manifest.splits["val"], 0).block_rows)
    chosen = np.arange(min(rows, block_ends[-1])) * block_ends[-1] // min(rows, block_ends[-1])
    blocks = np.searchsorted(block_ends, chosen, side="right")
    rows_in = chosen - np.concatenate(([0], block_ends))[blocks]
    with closing(OpenFiles(1)) as files:  # a rank reads the shards one after another
        reader = RowReader(source, "val", files)
        for start in range(0, len(chosen), micro_batch * world_size):
            mine = slice(start + rank * micro_batch, start + (rank + 1) * micro_batch)
            raw = np.empty((len(chosen[mine]), manifest.row_bytes), dtype=np.uint8)
            reader.read(blocks[mine], rows_in[mine], [row.data for row in raw])
            batch = torch.full((micro_batch, manifest.seq_len + 1), IGNORED, dtype=torch.int64)
            batch[: len(raw)] = torch.from_numpy(
                token_ids(raw, manifest, np.full(len(raw), manifest.packing == "best_fit"))
            )
            yield batch
