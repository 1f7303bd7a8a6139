"""The order of rows: a pure function of (manifest, seed, position)."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from data_prep.shards import Manifest, Split

Ints = npt.NDArray[np.int64]


WINDOW_BLOCKS = 64


def permutation(size: int, seed: int, epoch: int, part: int) -> Ints:
    """A permutation of range(size), int64, that depends on nothing but the arguments."""
    key = np.array([seed, epoch << 32 | part], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


def deal(shares: Sequence[int], positions: Ints) -> tuple[Ints, Ints]:
    """Which of several sets gives the row at each position of their mixture, and as the how-manieth
    of its own.

    Of the first P positions set 0 has round(P share / total); the others have the rest, dealt in
    the same way. With the largest share first each set has its exact part of any P to within 1/2
    row of two sets, 1 of three and (1 + 1/1 + ... + 1/(n-2)) / 2 of n: every error, at most 1/2, is
    passed on in proportion.

    Args:
        shares: of the sets, at least 1 each and about 2^30 together, so that nothing here leaves
            int64.
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


def dealt(shares: Sequence[int], positions: int) -> list[int]:
    """Return how many of the first ``positions`` rows of a mixture ``deal`` takes from each set."""
    counts = []
    total, left = sum(shares), np.array([positions])
    for share in shares:
        counts.append(int(_rounded(left, share, total)[0]))
        total, left = total - share, left - counts[-1]
    return counts


def _rounded(count: Ints, share: int, total: int) -> Ints:
    """count * share / total to the nearest integer, halves up."""
    whole, rest = np.divmod(count, total)
    rounded: Ints = whole * share + (2 * rest * share + total) // (2 * total)
    return rounded


class Order:
    """Positions of the endless training sequence to rows of a split: steps 1 to 3 of tokens.py.

    Args:
        block_rows: int64 (blocks,), how many rows each block of the split has.
    """

    def __init__(self, block_rows: Ints, seed: int) -> None:
        self.block_rows = block_rows
        self.rows = int(block_rows.sum())
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
        """``row_at`` of ``count`` positions from ``position`` on: blocks and rows in them, both
        int64 (count,).
        """
        blocks, rows = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            block_of, row_of = self._rest_of_window(position + done)
            end = min(count, done + len(block_of))
            blocks[done:end], rows[done:end] = block_of[: end - done], row_of[: end - done]
            done = end
        return blocks, rows


def block_rows(split: Split) -> Ints:
    """Return how many rows each block of a split of text has, int64 (blocks,)."""
    return np.array(
        [member.rows for shard in split.shards for member in shard.members], dtype=np.int64
    )


def row_at(manifest: Manifest, seed: int, position: int) -> tuple[int, int]:
    """The order contract of one set as a pure function: (block, row in block) of the training
    split.
    """
    return Order(block_rows(manifest.splits["train"]), seed).row_at(position)


def rows_from(
    shares: Sequence[int],
    orders: Sequence[Order],
    position: int,
    count: int,
    passed: Sequence[int] = (),
) -> tuple[Ints, Ints, Ints]:
    """The order contract of a mixture: set, block and row in block at ``count`` positions from
    ``position`` on.

    Args:
        shares: of the sets, as ``deal`` wants them.
        orders: of the sets.
        passed: at which position of its own order each set begins; empty: all at 0.

    Returns:
        three of int64 (count,).
    """
    source, within = deal(shares, np.arange(position, position + count))
    blocks, rows = np.empty_like(source), np.empty_like(source)
    for index, order in enumerate(orders):
        here = np.flatnonzero(source == index)
        if len(here):  # their positions in the set follow one another
            first = int(within[here[0]]) + (passed[index] if passed else 0)
            blocks[here], rows[here] = order.rows_from(first, len(here))
    return source, blocks, rows
