"""Where the time that a run was given went, out of its timeline (:mod:`dnt_scale.record.timeline`).

An attempt's allocated time begins when SLURM starts its job (without a launcher: when its process began). It lasts
until the time that ``ended`` gives, else until its last sign of life; where it still has its nodes, until now, or until
its last sign if that was a moment ago. All of it is one of

    training    steps that count
    start_up    until the first step may begin, without
    restore     reading a checkpoint
    lost        steps that a later attempt did again, for it began at an earlier checkpoint
    eval, checkpoint    as long as training waited for them
    overhead    between steps, until the last one that was told of: logging, agreeing, comparing ranks, snapshots
    stall       the rest: a hang, a dead rank, shutting down, SLURM's own time

Goodput is training over allocated time. Waiting in the queue lies outside, and counts once it is over.

A step's seconds are known as often as training tells its progress: between two such lines they are interpolated, and
steps after the last line, of which the next attempt found a checkpoint or a line in metrics.jsonl, take the mean.
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
SHORT = {"allocated": "alloc", "training": "train", "start_up": "start", "checkpoint": "save"}  # all fit 80 columns
OUTCOMES = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}


@dataclass(frozen=True)
class Parts:
    """Seconds of allocated time."""

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
        return math.fsum(asdict(self).values())

    @property
    def goodput(self) -> float:
        """Training over allocated time; 0 where none was allocated."""
        return self.training / self.allocated if self.allocated else 0.0

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


@dataclass(frozen=True)
class Attempt:
    """``status`` is what ``ended`` says, else training (finished, failed, stopped), else killed when another attempt
    came after it; running, or silent when it gave no sign of life for half a minute."""

    name: str
    status: str
    queue: float  # seconds
    parts: Parts
    first: int | None  # the step it began after, and the last it is known to have done; None: it did not get so far
    last: int | None
    lost_steps: int


@dataclass(frozen=True)
class Goodput:
    attempts: tuple[Attempt, ...]

    @property
    def total(self) -> Parts:
        return sum((attempt.parts for attempt in self.attempts), Parts())

    @property
    def queue(self) -> float:
        """Seconds."""
        return sum(attempt.queue for attempt in self.attempts)


@dataclass
class _Story:
    """What the timeline says of one attempt."""

    name: str
    said: dict[str, Event] = field(default_factory=dict)  # the newest event of each kind
    steps: list[int] = field(default_factory=list)  # of its progress, and the seconds spent on steps until then
    seconds: list[float] = field(default_factory=list)
    last_sign: float = -math.inf
    logged: int = 0  # the last step in metrics.jsonl that the next attempt found, and its time
    logged_at: float = math.inf

    def hear(self, event: Event) -> None:
        self.said[event["event"]] = event
        if event["event"] == "progress":
            self.steps.append(event["step"])
            self.seconds.append(event["seconds"]["step"])
        if event["event"] != "ended":  # which may be written long after
            self.last_sign = max(self.last_sign, event["time"])

    @property
    def begin(self) -> float:
        if "allocated" in self.said:
            return float(self.said["allocated"]["started"])
        return float(self.said["start"]["launched"])

    @property
    def first(self) -> int | None:
        return int(self.said["ready"]["step"]) if "ready" in self.said else None

    def end(self, after: "_Story | None", now: float) -> float:
        """When it gave its nodes back, as far as is known."""
        end = self.last_sign
        if "ended" in self.said:
            end = float(self.said["ended"]["until"])
        elif "allocated" in self.said and not after and now >= self.last_sign + RECENT_S:
            end = now
        return min(end, max(after.begin, self.last_sign)) if after else end  # a sign outweighs a coarse clock

    def status(self, after: "_Story | None", now: float) -> str:
        if "ended" in self.said:
            return str(self.said["ended"]["status"])
        if "end" in self.said:
            return OUTCOMES[self.said["end"]["outcome"]]
        if after:
            return "killed"
        return "running" if now < self.last_sign + RECENT_S else "silent"


def breakdown(events: Sequence[Event], now: float) -> Goodput:
    """What became of each attempt's time.

    Args:
        events: ``timeline.read(run_dir)``; some may be missing.
        now: seconds since 1970.
    """
    stories = _stories(events)
    followed = list(zip(stories, [*stories[1:], None], strict=False))
    spans: list[tuple[float, float]] = []
    queues: list[float] = []
    freed = -math.inf
    for story, after in followed:
        begin = max(story.begin, freed)  # no second twice, whatever the clocks say
        queues.append(max(0.0, begin - max(freed, story.said.get("allocated", {}).get("queued", begin))))
        freed = max(begin, story.end(after, now))
        spans.append((begin, freed))
    attempts: list[Attempt] = []
    resumed: int | None = None  # the step that the next attempt to get so far began after
    kept = math.inf  # steps after this one were done again
    for (story, after), span, queue in reversed(list(zip(followed, spans, queues, strict=True))):
        attempts.append(_attempt(story, *span, queue, resumed, kept, story.status(after, now)))
        if story.first is not None:
            resumed, kept = story.first, min(kept, story.first)
    return Goodput(tuple(reversed(attempts)))


def metrics(run_dir: Path) -> dict[str, float]:
    """The breakdown as MLflow takes it, times in seconds; empty before the first attempt."""
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
    """A row an attempt, and their total: each part's share of the allocated time, and below it its seconds. Parts on
    which no attempt spent any time are left out."""
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


def _stories(events: Sequence[Event]) -> list[_Story]:
    """The attempts that had nodes or a process, oldest first."""
    stories: list[_Story] = []
    newest: dict[str, _Story] = {}
    for event in events:
        kind, name = event["event"], event["attempt"]
        story = newest.get(name)
        if kind in ("allocated", "start") and (story is None or kind in story.said):  # HOST-PID may come again
            newest[name] = story = _Story(name)
            stories.append(story)
        if story is None and kind == "lost" and stories:  # without a launcher each rank has a name of its own
            story = stories[-1]
        if kind == "start" and (logged := event.get("logged")):
            trained = [other for other in stories if other is not story and other.first is not None]
            for before in trained[-1:]:
                if logged["step"] > before.logged:
                    before.logged, before.logged_at = logged["step"], logged["time"]
                    before.last_sign = max(before.last_sign, before.logged_at)
        if story:
            story.hear(event)
    return stories


def _attempt(
    story: _Story, begin: float, end: float, queue: float, resumed: int | None, kept: float, status: str
) -> Attempt:
    left = end - begin
    parts: dict[str, float] = {}

    def take(part: str, seconds: float) -> None:  # clocks of several machines: no part exceeds what is left
        nonlocal left
        parts[part] = min(max(0.0, seconds), left)
        left -= parts[part]

    if story.first is None:
        return Attempt(story.name, status, queue, Parts(start_up=left), None, None, 0)
    ready, told = story.said["ready"], story.said.get("progress")
    steps, seconds = [story.first, *story.steps], [0.0, *story.seconds]
    last, spent = steps[-1], seconds[-1]
    if (reached := max(resumed or 0, story.logged)) > last:  # it did more than it could tell
        pace = spent / (last - story.first) if last > story.first else math.inf
        spent += min(pace * (reached - last), max(0.0, min(end, story.logged_at) - (told or ready)["time"]))
        last = reached
        steps, seconds = [*steps, last], [*seconds, spent]
    good = float(np.interp(min(kept, last), steps, seconds))
    take("restore", ready["restored"])
    take("start_up", ready["time"] - ready["restored"] - begin)
    take("training", good)
    take("lost", spent - good)
    if told:
        take("eval", told["seconds"]["eval"])
        take("checkpoint", told["seconds"]["save"])
        take("overhead", told["time"] - ready["time"] - sum(told["seconds"].values()))
    lost_steps = last - max(story.first, int(min(kept, last)))
    return Attempt(story.name, status, queue, Parts(**parts, stall=left), story.first, last, lost_steps)
