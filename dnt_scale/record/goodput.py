"""Where the time that a run was given went, by its timeline (:mod:`dnt_scale.record.timeline`).

An attempt's allocated time begins when SLURM starts its job (without a launcher: when its process
began). It lasts until the time that ``ended`` gives, else until its last sign of life; where it
still has its nodes, until now, or until its last sign if that was a moment ago. All of it is one of

    training    steps that count
    start_up    until the first step may begin, without
    restore     reading a checkpoint
    lost        steps that a later attempt did again, for it began at an earlier checkpoint
    eval, checkpoint    as long as training waited for them
    overhead    between steps, until the last one that was told of: logging, agreeing, comparing
                ranks, snapshots
    stall       the rest: a hang, a dead rank, shutting down, SLURM's own time

Goodput is training over allocated time. Waiting in the queue lies outside, and counts once it is
over.

A step's seconds are known as often as training tells its progress: between two such lines they are
interpolated, and steps after the last line, of which the next attempt found a checkpoint or a line
in metrics.jsonl, take the mean.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
from rich.table import Table

from dnt_scale.record import timeline
from dnt_scale.record.timeline import PROGRESS_EVERY_S, Event

RECENT_S = 2 * PROGRESS_EVERY_S
SHORT = {  # So that all fit 80 columns.
    "allocated": "alloc",
    "training": "train",
    "start_up": "start",
    "checkpoint": "save",
}
OUTCOMES = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}


@dataclass(frozen=True)
class Parts:
    """Seconds of allocated time, by what they went into."""

    training: float = 0.0
    start_up: float = 0.0
    restore: float = 0.0
    lost: float = 0.0
    eval: float = 0.0
    checkpoint: float = 0.0
    overhead: float = 0.0
    stall: float = 0.0

    @property
    def allocated(self) -> float:
        """Return their sum."""
        return math.fsum(asdict(self).values())

    @property
    def goodput(self) -> float:
        """Return training over allocated time; 0 where none was allocated."""
        return self.training / self.allocated if self.allocated else 0.0

    def __add__(self, other: "Parts") -> "Parts":
        names = [part.name for part in fields(self)]
        return Parts(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(frozen=True)
class Attempt:
    """One attempt to train, from its allocation or start to its end.

    ``status`` is what ``ended`` says, else training (finished, failed, stopped), else killed when
    another attempt came after it; running, or silent when it gave no sign of life for two minutes.
    """

    name: str
    status: str
    queue: float  # Seconds.
    parts: Parts
    first: int | None  # The step it began after; None: it did not get so far.
    last: int | None  # The last step it is known to have done.
    lost_steps: int


@dataclass(frozen=True)
class Goodput:
    """All attempts of a run, oldest first."""

    attempts: tuple[Attempt, ...]

    @property
    def total(self) -> Parts:
        """Return the seconds of all attempts together."""
        return sum((attempt.parts for attempt in self.attempts), Parts())

    @property
    def queue(self) -> float:
        """Return the seconds of waiting for nodes."""
        return sum(attempt.queue for attempt in self.attempts)


@dataclass
class _AttemptLog:
    """The timeline's events of one attempt."""

    name: str
    newest: dict[str, Event] = field(default_factory=dict)  # By kind.
    steps: list[int] = field(default_factory=list)  # Of its progress.
    seconds: list[float] = field(default_factory=list)  # Spent on steps until each of these.
    last_sign: float = -math.inf
    logged: int = 0  # The last step in metrics.jsonl that the next attempt found.
    logged_at: float = math.inf  # The time of that step.

    def add(self, event: Event) -> None:
        """Take in an event, which is newer than those before."""
        self.newest[event["event"]] = event
        if event["event"] == "progress":
            self.steps.append(event["step"])
            self.seconds.append(event["seconds"]["step"])
        if event["event"] != "ended":  # Which may be written long after.
            self.last_sign = max(self.last_sign, event["time"])

    @property
    def begin(self) -> float:
        """Return when it got its nodes, else when its process began."""
        if "allocated" in self.newest:
            return float(self.newest["allocated"]["started"])
        return float(self.newest["start"]["launched"])

    @property
    def first(self) -> int | None:
        """Return the step that it began after; None where it did not get so far."""
        return int(self.newest["ready"]["step"]) if "ready" in self.newest else None

    def end(self, after: "_AttemptLog | None", now: float) -> float:
        """Return when it gave its nodes back, as far as is known."""
        end = self.last_sign
        if "ended" in self.newest:
            end = float(self.newest["ended"]["until"])
        elif "allocated" in self.newest and not after and now >= self.last_sign + RECENT_S:
            end = now
        # A sign outweighs a coarse clock.
        return min(end, max(after.begin, self.last_sign)) if after else end

    def status(self, after: "_AttemptLog | None", now: float) -> str:
        """Return what :class:`Attempt` says, where ``after`` is the next attempt."""
        if "ended" in self.newest:
            return str(self.newest["ended"]["status"])
        if "end" in self.newest:
            return OUTCOMES[self.newest["end"]["outcome"]]
        if after:
            return "killed"
        return "running" if now < self.last_sign + RECENT_S else "silent"


