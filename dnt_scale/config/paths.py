"""Paths and other texts that a user types: ``~`` replaced, what no file could hold refused."""

import os
import re
from pathlib import Path
from typing import Any


def unreadable(text: str) -> str | None:
    """What keeps a text from being written to any file; None: nothing does."""
    if "\0" in text:
        return "it holds a NUL character, which no name can have"
    try:
        text.encode()
    except UnicodeEncodeError:
        return (
            "it holds bytes that are no UTF-8; rename what it names, or link to it by another name"
        )
    return None


def is_url(text: str) -> bool:
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text))


def expanded(text: str) -> str:
    """A path with ``~`` and ``~user`` in front replaced as a shell does; a URL and an unknown
    user stay.
    """
    return text if is_url(text) else os.path.expanduser(text)  # noqa: PTH111 (Path's fails for an unknown user)


def place(text: Any) -> Any:
    """A path that a user gave, ``~`` replaced. Raises ValueError for one that cannot be a folder
    or file here.
    """
    if not isinstance(text, str | Path):
        raise ValueError("expected a path")
    if not str(text):
        raise ValueError("is empty; expected a path (. is this folder)")
    if is_url(str(text)):
        raise ValueError("expected a folder or file of this machine, found a URL; copy it first")
    if problem := unreadable(str(text)):
        raise ValueError(problem)
    return expanded(str(text))
