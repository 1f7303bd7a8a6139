"""What stands on the page beside text: tables, bars, plots, as data. parts.html.j2 draws them.

Whatever text goes onto the page is escaped by jinja2, and characters that could hide or reorder
other text are shown by their numbers. So text from a corpus can stand anywhere.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2

from data_prep.words import counted, size

# Zero-width joiners shape the letters of Persian, Hindi and emoji; without them such text cannot be
# read.
JOINERS = "\u200c\u200d"
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
PLOT_WIDTH, PLOT_HEIGHT, PLOT_TOP = 400, 96, 16
AXIS_LABELS = 8


def visible(text: str) -> str:
    """Show every control, format, private or unassigned character but tab and line feed by its
    number.

    So `visible("a\\0b\\u202e")` is "a⟨U+0000⟩b⟨U+202E⟩".
    """
    return text if text.isascii() and text.isprintable() else re.sub(r"[^\w \t\n]", _number, text)


def _number(match: re.Match[str]) -> str:
    char = match[0]
    if unicodedata.category(char) not in UNSEEN or char in JOINERS:
        return char
    return f"⟨U+{ord(char):04X}⟩"


# --- what a cell may hold beside text and numbers -------------------------------------------------


class Bar(NamedTuple):
    """A horizontal bar, filled by parts: (CSS class, share of the width in [0, 1], what the pointer
    shows)."""

    parts: tuple[tuple[str, float, str], ...]


class ByteSize(NamedTuple):
    """A number of bytes, shown as a size, with the exact number under the pointer."""

    bytes: int


class Scaled(NamedTuple):
    """A number in few digits, and what the pointer shows."""

    text: str
    title: str


class Strong(NamedTuple):
    """A number or text that stands out."""

    value: int | str


class Excerpt(NamedTuple):
    """Text of a corpus, with its own spaces and lines and in its own direction, in parts: (text,
    whether it is marked)."""

    parts: tuple[tuple[str, bool], ...]


class Line(NamedTuple):
    """Several cells one after the other."""

    parts: tuple["Cell", ...]


Cell = str | int | Bar | ByteSize | Scaled | Strong | Excerpt | Line | None


def bar(*parts: tuple[str, float, str]) -> Bar:
    """Return a bar without the parts that are empty."""
    return Bar(tuple(part for part in parts if part[1] > 0))


def excerpt(text: str) -> Excerpt:
    """Return an excerpt of which nothing is marked."""
    return Excerpt(((text, False),))


# --- tables and plots -----------------------------------------------------------------------------


class Table(NamedTuple):
    """A table: rows of (CSS class of the column, cell)."""

    head: Sequence[tuple[str, Cell]]
    rows: Sequence[Sequence[tuple[str, Cell]]]


def table(columns: str, head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Table:
    """Return a table; `columns` has an "l" (text), "r" (number) or "w" (wide) a column.

    Raises ValueError where a row has fewer or more cells than columns.
    """
    kinds = [{"l": "text", "r": "number", "w": "wide"}[column] for column in columns]
    return Table(
        list(zip(kinds, head, strict=True)),
        [list(zip(kinds, row, strict=True)) for row in rows],
    )


class Mark(NamedTuple):
    """A bar of a plot: its place and size in the drawing, and what the pointer shows."""

    x: str
    y: str
    width: str
    height: str
    title: str


class Plot(NamedTuple):
    """A plot: its bars, the labels of its axis as (x, text), and the height of its largest bar."""

    marks: Sequence[Mark]
    labels: Sequence[tuple[str, str]]
    top: str


def histogram(
    counts: Sequence[int], low: int, high: int, unit: str, what: str = "documents"
) -> Plot:
    """Plot documents, or `what`, a power of two: bar i, for low <= i < high, is of those of [2**i,
    2**(i+1)) `unit`."""
    step, most = PLOT_WIDTH / (high - low), max([*counts, 1])
    total = max(sum(counts), 1)
    every = -(-(high - low) // AXIS_LABELS)
    marks, labels = [], []
    for place, exponent in enumerate(range(low, high)):
        x = f"{place * step + 1:.1f}"
        if place % every == 0:
            labels.append((x, power(exponent)))
        if value := counts[exponent] if exponent < len(counts) else 0:
            tall = max(PLOT_HEIGHT * value / most, 1.5)
            lengths = f"{2**exponent:,} to {2 ** (exponent + 1) - 1:,} {unit}"
            title = f"{lengths}: {value:,} {what}, {value / total:.1%}"
            y = f"{PLOT_TOP + PLOT_HEIGHT - tall:.1f}"
            marks.append(Mark(x, y, f"{step - 2:.1f}", f"{tall:.1f}", title))
    return Plot(marks, labels, f"{most:,}" if any(counts) else f"no {what}")


def power(exponent: int) -> str:
    """Return 2**exponent for an axis: 512, 1K, 2M."""
    thousands, rest = divmod(exponent, 10)
    return f"{2**rest}{['', 'K', 'M', 'G', 'T', 'P', 'E'][thousands]}"


# --- templates ------------------------------------------------------------------------------------


def _shown(value: object) -> object:
    """Return what is written for a value: numbers with commas, nothing for None."""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, str) and not hasattr(value, "__html__"):  # what a macro drew has that
        return visible(value)
    return "" if value is None else value


@functools.cache
def templates() -> jinja2.Environment:
    """Return the templates beside this file. Whatever they write is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for kind in (Bar, ByteSize, Scaled, Strong, Excerpt, Line):
        environment.tests[kind.__name__.lower()] = _is_a(kind)
    environment.filters["size"] = size
    environment.globals |= {"counted": counted, "plot": (PLOT_WIDTH, PLOT_HEIGHT, PLOT_TOP)}
    return environment


def _is_a(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind)
