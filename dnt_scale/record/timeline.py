"""``RUN/logs/timeline-HOST.jsonl``: what happened to a run and when, over all its attempts.

A file for each machine that has something to say, for over NFS two must not append to one. One JSON
object a line, only ever appended, each with ``event``, ``time`` (seconds since 1970) and
``attempt``: the launcher's name for it (the variable DNT_ATTEMPT, under SLURM JOB.RESTART), else
HOST-PID. Rank 0 of training writes

    start     launched (when its process began), ranks; logged (step, time): the last line of
              metrics.jsonl, {} where there was none
    ready     step: the first step begins after this one; restored (seconds spent reading a
              checkpoint)
    saved     step: its checkpoint is in place
    progress  step; seconds of this attempt so far: {step, eval, save}, as long as training waited
              for each. Every ten seconds, later every minute, and at the end
    end       outcome (FINISHED, FAILED, KILLED), step. Missing after a kill
    lost      message, hosts at fault: a rank died or hung. By whichever rank says so

and a launcher adds events of its own (:mod:`cluster.run_record`).
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import psutil

from dnt_scale.distributed.host import host, start_ticks

if TYPE_CHECKING:
    from dnt_scale.distributed.watchdog import Tell  # which imports torch

PROGRESS_EVERY_S = 60.0
PROGRESS_EVERY_FIRST_S = 10.0
# Most ends come early in an attempt, and months of a run should not make this long to read.
FIRST_S = 1800.0

Event = dict[str, Any]


def path(run_dir: Path) -> Path:
    """Return the file that this machine writes."""
    return run_dir / "logs" / f"timeline-{host()}.jsonl"


def files(run_dir: Path) -> list[Path]:
    """Return the files of all machines."""
    return sorted((run_dir / "logs").glob("timeline-*.jsonl"))


def this_attempt() -> str:
    """Return the name of the attempt that this process belongs to."""
    return os.environ.get("DNT_ATTEMPT") or f"{host()}-{os.getpid()}"


def append(run_dir: Path, event: str, *, attempt: str, **fields: Any) -> None:
    """Add one line. Raises OSError when it cannot be written."""
    file = path(run_dir)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"event": event, "time": time.time(), "attempt": attempt, **fields}
    line = orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)
    with file.open("ab", buffering=0) as out:
        end = out.tell()
        if end and not _ends_a_line(file, end):
            line = b"\n" + line  # What a kill cut short stays a line of its own.
        out.write(line)


def read(run_dir: Path) -> list[Event]:
    """Return all events, oldest first by the clocks of those who wrote them.

    Lines that are not whole are left out.
    """
    events = []
    for file in files(run_dir):
        with suppress(OSError):
            events += [event for line in file.read_bytes().splitlines() if (event := _event(line))]
    return sorted(events, key=lambda event: float(event["time"]))


def _event(line: bytes) -> Event | None:
    with suppress(ValueError):
        found = orjson.loads(line)
        if isinstance(found, dict) and {"event", "attempt"} <= found.keys():
            return found if isinstance(found.get("time"), int | float) else None
    return None


def _ends_a_line(file: Path, end: int) -> bool:
    with file.open("rb") as before:
        before.seek(end - 1)
        return before.read(1) == b"\n"


def launched() -> float:
    """Return when this process was started, in seconds since 1970, by the clock of the events.

    Linux counts a process's start from the boot, and the boot in whole seconds: what psutil adds up
    from the two is up to a second early, more than a short attempt takes, and before the end of the
    attempt before this one.
    """
    ticks = start_ticks(os.getpid())
    if not ticks:  # This is not Linux.
        return psutil.Process().create_time()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age


class Clock:
    """Measures where the seconds of this attempt go, and tells the timeline.

    Where it is ``silent`` (not rank 0's) it tells nothing. What cannot be written (disk full) is
    left out: the timeline is not worth ending a run for.
    """

    def __init__(self, run_dir: Path, *, silent: bool) -> None:
        self._run_dir = run_dir
        self._silent = silent
        self._seconds = {"step": 0.0, "eval": 0.0, "save": 0.0}
        self._next = 0.0
        self._began = time.monotonic()

    @contextmanager
    def spending(self, on: str) -> Iterator[None]:
        """Count the block's seconds as spent ``on`` "step", "eval" or "save"."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[on] += time.perf_counter() - started

    def start(self, ranks: int, last_lines: Sequence[Mapping[str, Any]] = ()) -> None:
        """Tell of the process, and of the last line of metrics.jsonl, if any."""
        logged = {name: line[name] for line in last_lines for name in ("step", "time")}
        self.tell("start", launched=launched(), ranks=ranks, logged=logged)

    def tell(self, event: str, **fields: Any) -> None:
        """Append an event of this attempt to the timeline."""
        if not self._silent:
            with suppress(OSError):
                append(self._run_dir, event, attempt=this_attempt(), **fields)

    def progress(self, step: int, *, now: bool = False) -> None:
        """Tell the seconds so far, when it is time to or ``now``."""
        at = time.monotonic()
        if now or at >= self._next:
            early = at < self._began + FIRST_S
            self._next = at + (PROGRESS_EVERY_FIRST_S if early else PROGRESS_EVERY_S)
            seconds = {name: round(spent, 3) for name, spent in self._seconds.items()}
            self.tell("progress", step=step, seconds=seconds)


def telling(run_dir: Path) -> "Tell":
    """Return what :func:`watching` calls when it ends all ranks.

    The run's timeline keeps which hosts were at fault.
    """

    def tell(message: str, hosts: Sequence[str]) -> None:
        with suppress(OSError):
            append(run_dir, "lost", attempt=this_attempt(), message=message, hosts=list(hosts))

    return tell
