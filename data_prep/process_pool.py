"""One function over many items in several processes, in order, with a bounded number under way."""

import contextlib
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    make: Callable[[], Callable[[Item], Result]], items: Iterable[Item], workers: int
) -> Generator[Result]:
    """Yield the results of `make()`'s function over the items, in their order; each worker process
    makes its own function.

    With one worker everything runs in this process. Items are drawn as they are needed. Close the
    generator (or use it up) so that no worker outlives it. Raises what the function or the items
    raise; ValueError if a worker is killed.
    """
    if workers == 1:
        yield from map(make(), items)
        return
    # Never a plain fork: the process that forks may hold threads, of rich and perhaps of torch.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["data_prep.train_tokenizer", "data_prep.pack", "data_prep.dedup", "rensa", "xxhash"]
    )
    pool = ProcessPoolExecutor(workers, context, _start_worker)
    under_way: deque[Future[Result]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(_call, make, item))
            if len(under_way) >= 3 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed, perhaps for want of memory; use fewer --workers. "
            "Finished parts are kept: the same command goes on from them."
        ) from error
    finally:
        with contextlib.suppress(BrokenProcessPool):
            pool.shutdown(cancel_futures=True)


def cpus() -> int:
    """Return how many CPUs this process may use: SLURM or a container may allow fewer than the
    machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_function: Callable[[Any], Any] | None = None


def _start_worker() -> None:
    # Ctrl-C reaches the whole group; the main process alone acts on it. If that is killed, its
    # workers go too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent
    threading.Thread(target=_die_after, args=(parent,), daemon=True).start()


def _die_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _call(make: Callable[[], Callable[[Any], Any]], item: Any) -> Any:
    global _function
    # With the first item, so that an error of it is raised like any other.
    _function = _function or make()
    return _function(item)
