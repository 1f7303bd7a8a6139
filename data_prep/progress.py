"""What a person sees while a stage runs: a bar with rates and the time left; in a log, a line every
ten seconds."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from data_prep.words import clock

LOG_SECONDS = 10.0


class StageProgress:
    """Told how far a stage is: `done` of its total, and perhaps bytes of text and tokens; each adds
    up."""

    def __init__(self, show: Callable[["StageProgress"], None]):
        self.done = self.text_bytes = self.tokens = 0
        self._show = show

    def __call__(self, done: int, text_bytes: int = 0, tokens: int = 0) -> None:
        self.done += done
        self.text_bytes += text_bytes
        self.tokens += tokens
        self._show(self)


@contextlib.contextmanager
def stage(
    console: Console, name: str, total: int | None, unit: str = "MB"
) -> Iterator[StageProgress]:
    """Show a stage; `total` and what `Stage` is told are in bytes, or in whatever else `unit`
    names."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        _Rate(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(f"{name:9}", total=total, rate="")
    start = logged = time.monotonic()

    def show(state: StageProgress) -> None:
        nonlocal logged
        now = time.monotonic()
        rate = _rate(state, now - start, unit)
        bar.update(task, completed=state.done, rate=rate)
        if not console.is_terminal and now - logged >= LOG_SECONDS:
            logged = now
            line = f"{name:9} {_amount(state.done, unit)}"
            if total and state.done:
                left = (now - start) * (total - state.done) / state.done
                line += f" of {_amount(total, unit)} ({state.done / total:.0%}), {clock(left)} left"
            console.print(f"{line}, {rate}", highlight=False, soft_wrap=True)

    state = StageProgress(show)
    with bar:
        yield state
    seconds = time.monotonic() - start
    console.print(
        f"{name:9} {_amount(state.text_bytes or state.done, 'MB' if state.text_bytes else unit)} "
        f"in {seconds:.1f} s, {_rate(state, seconds, unit)}",
        highlight=False,
        soft_wrap=True,
    )


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(str(task.fields["rate"]))


def _rate(state: StageProgress, seconds: float, unit: str) -> str:
    seconds = max(seconds, 1e-3)
    if state.text_bytes:
        text = f"{state.text_bytes / seconds / 1e6:,.1f} MB/s"
    elif unit != "MB" and state.done < 10 * seconds:
        text = f"{state.done / seconds:.1f} {unit}/s"
    else:
        text = f"{_amount(state.done / seconds, unit)}/s"
    return f"{text}, {state.tokens / seconds:,.0f} tokens/s" if state.tokens else text


def _amount(value: float, unit: str) -> str:
    return f"{value / 1e6:,.1f} MB" if unit == "MB" else f"{value:,.0f} {unit}"
