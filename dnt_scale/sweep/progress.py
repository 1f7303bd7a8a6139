"""What a person sees of a sweep: the run that trains, how long all will take, and the table of
results."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from dnt_scale.record.metrics_file import last_metrics
from dnt_scale.sweep.sweep_file import Result, SweepRun
from dnt_scale.train.progress import PLAIN_LINE_SECONDS, clock

LOOK_S = 0.5
REASON_CHARS = 60  # in the table; results.json has all


class SweepProgress:
    """Progress on stderr: one live line on a terminal, a plain line now and then elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.live = self.console.is_terminal
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}"),
            console=self.console,
            disable=not self.live,
        )
        self.task = self.bar.add_task("", total=1, line="")
        self._seconds = self._steps = 0.0  # of the parts that this command has trained
        self._looked = self._plain = 0.0

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
        self.bar.console.print(line, soft_wrap=True, markup=False)

    def begin(self, what: str, run_dir: Path, stop: int, left: int) -> None:
        """Begin to show a run.

        Args:
            what: run 3 of 9, and its name.
            stop: the step that it trains to.
            left: steps of all runs that are yet to be trained, this one's too.
        """
        self._what, self._run_dir, self._stop, self._left = what, run_dir, stop, left
        self._first: int | None = None
        self._began = self._plain = time.monotonic()
        self.bar.update(self.task, description=what, completed=0, total=stop, line="starting")

    def look(self) -> None:
        """Show how far the run is; to be called often."""
        if time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        lines = last_metrics(self._run_dir)[-1:]
        if not lines:
            return
        step, loss = int(lines[0]["step"]), lines[0].get("train/loss")
        if self._first is None:
            self._first = step
        at = f"step {step}/{self._stop}"
        line = f"loss {loss:.4f}  " if isinstance(loss, float) else ""
        line += f"ETA of the sweep {self.eta(step)}"
        if self.live:
            self.bar.update(self.task, completed=step, line=f"{at}  {line}")
        elif time.monotonic() - self._plain > PLAIN_LINE_SECONDS:
            self._plain = time.monotonic()
            self.say(f"{self._what}: {at}  {line}")

    def eta(self, step: int) -> str:
        """Return the time left of the whole sweep at the mean pace so far."""
        done = step - (self._first or 0)
        seconds = self._seconds + time.monotonic() - self._began
        if not self._steps + done:
            return "unknown"
        return clock(seconds / (self._steps + done) * max(0, self._left - done))

    def end(self, steps: int) -> float:
        """Return the seconds that the run took, whose ``steps`` count for the pace from now on."""
        seconds = time.monotonic() - self._began
        self._seconds += seconds
        self._steps += steps
        return seconds


def results_table(
    runs: Sequence[SweepRun],
    results: Mapping[str, Result],
    last: Mapping[str, int],
    metric: str,
) -> Table:
    """Return what runs led to, the best first.

    Args:
        last: the last step of each run.
        metric: what they are judged by.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("", "run", *runs[0].values):
        table.add_column(header, overflow="fold")
    for header in ("step", metric, "seconds"):
        table.add_column(header, justify="right")
    table.add_column("state", overflow="fold")
    nothing = Result()

    def place(run: SweepRun) -> tuple[bool, int, float]:
        found = results.get(run.name, nothing)
        step = max(found.values, default=0)
        return bool(found.failed), -step, found.values.get(step, 0.0)

    for number, run in enumerate(sorted(runs, key=place)):
        found = results.get(run.name, nothing)
        step = max(found.values, default=0)
        best = number == 0 and step == last.get(run.name)
        done = "finished" if step == last.get(run.name) else "stopped early" if step else "waiting"
        table.add_row(
            "*" if best else "",
            run.name,
            *run.values.values(),
            f"{step:,}" if step else "-",
            f"{found.values[step]:.4f}" if step else "-",
            f"{found.seconds:.0f}" if found.seconds else "-",
            f"failed: {found.failed[:REASON_CHARS]}" if found.failed else done,
            style="bold" if best else "",
        )
    return table
