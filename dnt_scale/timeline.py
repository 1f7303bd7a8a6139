"""``RUN/logs/timeline.jsonl``: what happened to a run and when, over all its attempts.

One JSON object a line, only ever appended, each with ``event``, ``time`` (seconds since 1970) and ``attempt``: the
launcher's name for it (the variable DNT_ATTEMPT, under SLURM JOB.RESTART), else HOST-PID. Rank 0 of training writes

    start     launched (when its process began), ranks
    ready     step: the first step begins after this one; restored (seconds spent reading a checkpoint)
    progress  step; seconds of this attempt so far: {step, eval, save}, as long as training waited for each. Every ten
              seconds, and at the end
    end       outcome (FINISHED, FAILED, KILLED), step. Missing after a kill
    lost      message, hosts at fault: a rank died or hung. By whichever rank says so

and a launcher adds events of its own (:mod:`cluster.ledger`).
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
import psutil

PROGRESS_EVERY_S = 10.0

Event = dict[str, Any]


def path(run_dir: Path) -> Path:
    return run_dir / "logs" / "timeline.jsonl"


def host() -> str:
    """This machine as its scheduler calls it, which may be shorter than its hostname."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def this_attempt() -> str:
    return os.environ.get("DNT_ATTEMPT") or f"{host()}-{os.getpid()}"


def append(run_dir: Path, event: str, *, attempt: str, **fields: Any) -> None:
    """Add one line. Raises OSError when it cannot be written."""
    file = path(run_dir)
    file.parent.mkdir(parents=True, exist_ok=True)
    line = orjson.dumps(
        {"event": event, "time": time.time(), "attempt": attempt, **fields}, option=orjson.OPT_APPEND_NEWLINE
    )
    with file.open("ab", buffering=0) as out:
        end = out.tell()
        if end and not _ends_a_line(file, end):  # what a kill cut short stays a line of its own
            line = b"\n" + line
        out.write(line)


def read(run_dir: Path) -> list[Event]:
    """All events, oldest first; lines that are not whole are left out. Empty where there is no file."""
    try:
        lines = path(run_dir).read_bytes().splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        with suppress(ValueError):
            found = orjson.loads(line)
            if isinstance(found, dict) and {"event", "time", "attempt"} <= found.keys():
                events.append(found)
    return events


def _ends_a_line(file: Path, end: int) -> bool:
    with file.open("rb") as before:
        before.seek(end - 1)
        return before.read(1) == b"\n"


class Clock:
    """Where the seconds of this attempt go; tells the timeline, unless it is ``silent`` (not rank 0's).

    What cannot be written (disk full) is left out: the timeline is not worth ending a run for.
    """

    def __init__(self, run_dir: Path, *, silent: bool) -> None:
        self._run_dir = run_dir
        self._silent = silent
        self._seconds = {"step": 0.0, "eval": 0.0, "save": 0.0}
        self._next = 0.0

    @contextmanager
    def spending(self, on: str) -> Iterator[None]:
        """Count the block's seconds as spent ``on`` "step", "eval" or "save"."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[on] += time.perf_counter() - started

    def start(self, ranks: int) -> None:
        self.tell("start", launched=psutil.Process().create_time(), ranks=ranks)

    def tell(self, event: str, **fields: Any) -> None:
        if not self._silent:
            with suppress(OSError):
                append(self._run_dir, event, attempt=this_attempt(), **fields)

    def progress(self, step: int, *, now: bool = False) -> None:
        """Tell the seconds so far, when it is time to or ``now``."""
        if now or time.monotonic() >= self._next:
            self._next = time.monotonic() + PROGRESS_EVERY_S
            self.tell("progress", step=step, seconds={name: round(spent, 3) for name, spent in self._seconds.items()})
