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
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

SILENT_SECONDS = 2.0
LOG_SECONDS = 10.0


class Meter:
    """Told of bytes as they are done: ``meter(count)``."""

    def __init__(self, name: str, total: int) -> None:
        console = Console(stderr=True)
        self.name, self.total, self.done = name, total, 0
        self.started = self.logged = time.monotonic()
        columns = (
            TextColumn(name),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self.task = self.bar.add_task(name, total=total)

    def __call__(self, count: int) -> None:
        self.done += count
        self.bar.update(self.task, completed=self.done)
        now = time.monotonic()
        if not self.bar.disable and now - self.started > SILENT_SECONDS:
            self.bar.start()
        elif self.bar.disable and now - self.logged > LOG_SECONDS:
            self.logged = now
            rate = self.done / (now - self.started)
            self.bar.console.print(
                f"{self.name}: {self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, "
                f"{rate / 1e6:,.0f} MB/s, "
                f"{(self.total - self.done) / rate:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()
