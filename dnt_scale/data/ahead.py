"""A rank's next images, on their way from the disk long before their turn.

The order of training jumps among images that lie in blocks all over the tars. One at a time, or a
few, a disk gives them at a fraction of its speed. The order is known, so a thread of the rank tells
the system of the next ones, as many as ``AHEAD_BYTES`` hold; the system reads them into its page
cache, where all processes of the machine find them. It is a hint: what is read, and in which order,
does not depend on it.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from threading import Condition, Thread
from typing import NamedTuple

import numpy as np

from data_prep.images.shards import NEAR, ImageManifest, SplitReader
from data_prep.shards import SplitName
from dnt_scale.data.image_reader import Reading, image_order, numbers_at
from dnt_scale.data.order import Ints

AHEAD_BYTES = 64 << 20  # at most, of a rank: of the page cache, not of a process
PIECE_IMAGES = 16


class Piece(NamedTuple):
    """Images to be asked for together: all are used once the first ``rows`` rows are made."""

    numbers: Sequence[int] | Ints
    rows: int


class Ahead:
    """Has the system read images of a split, in a thread that ends with ``close``.

    Args:
        pieces: in the order of their use. What the thread takes of them it has asked for.
    """

    def __init__(
        self, folder: Path, manifest: ImageManifest, split: SplitName, pieces: Iterable[Piece]
    ) -> None:
        self.folder, self.manifest, self.split, self.pieces = folder, manifest, split, pieces
        self.used = 0  # rows
        self.closed = False
        self.changed = Condition()
        self.thread = Thread(target=self._run, name="images ahead", daemon=True)
        self.thread.start()

    def use(self, rows: int) -> None:
        """Tell that so many more rows are made."""
        with self.changed:
            self.used += rows
            self.changed.notify()

    def close(self) -> None:
        """End the thread."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def _run(self) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        with (
            suppress(ValueError, OSError),  # of damage: whoever reads the image names it
            closing(SplitReader(self.folder, self.manifest, self.split)) as reader,
        ):
            sizes = reader.index["size"].astype(np.int64) + NEAR  # the most that is read for each
            asked: deque[tuple[int, int]] = deque()  # bytes, rows
            total = 0
            for numbers, rows in self.pieces:
                size = int(sizes[numbers].sum())
                while asked and total + size > AHEAD_BYTES:
                    self._wait_for(asked[0][1])
                    total -= asked.popleft()[0]
                if self.closed:
                    return
                reader.expect(numbers)
                asked.append((size, rows))
                total += size

    def _wait_for(self, rows: int) -> None:
        """Wait until so many rows are used, or it is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.used >= rows)


def training_pieces(
    reading: Reading, images: int, first: int, count: int, global_batch: int
) -> Iterator[Piece]:
    """Yield the images that a rank's rows need, of one batch after the other, without end.

    Args:
        images: of the training split.
        first: position of the rank's first row.
        count: its rows of a global batch.
        global_batch: positions from a batch of its to the next.
    """
    order = image_order(images, reading.seed)
    pair = 2 if reading.mixes else 1  # mixed ones need both of a pair
    rows, start = 0, first
    while True:
        begin = start - start % pair
        end = start + count + (start + count) % pair
        numbers = numbers_at(order, begin, end - begin)
        for place in range(0, len(numbers), PIECE_IMAGES):
            here = numbers[place : place + PIECE_IMAGES]
            yield Piece(here, rows + min(begin + place + len(here) - start, count))
        rows, start = rows + count, start + global_batch


def validation_pieces(numbers: Sequence[int]) -> Iterator[Piece]:
    """Yield a rank's samples of validation, by their numbers, in their order."""
    for place in range(0, len(numbers), PIECE_IMAGES):
        here = numbers[place : place + PIECE_IMAGES]
        yield Piece(here, place + len(here))
