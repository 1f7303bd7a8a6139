"""How far a long read is, on stderr: a bar with rate and time left after two seconds; in a log,
a line now and then.
"""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

SILENT_SECONDS = 2.0
LOG_SECONDS = 10.0


class Meter:
    """Told of bytes as they are done: ``meter(count)``; or of whatever else ``unit`` names."""

    def __init__(self, name: str, total: int, unit: str = "MB") -> None:
        console = Console(stderr=True)
        self.name, self.total, self.done, self.unit = name, total, 0, unit
        self.started = self.logged = time.monotonic()
        columns = (
            TextColumn(name),
            BarColumn(),
            *(
                (DownloadColumn(), TransferSpeedColumn())
                if unit == "MB"
                else (MofNCompleteColumn(), TextColumn(unit), TextColumn("{task.fields[rate]}"))
            ),
            TimeRemainingColumn(),
        )
        self.bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self.task = self.bar.add_task(name, total=total, rate="")

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        rate = self.done / max(now - self.started, 1e-3)
        self.bar.update(self.task, completed=self.done, rate=self._amount(rate) + "/s")
        if not self.bar.disable and now - self.started > SILENT_SECONDS:
            self.bar.start()
        elif self.bar.disable and now - self.logged > LOG_SECONDS:
            self.logged = now
            self.bar.console.print(
                f"{self.name}: {self._amount(self.done)} of {self._amount(self.total)} "
                f"{self.unit}, {self._amount(rate)} {self.unit}/s, "
                f"{(self.total - self.done) / rate:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )

    def _amount(self, value: float) -> str:
        if self.unit == "MB":
            return f"{value / 1e6:,.0f}"
        return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()
