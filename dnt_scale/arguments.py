"""What the options of `dnt` take: types for argparse that say what was found and what was
expected, in one line.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dnt_scale.config import paths

MOST = 10**15  # of anything that is counted


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one `error:` line. What it parses has the command's words as
    ``command``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_defaults(command=self.prog)

    def error(self, message: str) -> NoReturn:
        fail(message.removeprefix("argument "), self.prog)


def fail(message: str, command: str) -> NoReturn:
    """End with status 2 after one line about the options of ``command``."""
    text = " ".join(message.encode(errors="backslashreplace").decode().split())
    print(f"error: {text}; `{command} --help` shows how", file=sys.stderr)
    sys.exit(2)


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """Whole numbers from ``least`` to ``most``."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(
                f"found {text:.60}, expected a whole number from {least} to {most}"
            )
        return number

    return read


def number(
    least: float, most: float = math.inf, *, above: bool = False, below: bool = False
) -> Callable[[str], float]:
    """Finite numbers from ``least`` to ``most``, which are themselves none of them if they are to
    be ``above`` the one or ``below`` the other.
    """

    def read(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if (
            not (math.isfinite(found) and least <= found <= most)
            or (above and found == least)
            or (below and found == most)
        ):
            first = f"above {least:g}" if above else f"from {least:g}"
            last = f"below {most:g}" if below else f"at most {most:g}" if above else f"{most:g}"
            limit = "" if math.isinf(most) else f"{', ' if above else ' to '}{last}"
            raise argparse.ArgumentTypeError(f"found {text:.60}, expected a number {first}{limit}")
        return found

    return read


def word(text: str) -> str:
    """A text that is not empty, in UTF-8."""
    problem = paths.unreadable(text) if text else "expected a text, found none"
    if problem:
        raise argparse.ArgumentTypeError(f"found {text!a:.60}: {problem}" if text else problem)
    return text


def path(text: str) -> Path:
    """A path as it was typed, ~ replaced."""
    return Path(paths.expanded(_place(text)))


def set_folder(text: str) -> Path:
    """The folder of a prepared set."""
    try:
        return Path(paths.place(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"found {text!a:.60}: {error}") from None


def path_or_url(text: str) -> str:
    return paths.expanded(_place(text))


def _place(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found an empty text")
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"found {text!a:.60}, which holds a NUL character")
    return text


def prompt(text: str) -> str:
    """Text for a model; bytes that are no UTF-8 become U+FFFD, as they do in data."""
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        raw = text.encode("utf-8", "surrogatepass")
    return raw.decode("utf-8", "replace")
