"""Files that are whole or not there, locks, and room on disks."""

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it: `path` is whole or not there. Raises
    OSError."""
    # The name is random, for processes of several machines may make the same file in one folder.
    beside = path.with_name(f"{path.stem}.{secrets.token_hex(8)}.tmp{path.suffix}")
    try:
        write(beside)
        beside.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until what was written to a file, or which names are in a folder, is on disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def file_lock(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a lock on a file (flock), which is made where it is not there, for as long as the block
    takes.

    Args:
        shared: several may hold it at once, but none alone.
        wait: until it can be had, rather than raise.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file cannot be made, or its file system has no locks.
    """
    with path.open("wb") as lock:
        fcntl.flock(
            lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        )
        yield


def nearest_existing(path: Path) -> Path:
    """Return the path itself, or the nearest folder above it that there is."""
    place = path.absolute()
    return next(above for above in (place, *place.parents) if above.exists())


def free_bytes(path: Path) -> int:
    """Return the room on the disk that holds a path, or is going to. Quotas are not seen. Raises
    OSError."""
    return shutil.disk_usage(nearest_existing(path)).free
