"""One writer of a run folder at a time, whoever it is: ``RUN/.lock``.

The file holds who writes, as JSON: host, pid, when that process was started, since when, and what
it is. Its holder has an flock on it for as long as it lives, and gives a sign of life by touching
it every ``BEAT_S``. A newcomer that is

- refused the flock is told who holds it;
- given it while a record still stands there finds a holder that has ended, or machines between
  which locks do not work. On the same machine the process itself is looked for; from another one
  the file is watched for as long as three signs of life take, by its own changes, for the clocks
  of two machines differ.

Where a file system has no flock, record and sign of life decide alone. Whoever holds a lock and
finds another's record in it (it was stopped for so long that another machine took over) ends at
once. At the end the record is emptied.
"""

import contextlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Self

import orjson
import psutil

from dnt_scale.config.base import ConfigError
from dnt_scale.distributed.errors import Fault
from dnt_scale.distributed.heartbeat import moving
from dnt_scale.distributed.host import has_ended, host, machine, start_ticks
from dnt_scale.record.files import flock, warn

FILE = ".lock"
BEAT_S = 5.0
BEATS = 3  # A holder on another machine that gives none of these has ended.
RACE_S = 1.0  # Two who wrote their records at once both read the one that stays after this.
LEAVING_S = 2.0  # A process that is ending may hold its flock for so long.
POLL_S = 0.25
SAME_START_S = 5.0  # psutil's times of one process's start differ by less, unless the clock is set.
MOST_BYTES = 4096


class HeldError(ConfigError):
    """Another process writes the run folder."""


class HeldFault(Fault, HeldError):
    """An earlier attempt of the same job seems to, which another try may find gone."""


@dataclass(frozen=True)
class Holder:
    """Who writes a run folder: the record in its lock."""

    host: str
    pid: int
    created: float  # When the process was started by its machine's clock, for an older dnt.
    machine: str  # Process numbers mean the same there.
    since: str
    what: str  # "training", or the command
    attempt: str = ""  # A SLURM job's name for it, JOB.RESTART.
    ranks: int = 1
    token: str = ""  # No other record has the same.
    inode: int = 0  # The file's that it was written into: a copy of the folder has another.
    started: int = 0  # When the process was started, in clock ticks since boot; 0: an older dnt's.

    @property
    def description(self) -> str:
        by = f"pid {self.pid} on {self.host} since {self.since}"
        job = f"job {self.attempt.partition('.')[0]}" if self.attempt else ""
        more = [job] * bool(job) + [f"{self.ranks} ranks"] * (self.ranks > 1)
        return by + (f" ({', '.join(more)})" if more else "")


def this_process(what: str, ranks: int = 1) -> Holder:
    """Return the record of this process, which writes as ``what``."""
    return Holder(
        host=host(),
        pid=os.getpid(),
        created=psutil.Process().create_time(),
        machine=machine(),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        what=what,
        attempt=os.environ.get("DNT_ATTEMPT", ""),
        ranks=ranks,
        token=uuid.uuid4().hex,
        started=start_ticks(os.getpid()),
    )


class Lock:
    """A run folder's lock, held by this process. :func:`take` makes it."""

    def __init__(self, path: Path, descriptor: int, holder: Holder, made: list[Path]) -> None:
        self.path = path
        self.holder = holder
        self.made = made  # The file and the folders that were not there before.
        self._descriptor = descriptor
        self._config = _stamp(path.with_name("config.yaml"))
        self._over = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._beating.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            # A file server that does not answer is no reason to end.
            with contextlib.suppress(OSError, ValueError):
                os.utime(self._descriptor)
                found = _read(self._descriptor, self.path)
                if found and found.token != self.holder.token and not self._over.is_set():
                    print(
                        f"error: run.dir: {self.path.parent} was taken over by "
                        f"{found.description} while this process gave no sign of life; it ends "
                        "here",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)

    def release(self) -> None:
        """Let others write, and remove what a start that was refused has made. Raises nothing."""
        if self._over.is_set():
            return
        self._over.set()
        self._beating.join(BEAT_S)
        with contextlib.suppress(OSError, ConfigError):
            begun = _stamp(self.path.with_name("config.yaml")) != self._config
            if self.made and not begun:
                self._unmake()
            found = _read(self._descriptor, self.path)
            if found and found.token == self.holder.token:
                os.ftruncate(self._descriptor, 0)
        with contextlib.suppress(OSError):
            os.close(self._descriptor)

    def _unmake(self) -> None:
        if _is_at(self._descriptor, self.path):
            self.path.unlink()
            for folder in self.made[1:]:
                folder.rmdir()  # Or OSError, which ends this: another has put something there.


def take(run_dir: Path, holder: Holder, *, patience_s: float = 0.0, field: str = "run.dir") -> Lock:
    """Become the one writer of ``run_dir``, which is made when missing.

    Args:
        field: the setting that names the folder, for messages.
        patience_s: how long to wait for an earlier attempt of the same job, or for a command that
            will soon be over.

    Raises:
        HeldError: another process is; HeldFault where ``patience_s`` was not enough.
        ConfigError: nothing can be written there, or the file is somebody else's.
    """
    deadline, leaving = time.monotonic() + patience_s, time.monotonic() + LEAVING_S
    while True:
        lock, other = _try(run_dir, holder, field)
        if lock:
            return lock
        at = time.monotonic()
        if other and not _has_ended(other):
            earlier_attempt = other.attempt and other.attempt != holder.attempt
            passing = other.what != "training" or earlier_attempt
            if not (patience_s and passing):
                raise HeldError(refusal(run_dir, other, field))
            if at > deadline:
                raise HeldFault(refusal(run_dir, other, field))
            moving()
        elif at > max(leaving, deadline):
            by = other.description if other else "a process that wrote no record"
            raise HeldError(
                f"{field}: {run_dir} is locked by what {by} left behind; `fuser {run_dir / FILE}` "
                "may name it: end it, or take another run.name"
            )
        time.sleep(POLL_S)