def breakdown(events: Sequence[Event], now: float) -> Goodput:
    """Return what became of each attempt's time.

    Args:
        events: ``timeline.read(run_dir)``; some may be missing.
        now: seconds since 1970.
    """
    logs = _attempt_logs(events)
    followed = list(zip(logs, [*logs[1:], None], strict=False))
    spans: list[tuple[float, float]] = []
    queues: list[float] = []
    freed = -math.inf
    for log, after in followed:
        begin = max(log.begin, freed)  # No second twice, whatever the clocks say.
        queued = log.newest.get("allocated", {}).get("queued", begin)
        queues.append(max(0.0, begin - max(freed, queued)))
        freed = max(begin, log.end(after, now))
        spans.append((begin, freed))
    attempts: list[Attempt] = []
    resumed: int | None = None  # The step that the next attempt to get so far began after.
    kept = math.inf  # Steps after this one were done again.
    for (log, after), span, queue in reversed(list(zip(followed, spans, queues, strict=True))):
        attempts.append(_attempt(log, *span, queue, resumed, kept, log.status(after, now)))
        if log.first is not None:
            resumed, kept = log.first, min(kept, log.first)
    return Goodput(tuple(reversed(attempts)))


def metrics(run_dir: Path) -> dict[str, float]:
    """Return the breakdown as metrics, times in seconds; empty before the first attempt."""
    goodput = breakdown(timeline.read(run_dir), time.time())
    if not goodput.attempts:
        return {}
    total = goodput.total
    return {
        "goodput/total": total.goodput,
        "goodput/attempt": goodput.attempts[-1].parts.goodput,
        "goodput/attempts": float(len(goodput.attempts)),
        "goodput/queue_s": goodput.queue,
        **{f"goodput/{part}_s": seconds for part, seconds in asdict(total).items()},
    }


def table(goodput: Goodput) -> Table:
    """Return a row an attempt, and their total.

    A cell has a part's share of the allocated time, and below it its seconds. Parts on which no
    attempt spent any time are left out.
    """
    total = asdict(goodput.total)
    parts = [part for part in total if total[part] or part == "training"]
    shown = Table(
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption="times in seconds; shares of alloc, the time with nodes",
        caption_justify="left",
    )
    shown.add_column("attempt")
    for name in ("queued", "allocated", *parts):
        shown.add_column(SHORT.get(name, name), justify="right", vertical="top")
    for attempt in goodput.attempts:
        steps = "no step" if attempt.first is None else f"{attempt.first}-{attempt.last}"
        row = _cells(attempt.queue, attempt.parts, parts)
        if attempt.lost_steps and "lost" in parts:
            row[2 + parts.index("lost")] += f"\n{attempt.lost_steps} steps"
        shown.add_row(f"{attempt.name}\n{attempt.status}\n{steps}", *row)
    if len(goodput.attempts) > 1:
        shown.add_row("total", *_cells(goodput.queue, goodput.total, parts), style="bold")
    return shown


def _cells(queue: float, spent: Parts, parts: Sequence[str]) -> list[str]:
    cells = [_length(queue), _length(spent.allocated)]
    for seconds in (getattr(spent, part) for part in parts):
        cells.append(f"{seconds / spent.allocated:.1%}\n{_length(seconds)}" if seconds else "-")
    return cells


def _length(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 or not seconds else f"{seconds:.1f}"


def _attempt_logs(events: Sequence[Event]) -> list[_AttemptLog]:
    """Return the attempts that had nodes or a process, oldest first."""
    logs: list[_AttemptLog] = []
    newest: dict[str, _AttemptLog] = {}
    for event in events:
        kind, name = event["event"], event["attempt"]
        log = newest.get(name)
        # HOST-PID may come again.
        if kind in ("allocated", "start") and (log is None or kind in log.newest):
            newest[name] = log = _AttemptLog(name)
            logs.append(log)
        if log is None and kind == "lost" and logs:
            log = logs[-1]  # Without a launcher each rank has a name of its own.
        if kind == "start" and (logged := event.get("logged")):
            trained = [other for other in logs if other is not log and other.first is not None]
            for before in trained[-1:]:
                if logged["step"] > before.logged:
                    before.logged, before.logged_at = logged["step"], logged["time"]
                    before.last_sign = max(before.last_sign, before.logged_at)
        if log:
            log.add(event)
    return logs


def _attempt(
    log: _AttemptLog,
    begin: float,
    end: float,
    queue: float,
    resumed: int | None,
    kept: float,
    status: str,
) -> Attempt:
    left = end - begin
    parts: dict[str, float] = {}

    def take(part: str, seconds: float) -> None:
        """Take a part of what is left, which the clocks of several machines may make too long."""
        nonlocal left
        parts[part] = min(max(0.0, seconds), left)
        left -= parts[part]

    if log.first is None:
        return Attempt(log.name, status, queue, Parts(start_up=left), None, None, 0)
    ready, progress = log.newest["ready"], log.newest.get("progress")
    steps, seconds = [log.first, *log.steps], [0.0, *log.seconds]
    last, spent = steps[-1], seconds[-1]
    if (reached := max(resumed or 0, log.logged)) > last:  # It did more than it could tell.
        pace = spent / (last - log.first) if last > log.first else math.inf
        untold = max(0.0, min(end, log.logged_at) - (progress or ready)["time"])
        spent += min(pace * (reached - last), untold)
        last = reached
        steps, seconds = [*steps, last], [*seconds, spent]
    good = float(np.interp(min(kept, last), steps, seconds))
    take("restore", ready["restored"])
    take("start_up", ready["time"] - ready["restored"] - begin)
    take("training", good)
    take("lost", spent - good)
    if progress:
        take("eval", progress["seconds"]["eval"])
        take("checkpoint", progress["seconds"]["save"])
        take("overhead", progress["time"] - ready["time"] - sum(progress["seconds"].values()))
    lost_steps = last - max(log.first, int(min(kept, last)))
    all_parts = Parts(**parts, stall=left)
    return Attempt(log.name, status, queue, all_parts, log.first, last, lost_steps)
