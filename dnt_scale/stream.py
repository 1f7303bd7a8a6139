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

import os
import queue
import resource
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from functools import lru_cache
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.shards import Manifest, Split, SplitName
from dnt_scale.model import IGNORED
from dnt_scale.sources import Source, Sources

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

WINDOW_BLOCKS = 64
PREFETCH_BATCHES = 4
OPEN_FILES = 2 * WINDOW_BLOCKS  # that a set has use for: a window and the one before it


def permutation(size: int, seed: int, epoch: int, part: int) -> Ints:
    """A permutation of range(size), int64, that depends on nothing but the arguments."""
    key = np.array([seed, epoch << 32 | part], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


def deal(shares: Sequence[int], positions: Ints) -> tuple[Ints, Ints]:
    """Which of several sets gives the row at each position of their mixture, and as the how-manieth of its own.

    Of the first P positions set 0 has round(P share / total); the others have the rest, dealt in the same way. With
    the largest share first each set has its exact part of any P to within 1/2 row of two sets, 1 of three and
    (1 + 1/1 + ... + 1/(n-2)) / 2 of n: every error, at most 1/2, is passed on in proportion.

    Args:
        shares: of the sets, at least 1 each and about 2^30 together, so that nothing here leaves int64.
        positions: int64 (n,), below 2^61.

    Returns:
        set and position in that set, both int64 (n,).
    """
    source, within = np.empty_like(positions), np.empty_like(positions)
    places = np.arange(len(positions))
    total = sum(shares)
    for index, share in enumerate(shares):
        before, after = _rounded(positions, share, total), _rounded(positions + 1, share, total)
        mine = after > before
        source[places[mine]], within[places[mine]] = index, before[mine]
        places, positions = places[~mine], (positions - before)[~mine]
        total -= share
    return source, within


def _rounded(count: Ints, share: int, total: int) -> Ints:
    """count * share / total to the nearest integer, halves up."""
    whole, rest = np.divmod(count, total)
    rounded: Ints = whole * share + (2 * rest * share + total) // (2 * total)
    return rounded


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

    def _rest_of_window(self, position: int) -> tuple[Ints, Ints]:
        """Blocks and rows from ``position`` to the end of its window."""
        epoch, inside = divmod(position, self.rows)
        _, starts = self._epoch(epoch)
        window = int(np.searchsorted(starts, inside, side="right")) - 1
        block_of, row_of = self._window(epoch, window)
        offset = inside - int(starts[window])
        return block_of[offset:], row_of[offset:]

    def row_at(self, position: int) -> tuple[int, int]:
        """(block, row in block) at ``position``, counted from the beginning of training."""
        block_of, row_of = self._rest_of_window(position)
        return int(block_of[0]), int(row_of[0])

    def rows_from(self, position: int, count: int) -> tuple[Ints, Ints]:
        """``row_at`` of ``count`` positions from ``position`` on: blocks and rows in them, both int64 (count,)."""
        blocks, rows = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            block_of, row_of = self._rest_of_window(position + done)
            end = min(count, done + len(block_of))
            blocks[done:end], rows[done:end] = block_of[: end - done], row_of[: end - done]
            done = end
        return blocks, rows


def row_at(manifest: Manifest, seed: int, position: int) -> tuple[int, int]:
    """The order contract of one set as a pure function: (block, row in block) of the training split."""
    return Order(manifest.splits["train"], seed).row_at(position)


def rows_from(shares: Sequence[int], orders: Sequence[Order], position: int, count: int) -> tuple[Ints, Ints, Ints]:
    """The order contract of a mixture: set, block and row in block at ``count`` positions from ``position`` on.

    Args:
        shares: of the sets, as ``deal`` wants them.
        orders: of the sets.

    Returns:
        three of int64 (count,).
    """
    source, within = deal(shares, np.arange(position, position + count))
    blocks, rows = np.empty_like(source), np.empty_like(source)
    for index, order in enumerate(orders):
        here = np.flatnonzero(source == index)
        if len(here):  # their positions in the set follow one another
            blocks[here], rows[here] = order.rows_from(int(within[here[0]]), len(here))
    return source, blocks, rows


class OpenFiles:
    """Files open for reading, by path, ``most`` at a time: one more, and the one that was opened first is closed."""

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
    """How many shards a stream of so many sets keeps open: what they have use for, within half of what the process may
    open at all. That limit, often 1024, is raised where the system lets us."""
    wanted = sets * OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < 2 * wanted:  # -1 is no limit
        with suppress(ValueError, OSError):  # then it stays as it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (2 * wanted if hard < 0 else min(2 * wanted, hard), hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft < 0 else max(1, min(wanted, soft // 2))


class RowReader:
    """Rows of one split by (block, row), with one pread each, through ``files``."""

    def __init__(self, source: Source, split: SplitName, files: OpenFiles) -> None:
        shards = source.manifest.splits[split].shards
        self.row_bytes = source.manifest.row_bytes
        self.paths = [str(source.folder / shard.file) for shard in shards]
        self.shards: Ints = np.repeat(np.arange(len(shards)), [len(shard.members) for shard in shards])
        self.offsets: Ints = np.array([member.offset for shard in shards for member in shard.members], dtype=np.int64)
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
                    f"{self.paths[shard]}: ends inside block {blocks[index]}, row {rows[index]} ({got} of "
                    f"{self.row_bytes} bytes); it was truncated while in use: restore it and check with "
                    "`dnt data verify`"
                )


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


def token_ids(raw: Bytes, manifest: Manifest, padded: npt.NDArray[np.bool_]) -> Ints:
    """Rows as they stand in shards to int64 token ids (rows, seq_len + 1), ``IGNORED`` for padding.

    Args:
        raw: uint8 (rows, row_bytes).
        padded: bool (rows,), whether a row is of packing "best_fit", where an eos after an eos is padding.
    """
    ids = raw.view(manifest.numpy_dtype)
    tokens = ids.astype(np.int64)
    if padded.any():
        eos = ids == manifest.eos_id
        tokens[:, 1:][eos[:, 1:] & eos[:, :-1] & padded[:, None]] = IGNORED
    return tokens


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