def refusal(run_dir: Path, other: Holder, field: str = "run.dir") -> str:
    """Return what is said to whom ``other`` keeps from writing."""
    if other.what == "training":
        does, instead = ("trained", "run.name") if field == "run.dir" else ("written", field)
        by = f"{field}: {run_dir} is being {does} by {other.description}"
        return f"{by}: wait for it, stop it, or take another {instead}"
    by = f"`{other.what}`, {other.description}"
    return f"{field}: {run_dir} is being written by {by}: wait for it"


def current_holder(run_dir: Path) -> Holder | None:
    """Return who writes ``run_dir`` now; None where nobody does. Changes nothing.

    Raises:
        ConfigError: the lock is somebody else's file.
    """
    path = run_dir / FILE
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        locks = flock(descriptor, shared=True)
        found = _read(descriptor, path)
        if found is None or (locks is not False and not _lives(path, found)):
            return None
        return found
    finally:
        os.close(descriptor)


def check_free(run_dir: Path) -> None:
    """Raise HeldError while a process writes ``run_dir``."""
    if other := current_holder(run_dir):
        raise HeldError(refusal(run_dir, other))


@contextlib.contextmanager
def held(run_dir: Path, what: str) -> Iterator[None]:
    """Be the one writer for a block of the command ``what``. Raises as :func:`take`."""
    with take(run_dir, this_process(what)):
        yield


# --- the parts ------------------------------------------------------------------------------------


def _try(run_dir: Path, holder: Holder, field: str) -> tuple[Lock | None, Holder | None]:
    """Return the lock, or who has it as its record tells. Raises ConfigError as :func:`take`."""
    path = run_dir / FILE
    try:
        descriptor, made = _open(path)
    except OSError as error:
        place = path if os.path.lexists(path) else run_dir
        what = f"nothing can be written to {place} ({error.strerror or error})"
        raise ConfigError(f"{field}: {what}; give another") from None
    keep = False
    try:
        locks = flock(descriptor)
        other = _read(descriptor, path)
        if locks is False or not _is_at(descriptor, path):
            return None, other
        if other:
            if _lives(path, other):
                return None, other
            if _read(descriptor, path) != other:  # Somebody was quicker.
                return None, None
            by = f"{other.description}, which is gone"
            warn(f"{run_dir} was left locked by {by}; it is taken over")
        holder = replace(holder, inode=os.fstat(descriptor).st_ino)
        _write(descriptor, holder)
        if locks is None:
            time.sleep(RACE_S)
            if _read(descriptor, path) != holder or not _is_at(descriptor, path):
                return None, _read(descriptor, path)
        keep = True
        return Lock(path, descriptor, holder, made), None
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"{field}: {path} cannot be written ({why}); give another") from None
    finally:
        if not keep:
            os.close(descriptor)


def _open(path: Path) -> tuple[int, list[Path]]:
    """Return the open file, and what had to be made for it. Raises OSError."""
    missing = [place for place in path.parents if not place.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_EXCL, 0o644), [path, *missing]
    except FileExistsError:
        return os.open(path, flags, 0o644), []


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether the open file is still the one of that name."""
    try:
        there = path.stat()
    except OSError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _read(descriptor: int, path: Path) -> Holder | None:
    """Return the record; None where it is empty, or came with a copy of the folder.

    Raises:
        ConfigError: the file is none of ours.
        OSError: it cannot be read.
    """
    text = os.pread(descriptor, MOST_BYTES, 0).strip(b"\0 \n")
    if not text:
        return None
    try:
        found = {"started": 0, **orjson.loads(text)}
        holder = Holder(**{field.name: found[field.name] for field in fields(Holder)})
    except (ValueError, KeyError, TypeError):
        what = f"{path} is no lock of dnt's"
        raise ConfigError(f"run.dir: {what}; move it away, or take another run.dir") from None
    return holder if holder.inode == os.fstat(descriptor).st_ino else None


def _write(descriptor: int, holder: Holder) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, orjson.dumps(asdict(holder)), 0)
    with contextlib.suppress(OSError):  # Not every file system can.
        os.fsync(descriptor)


def _has_ended(other: Holder) -> bool:
    """Return whether it was a process of this machine that has ended."""
    if other.started or other.machine != machine():
        return has_ended(other.pid, other.started, other.machine)
    try:  # An older dnt noted the time by the clock only.
        started = psutil.Process(other.pid).create_time()
        return abs(started - other.created) >= SAME_START_S or has_ended(other.pid, 0, machine())
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def _lives(path: Path, other: Holder) -> bool:
    """Return whether the process of a record lives, though its flock is not in force here."""
    if other.machine == machine():
        return not _has_ended(other)
    seconds = f"{BEATS * BEAT_S:.0f} s"
    warn(f"{path} is of {other.description}; looking for {seconds} whether that lives")
    first, until = _stamp(path), time.monotonic() + BEATS * BEAT_S + POLL_S
    while time.monotonic() < until:
        time.sleep(POLL_S)
        moving()
        if _stamp(path) != first:
            return True
    return False


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what changes with each write or touch of a file.

    Opens it, so that NFS asks its server.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        return found.st_ino, found.st_mtime_ns, found.st_size
    finally:
        os.close(descriptor)
