"""Small files that are replaced in one piece, file locks, and messages in one line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


# --- files ----------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in ``path``; empty when there is no such file or it cannot be read."""
    try:
        found = orjson.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace ``path`` as :func:`replace_file` does."""
    readable = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY
    replace_file(path, orjson.dumps(content, option=readable))


def replace_file(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a crash leaves the old or the new content.

    Raises OSError.
    """
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def flock(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file until it is closed.

    Args:
        shared: others may have such a lock at the same time.
        wait: until nobody else has it.

    Returns:
        Whether it was granted; None where the file system has no such locks.

    Raises:
        OSError: asking failed.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only process in a block with this ``path``, which is made.

    Raises:
        OSError: the file cannot be made, or its file system has no locks.
    """
    with path.open("wb") as file:
        if flock(file.fileno(), wait=True) is None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), str(path))
        yield


# --- messages -------------------------------------------------------------------------------------


def warn(text: str) -> None:
    """Print one line for the user."""
    print(f"dnt: {text}", file=sys.stderr, flush=True)


def causes(error: BaseException) -> Iterator[BaseException]:
    """Give ``error``, then what it was raised from, down to what it began with."""
    found: BaseException | None = error
    while found:
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def reason(error: BaseException) -> str:
    """Return the one line to show of ``error``: what it began with.

    A client library may wrap "connection refused" four times.
    """
    *_, first = causes(error)
    text = (str(first).splitlines() or [""])[0][:200]
    ours = type(first).__module__.startswith("dnt_scale")
    return text if ours else f"{type(first).__name__}: {text}"


def git_commit(file: Path = Path(__file__)) -> str:
    """Return the commit of the checkout that ``file`` belongs to.

    It ends in ``-dirty`` when tracked files differ from it, and is "unknown" when ``file`` is not
    tracked by git (an installed package, even inside somebody's checkout) or git is absent. A copy
    made for SLURM jobs has it in a file COMMIT.
    """
    noted = file.parents[1] / "COMMIT"
    if noted.exists():
        return noted.read_text().strip()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
