"""Small files that are replaced in one piece, warnings, and reasons of errors in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson


def causes(error: BaseException) -> Iterator[BaseException]:
    """``error``, then what it was raised from, down to what it began with."""
    found: BaseException | None = error
    while found:
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def reason(error: BaseException) -> str:
    """The one line to show of ``error``: what it began with, since MLflow wraps "connection refused" four times."""
    *_, first = causes(error)
    text = (str(first).splitlines() or [""])[0][:200]
    return text if type(first).__module__.startswith("dnt_scale") else f"{type(first).__name__}: {text}"


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; empty when there is no such file or it cannot be read."""
    try:
        found = orjson.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _replace(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a crash leaves the old or the new content. Raises OSError."""
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    _replace(path, orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY))


def warn(text: str) -> None:
    print(f"dnt: {text}", file=sys.stderr, flush=True)


def git_commit(file: Path = Path(__file__)) -> str:
    """The commit hash of the checkout that ``file`` belongs to, with ``-dirty`` when tracked files differ from it.

    "unknown" when ``file`` is not tracked by git (an installed package, even inside somebody's checkout) or git is
    absent. A copy made for SLURM jobs has it in a file COMMIT.
    """
    noted = file.parents[1] / "COMMIT"
    if noted.exists():
        return noted.read_text().strip()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
