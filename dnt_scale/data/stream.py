"""Batches of an endless order of rows, read ahead by a thread. The whole state is one integer,
``consumed_rows``.

Global batch k is the rows at positions [k B, (k+1) B) of the order. Rank r takes the r-th of
``world_size`` equal slices of it. What stands at a position is for the source to say: of text,
:mod:`dnt_scale.data.tokens` and :mod:`dnt_scale.data.order`.
"""

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from dnt_scale.model.batch import Batch

PREFETCH_BATCHES = 4


def rows_a_rank(global_batch: int, world_size: int) -> int:
    """Return the rows of a global batch that a rank takes. Raises ValueError when the ranks cannot
    share it equally.
    """
    if global_batch % world_size:
        raise ValueError(
            f"train.global_batch is {global_batch}, not divisible by {world_size} ranks; use a "
            f"multiple of {world_size}"
        )
    return global_batch // world_size


class Stream:
    """This rank's slice of every global batch from ``consumed_rows`` on, read ahead by a thread.

    Iterating yields ``(batch, consumed_rows)``: global_batch / world_size rows, and the state to
    store once the batch is trained on. Use it as a context manager: leaving stops the thread.

    Args:
        read: returns the rows at ``count`` positions of the order from ``first`` on, called as
            ``read(first, count)`` in the thread; what it returns depends on nothing else.
        close: gives up what ``read`` uses, called once the thread has stopped.

    Raises:
        ValueError: the global batch does not divide by the ranks. While iterating, what ``read``
            raises.
    """

    def __init__(
        self,
        read: Callable[[int, int], Batch],
        *,
        global_batch: int,
        rank: int,
        world_size: int,
        consumed_rows: int = 0,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.read = read
        self.close = close
        self.rows_a_rank = rows_a_rank(global_batch, world_size)
        self.global_batch = global_batch
        self.offset = rank * self.rows_a_rank
        self.consumed_rows = consumed_rows
        self.queue: queue.Queue[tuple[Batch, int] | Exception] = queue.Queue(PREFETCH_BATCHES)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._fill, name="stream", daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stopping.set()
        while self.thread.is_alive():  # it may wait for room in the queue
            try:
                self.queue.get_nowait()
            except queue.Empty:
                self.thread.join(timeout=0.01)
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Batch, int]:
        item = self.queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def _fill(self) -> None:
        consumed = self.consumed_rows
        try:
            while not self.stopping.is_set():
                batch = self.read(consumed + self.offset, self.rows_a_rank)
                consumed += self.global_batch
                self.queue.put((batch, consumed))
        except Exception as error:
            self.queue.put(error)
