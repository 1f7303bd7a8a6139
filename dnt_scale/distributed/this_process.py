"""What the watchdog asks of its own process, whose main thread may be stuck in anything."""

import os
import sys
import sysconfig
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from dnt_scale.distributed import output


def collectives_entered() -> int:
    """How many collectives this process has begun, on all its groups; backends that do not count
    give 0.
    """
    entered = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        for device in ("cpu", "cuda"):
            with suppress(RuntimeError):
                entered += group._get_backend(torch.device(device))._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return entered


def line_of(thread_id: int) -> str:
    """The innermost line of our own code that a thread is in, as "train.py:97 train"."""
    frame = innermost = sys._current_frames().get(thread_id)
    libraries = tuple(
        {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    )
    ours = str(Path(__file__).parents[1])
    while (
        frame
        and not frame.f_code.co_filename.startswith(ours)
        and frame.f_code.co_filename.startswith(libraries)
    ):
        frame = frame.f_back
    frame = frame or innermost
    return (
        f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
        if frame
        else "no code"
    )


def say(line: str) -> None:
    """Write to standard error, past sys.stderr: the main thread may hold that. No reader can
    hold this up.
    """
    in_time(lambda: os.write(2, line.encode()))


def flush() -> None:
    """Flush what was printed; the main thread may hold a stream's lock for good."""
    in_time(lambda: (sys.stdout.flush(), sys.stderr.flush()))
    output.drain(1.0)


def in_time(action: Callable[[], object]) -> None:
    """Do it, or leave it at that: neither an error nor more than a second."""

    def act() -> None:
        with suppress(OSError, ValueError):
            action()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(1.0)
