"""What a process of ours begins with: nothing that lies in its working folder is taken for one of
its parts, it ends with the one that started it, and its threads and memory do not wait for others.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

# Python: no working folder on the path of modules; inherited by all that we start
CHILDREN = "PYTHONSAFEPATH"
PR_SET_PDEATHSIG = 1  # of Linux's prctl
SPINS = (
    "GOMP_SPINCOUNT"  # of the OpenMP that torch brings: rounds of waiting before a thread sleeps
)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_ours = False  # whether it was set here


def leave_folder_out() -> None:
    """Import nothing more from the working folder, here and in the Python processes that this one
    starts.

    ``python -m`` puts it first on the path, and so does an empty part of PYTHONPATH (``:/a/b``). It
    stays where PYTHONPATH names it, or where it holds our own packages (a checkout).
    """
    global _ours
    try:
        here = Path.cwd()
    except OSError:  # check_folder tells
        return
    root = Path(__file__).parent.parent
    parts = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    given = [part for part in parts if part]
    if here == root:
        given = given if str(root) in given else [*given, str(root)]
    elif here not in [Path(part).absolute() for part in given]:
        library = str(Path(os.__file__).parent)
        before = sys.path.index(library) if library in sys.path else len(sys.path)
        sys.path[:before] = [entry for entry in sys.path[:before] if entry not in ("", str(here))]
    os.environ["PYTHONPATH"] = os.pathsep.join(given)
    if not given:
        del os.environ["PYTHONPATH"]
    _ours = _ours or CHILDREN not in os.environ
    os.environ.setdefault(CHILDREN, "1")


def forget() -> None:
    """Undo it for processes that are not ours, such as those of a user's lines in a batch
    script.
    """
    if _ours:
        os.environ.pop(CHILDREN, None)


def check_folder() -> None:
    """Raises ValueError where the working folder is gone."""
    try:
        Path.cwd()
    except OSError as error:
        raise ValueError(
            f"the working folder is gone ({error.strerror}); `cd` to one that exists"
        ) from None


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel send this process SIGTERM when the one that started it ends.

    Args:
        parent: that one's id, to end at once where it ended before this call; None: not asked.
    """
    if _libc is None:
        return
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def let_threads_sleep() -> None:
    """Have OpenMP's threads soon sleep while they wait for each other, unless told otherwise.

    To be called before torch is imported. By default they spin for milliseconds, and beside other
    work a thread that spins takes the processor from the one it waits for. Not at once either: on
    an idle machine that costs three tenths of the speed (docs/lab-log.md has both).
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", SPINS}:
        os.environ[SPINS] = "1000"


def keep_memory() -> None:
    """Have glibc keep what is freed for what is allocated next.

    It gives blocks of megabytes back to the kernel and gets them anew page by page: a tenth of a
    training step on a CPU. Whatever the environment says of malloc counts.
    """
    given = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if _libc is not None and not given and hasattr(_libc, "mallopt"):
        largest = 2**31 - 1
        _libc.mallopt(M_TRIM_THRESHOLD, largest)
        _libc.mallopt(M_MMAP_THRESHOLD, largest)
