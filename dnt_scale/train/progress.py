"""What a person watching a run sees: one live line on a terminal, a plain line now and then
elsewhere.
"""

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dnt_scale.checkpoint.read import gone_latest
from dnt_scale.checkpoint.storage import Storage
from dnt_scale.config import RunConfig
from dnt_scale.data.sources import Source
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.model.flops import count_parameters
from dnt_scale.record.speed import Metrics
from dnt_scale.train.stages import Stages

PLAIN_LINE_SECONDS = 10.0


def opening_line(run: RunConfig, stages: Stages, newest: Path | str | None, ranks: Ranks) -> str:
    unit = stages.source.unit
    if len(stages) == 1:
        epochs = stages.source.epochs(stages.total_steps * run.train.global_batch)
        steps = f"of {unit.of(run.train.global_batch):,} {unit.name} ({epochs})"
    else:
        steps = f"in {len(stages)} stages ({stages.units_at(stages.total_steps):,} {unit.name})"
    return (
        f"{run.run.name}: {run.model.name}, {count_parameters(run.model) / 1e6:.1f}M parameters, "
        f"{stages.total_steps} steps {steps} on {ranks.world_size} x {ranks.device.type} in "
        f"{run.train.dtype}, engine {run.engine.name}, "
        + (f"resuming from {newest}" if newest else "from the start")
        + (
            f" ({gone}, the latest, is gone)"
            if (gone := gone_latest(Storage(run.checkpoints)))
            else ""
        )
    )


class TrainProgress:
    """Progress of one run on rank 0's stderr: step, loss, units a second, MFU, ETA. Silent on
    other ranks.

    Args:
        work_at: the work behind so many steps, on any scale; stages differ in that of a step.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int,
        source: Source,
        work_at: Callable[[int], float] = float,
        *,
        silent: bool,
    ) -> None:
        self.console = Console(stderr=True, quiet=silent, highlight=False)
        self.live = self.console.is_terminal
        self.source = source
        self.work_at = work_at
        self.total_steps = total_steps
        self.step = self.first_step = first_step
        self.started = time.monotonic()
        self.last_plain = 0.0
        self.bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}"),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.live,
        )
        self.task = self.bar.add_task("train", total=total_steps, completed=first_step, line="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        """One line that stays."""
        self.bar.console.print(line, soft_wrap=True, markup=False)  # a path may hold [x]

    def update(self, step: int, metrics: Metrics) -> None:
        """Show a step's metrics; a validation leaves a line of its own."""
        if "val/loss" in metrics:
            self.say(f"step {step}: validation {self.source.validation_line(metrics)}")
        if "train/loss" not in metrics:
            return
        self.step = step
        unit = self.source.unit.name
        mfu = metrics.get("mfu")
        line = (
            f"loss {metrics['train/loss']:.4f}  {metrics[f'{unit}_per_s']:,.0f} {unit}/s  "
            f"MFU {'unknown' if mfu is None else f'{mfu:.1%}'}  ETA {self.eta()}"
        )
        if self.live:
            self.bar.update(self.task, completed=step, line=line)
        elif time.monotonic() - self.last_plain > PLAIN_LINE_SECONDS or step == self.total_steps:
            self.last_plain = time.monotonic()
            self.say(f"step {step}/{self.total_steps}  {line}")

    def eta(self) -> str:
        """Time left at this run's mean pace, validations and checkpoints included."""
        work = self.work_at
        done = work(self.step) - work(self.first_step)
        left = work(self.total_steps) - work(self.step)
        return clock((time.monotonic() - self.started) / done * left)


def clock(seconds: float) -> str:
    """Return a length of time as a clock shows it: 0:00:09, 1:02:03."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"
