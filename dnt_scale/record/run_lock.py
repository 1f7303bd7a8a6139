"""One writer of a run folder at a time, whoever it is: ``RUN/.lock``.

The file holds who writes, as JSON: host, pid, when that process was started, since when, and what it is. Its holder has
an flock on it for as long as it lives, and gives a sign of life by touching it every ``BEAT_S``. A newcomer that is

- refused the flock is told who holds it;
- given it while a record still stands there finds a holder that is gone, or machines between which locks do not work.
  On the same machine the process itself is looked for; from another one the file is watched for as long as three signs
  of life take, by its own changes, for the clocks of two machines differ.

Where a file system has no flock, record and sign of life decide alone. Whoever holds a lock and finds another's record
in it (it was stopped for so long that another machine took over) ends at once. At the end the record is emptied.
"""

import contextlib
import errno
import fcntl
import os
import socket
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
from dnt_scale.record.files import warn

FILE = ".lock"
BEAT_S = 5.0
BEATS = 3  # without one of which a holder on another machine is gone
SETTLE_S = 1.0  # until two who wrote their records at once both read the one that stays
LEAVING_S = 2.0  # that a process which is ending may hold its flock for
LOOK_S = 0.25
ALIKE_S = 5.0  # the same process's start, as two ask for it
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
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
    created: float  # when the process was started, by its machine's clock
    machine: str  # where process numbers mean the same
    since: str
    what: str  # "training", or the command
    attempt: str = ""  # of a SLURM job: JOB.RESTART
    ranks: int = 1
    token: str = ""  # no other record has it
    inode: int = 0  # of the file that it was written into: a copy of the folder has another

    @property
    def in_words(self) -> str:
        by = f"pid {self.pid} on {self.host} since {self.since}"
        job = f"job {self.attempt.partition('.')[0]}" if self.attempt else ""
        more = [job] * bool(job) + [f"{self.ranks} ranks"] * (self.ranks > 1)
        return by + (f" ({', '.join(more)})" if more else "")


def this_process(what: str, ranks: int = 1) -> Holder:
    return Holder(
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        pid=os.getpid(),
        created=psutil.Process().create_time(),
        machine=machine(),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        what=what,
        attempt=os.environ.get("DNT_ATTEMPT", ""),
        ranks=ranks,
        token=uuid.uuid4().hex,
    )


def machine() -> str:
    """A name for this kernel and its set of process numbers (containers have their own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


class Lock:
    """A run folder's lock, held by this process; made by :func:`take`."""

    def __init__(self, path: Path, descriptor: int, holder: Holder, made: list[Path]) -> None:
        self.path = path
        self.holder = holder
        self.made = made  # the file and the folders that were not there before
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
            with contextlib.suppress(OSError, ValueError):  # a server that does not answer is no reason to end
                os.utime(self._descriptor)
                found = _read(self._descriptor, self.path)
                if found and found.token != self.holder.token and not self._over.is_set():
                    print(
                        f"error: run.dir: {self.path.parent} was taken over by {found.in_words} while this process "
                        "gave no sign of life; it ends here",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)

    def release(self) -> None:
        """Let others write. What a start that was refused has made (file, folders) is removed. Raises nothing."""
        if self._over.is_set():
            return
        self._over.set()
        self._beating.join(BEAT_S)
        with contextlib.suppress(OSError, ConfigError):
            if self.made and _stamp(self.path.with_name("config.yaml")) == self._config:  # nothing was begun
                self._unmake()
            if (found := _read(self._descriptor, self.path)) and found.token == self.holder.token:
                os.ftruncate(self._descriptor, 0)
        with contextlib.suppress(OSError):
            os.close(self._descriptor)

    def _unmake(self) -> None:
        if _is_at(self._descriptor, self.path):
            self.path.unlink()
            for folder in self.made[1:]:
                folder.rmdir()  # or OSError: another has put something there


