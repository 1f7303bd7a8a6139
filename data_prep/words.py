"""Counts, sizes, shares and lengths of time as people read them, and what a misspelt word was meant
to be."""

import difflib
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pydantic import ValidationError


def counted(number: int, what: str, several: str = "") -> str:
    """Return a number and what it counts: 1 document, 2,000 documents, 3 exact copies."""
    return f"{number:,} {what if number == 1 else several or what + 's'}"


def scaled(value: float, units: Sequence[str], decimals: int = 1) -> str:
    """Return a number with the unit for its power of 1000; whole in the first unit."""
    power = 0
    while value >= 1000 - 0.5 * 10**-decimals and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:,.{decimals}f} {units[power]}" if power else f"{value:,.0f} {units[0]}".rstrip()


def size(count: int) -> str:
    """Return bytes as 512 bytes, 12.3 MB or 4.5 GB."""
    return scaled(count, ("bytes", "kB", "MB", "GB", "TB"))


def megabytes(count: int) -> str:
    """Return bytes in MB, GB or TB with two decimals: figures that stand beside each other
    compare."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return f"{count / 1e6:.2f} MB"


def duration(seconds: float, digits: int = 3) -> str:
    """Return a length of time as people say it: 40 s, 12 min, 3.5 h, 6.2 days."""
    lengths = ((120, 1, "s"), (3600, 60, "min"), (172800, 3600, "h"), (math.inf, 86400, "days"))
    length, unit = next((length, unit) for limit, length, unit in lengths if seconds < limit)
    value = max(0.0, seconds) / length
    return f"{value:.{digits}g} {unit}" if value < 10**digits - 0.5 else f"{value:.0f} {unit}"


def clock(seconds: float) -> str:
    """Return a length of time as a clock shows it: 0:00:09, 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


def ratio(part: float, whole: float) -> float:
    """Return part / whole, 0 of nothing."""
    return part / whole if whole else 0.0


def rate(part: int, whole: int) -> str:
    """Return part / whole with two decimals, a dash of nothing."""
    return f"{part / whole:.2f}" if whole else "-"


def named_lines(lines: Sequence[tuple[str, str]], columns: int = 100) -> str:
    """Return names with what there is to say of each, wrapped and indented beside the names."""
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(
        textwrap.fill(
            text,
            columns,
            initial_indent=name.ljust(width),
            subsequent_indent=" " * width,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, text in lines
    )


def percent(part: int, whole: int) -> str:
    """Return a share in percent, never rounded to nothing or to all; a dash of nothing."""
    if not whole or part in (0, whole):
        return f"{100 * part // whole} %" if whole else "-"
    share = 100 * part / whole
    return "<0.1 %" if share < 0.1 else ">99.9 %" if 99.9 < share < 100 else f"{share:.1f} %"


def closest(word: str, known: Iterable[str]) -> str:
    """Return the known word that a misspelt one was probably meant to be, or ""."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), "")


class Problem(NamedTuple):
    """One error of a pydantic model.

    field: where it is, the parts of its dotted name; () for the whole model.
    kind: pydantic's name for it, such as "missing".
    found: what stands there.
    """

    field: tuple[str, ...]
    kind: str
    message: str
    found: object


def problems_of(error: "ValidationError") -> list[Problem]:
    """Return what pydantic has found wrong, with messages of our own validators as they were
    raised."""
    return [
        Problem(
            tuple(map(str, item["loc"])),
            item["type"],
            item["msg"].removeprefix("Value error, "),
            item["input"],
        )
        for item in error.errors()
    ]


def first_problem(error: "OSError | ValidationError") -> str:
    """Return in one line why a file of ours cannot be read: the system's word, or the first wrong
    field."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    first = problems_of(error)[0]
    return f"{'.'.join(first.field)}: {first.message}" if first.field else first.message
