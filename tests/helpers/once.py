"""Folders that are made once for all workers of a test run, and only read."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

Once = Callable[[str, Callable[[Path], object]], Path]


def made_once(shared: Path, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder of this name in ``shared``, which whoever comes first fills with ``make``;
    the others wait for it.
    """
    folder, done = shared / f"once-{name}", shared / f"once-{name}.done"
    with (shared / f"once-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