def take(run_dir: Path, holder: Holder, *, patience_s: float = 0.0, field: str = "run.dir") -> Lock:
    """Become the one writer of ``run_dir``, which is made when missing.

    Args:
        field: the setting that names the folder, for messages.
        patience_s: how long to wait for an earlier attempt of the same job, or for a command that will soon be over.

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
        if other and not _gone(other):
            passing = other.what != "training" or (other.attempt and other.attempt != holder.attempt)
            if not (patience_s and passing):
                raise HeldError(refusal(run_dir, other, field))
            if at > deadline:
                raise HeldFault(refusal(run_dir, other, field))
            moving()
        elif at > max(leaving, deadline):
            by = other.in_words if other else "a process that wrote no record"
            raise HeldError(
                f"{field}: {run_dir} is locked by what {by} left behind; `fuser {run_dir / FILE}` may name it: end it, "
                "or take another run.name"
            )
        time.sleep(LOOK_S)


def refusal(run_dir: Path, other: Holder, field: str = "run.dir") -> str:
    if other.what == "training":
        does, instead = ("trained", "run.name") if field == "run.dir" else ("written", field)
        by = f"{field}: {run_dir} is being {does} by {other.in_words}"
        return f"{by}: wait for it, stop it, or take another {instead}"
    return f"{field}: {run_dir} is being written by `{other.what}`, {other.in_words}: wait for it"


def look(run_dir: Path) -> Holder | None:
    """Who writes ``run_dir`` now, if anybody; nothing is changed.

    Raises:
        ConfigError: the lock is somebody else's file.
    """
    path = run_dir / FILE
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        locks = _flock(descriptor, fcntl.LOCK_SH)
        found = _read(descriptor, path)
        if found is None or (locks is not False and not _lives(path, found)):
            return None
        return found
    finally:
        os.close(descriptor)


def check_free(run_dir: Path) -> None:
    """Raises HeldError while a process writes ``run_dir``."""
    if other := look(run_dir):
        raise HeldError(refusal(run_dir, other))


@contextlib.contextmanager
def held(run_dir: Path, what: str) -> Iterator[None]:
    """Be the one writer for the length of a block of the command ``what``. Raises as :func:`take`."""
    with take(run_dir, this_process(what)):
        yield


# --- the parts --------------------------------------------------------------------------------------------------------


def _try(run_dir: Path, holder: Holder, field: str) -> tuple[Lock | None, Holder | None]:
    """The lock, or who has it as far as its record tells. Raises ConfigError as :func:`take`."""
    path = run_dir / FILE
    try:
        descriptor, made = _open(path)
    except OSError as error:
        place = path if os.path.lexists(path) else run_dir
        raise ConfigError(
            f"{field}: nothing can be written to {place} ({error.strerror or error}); give another"
        ) from None
    keep = False
    try:
        locks = _flock(descriptor, fcntl.LOCK_EX)
        other = _read(descriptor, path)
        if locks is False or not _is_at(descriptor, path):
            return None, other
        if other:
            if _lives(path, other):
                return None, other
            if _read(descriptor, path) != other:  # somebody was quicker
                return None, None
            warn(f"{run_dir} was left locked by {other.in_words}, which is gone; it is taken over")
        holder = replace(holder, inode=os.fstat(descriptor).st_ino)
        _write(descriptor, holder)
        if locks is None:
            time.sleep(SETTLE_S)
            if _read(descriptor, path) != holder or not _is_at(descriptor, path):
                return None, _read(descriptor, path)
        keep = True
        return Lock(path, descriptor, holder, made), None
    except OSError as error:
        raise ConfigError(f"{field}: {path} cannot be written ({error.strerror or error}); give another") from None
    finally:
        if not keep:
            os.close(descriptor)


def _open(path: Path) -> tuple[int, list[Path]]:
    """The open file, and what had to be made for it. Raises OSError."""
    missing = [place for place in (path.parent, *path.parent.parents) if not place.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_EXCL, 0o644), [path, *missing]
    except FileExistsError:
        return os.open(path, flags, 0o644), []


def _flock(descriptor: int, kind: int) -> bool | None:
    """Whether it was granted; None where there are no such locks. Raises OSError."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        there = path.stat()
    except OSError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _read(descriptor: int, path: Path) -> Holder | None:
    """The record; None where it is empty, or came with a copy. Raises ConfigError for a file not of ours, OSError."""
    text = os.pread(descriptor, MOST_BYTES, 0).strip(b"\0 \n")
    if not text:
        return None
    try:
        found = orjson.loads(text)
        holder = Holder(**{field.name: found[field.name] for field in fields(Holder)})
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"run.dir: {path} is no lock of dnt's; move it away, or take another run.dir") from None
    return holder if holder.inode == os.fstat(descriptor).st_ino else None


def _write(descriptor: int, holder: Holder) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, orjson.dumps(asdict(holder)), 0)
    with contextlib.suppress(OSError):  # not every file system can
        os.fsync(descriptor)


def _gone(other: Holder) -> bool:
    """Whether it was a process of this machine that has ended."""
    return other.machine == machine() and not _alive(other)


def _alive(other: Holder) -> bool:
    try:
        process = psutil.Process(other.pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return False
        return abs(process.create_time() - other.created) < ALIKE_S
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _lives(path: Path, other: Holder) -> bool:
    """Whether the process of a record lives, though its flock, if there is such a thing here, is not in force."""
    if other.machine == machine():
        return _alive(other)
    warn(f"{path} is of {other.in_words}; looking for {BEATS * BEAT_S:.0f} s whether that lives")
    first, until = _stamp(path), time.monotonic() + BEATS * BEAT_S + LOOK_S
    while time.monotonic() < until:
        time.sleep(LOOK_S)
        moving()
        if _stamp(path) != first:
            return True
    return False


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes with each write or touch of a file; it is opened, so that NFS asks its server."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        return found.st_ino, found.st_mtime_ns, found.st_size
    finally:
        os.close(descriptor)
