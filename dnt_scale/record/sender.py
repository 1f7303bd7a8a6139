"""The sender: passes what a run folder holds on to one backend, in a process of its own.

``python -m dnt_scale.record.sender RUN BACKEND``, started by
:mod:`dnt_scale.record.sender_process`. It ends when training has ended and all is sent, or when the
backend has not answered for two minutes after that. With ``--finalize STATUS`` it does the same for
a run that no process works on any more, see :mod:`dnt_scale.record.finalize`.

The file is read from its start, and what was sent is known by its step (``logs/BACKEND.json``), so
a sender can be killed and started at any point. Points that were sent but not noted are sent again,
the very same.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
import time
import traceback
from pathlib import Path
from typing import get_args

from dnt_scale.config.tracking_uri import without_login
from dnt_scale.record import appended
from dnt_scale.record.backend import Lost, Order, Status, TakenOver, load
from dnt_scale.record.files import flock, reason
from dnt_scale.record.metrics_file import METRICS, Point, unsent_points
from dnt_scale.record.sender_files import (
    Sent,
    is_finalized,
    lock_file,
    read_order,
    sizes_of,
)
from dnt_scale.record.training_process import (
    FINALIZE_S,
    GIVE_UP_S,
    EndedTraining,
    LiveTraining,
    Training,
    let_training_go_first,
)

SEND_EVERY_S = 1.5
APPENDED_EVERY_S = 5.0
FILES_EVERY_S = 30.0  # Goodput is sent as often.
LONGEST_PAUSE_S = 30.0  # Between tries while the backend does not answer.
HUNG_S = 45.0  # A call that takes so long beyond all patience hangs.
FOLDERS = ("plots", "profile")  # Of the run folder; their files are sent whole.
READ_BYTES = 1 << 20
POINTS_A_CALL = 1000
FILE_TRIES = 3  # Before it is said that files cannot be stored.

ALL_SENT, UNSENT, SUPERSEDED, AT_WORK = 0, 1, 3, 4  # Exit statuses.


class Superseded(Exception):
    """The run folder was started anew: its sender takes over."""


class Sender:
    """Passes one run folder on to a backend.

    ``send`` and ``end`` may raise whatever the backend raises, and may be called again then.
    """

    def __init__(self, run_dir: Path, order: Order, backend: str, *, live: bool) -> None:
        self.run_dir = run_dir
        self.order = order
        self.live = live
        self.answered_at = 0.0  # When the backend last did, on the monotonic clock.
        self.sent = Sent(run_dir, order, backend)
        self.backend = load(backend)(run_dir, order, self.sent, live=live)
        self.address = self.backend.address(order)
        self._file_failures = 0
        self.start_over()

    def start_over(self) -> None:
        """Open the backend anew, and read all files from their start."""
        self._opened = False
        self._offset = 0
        self._pending: list[Point] = []
        self._files_sent: dict[Path, int] = {}
        self._next_appended = self._next_files = 0.0

    def check_order(self) -> None:
        """Raise :class:`Superseded` when the run folder was started again since."""
        if read_order(self.run_dir).get("session") != self.order["session"]:
            raise Superseded

    def send(self) -> bool:
        """Send what is there, at most one call's worth; return whether there is more."""
        self.check_order()
        if not self._opened:
            self._open()
        more = self._read()
        if self._pending:
            self._send_points()
            return True
        if time.monotonic() >= self._next_appended:
            if self._send_appended():
                return True
            self._next_appended = time.monotonic() + APPENDED_EVERY_S
        if time.monotonic() >= self._next_files:
            self.backend.check_ours()
            self._try_files()
            self._send_goodput()
            self._next_files = time.monotonic() + FILES_EVERY_S
        return more

    def end(self, status: Status) -> None:
        """Tell the backend that the run has ended, then the last of all but steps."""
        sizes = sizes_of(self.run_dir)
        self.backend.check_ours()
        self.backend.end(status, self._ended_ms())
        while self._send_appended():
            self.check_order()
        self._send_goodput()
        if not self._try_files() and self._file_failures < FILE_TRIES:
            raise RuntimeError("the run's files could not be stored")  # All is tried again.
        self.sent.ended = {"status": status, "sizes": sizes}

    def _open(self) -> None:
        self.backend.open()
        if self.live:
            self.backend.mark_running()
            self.sent.ended = {"status": "RUNNING"}
        self.backend.describe()
        self.backend.check_ours()  # Two folders may have opened it at once.
        self._opened = True

    def _read(self) -> bool:
        """Take the next whole lines in, unless enough wait; return whether the file holds more."""
        path = self.run_dir / METRICS
        if len(self._pending) >= POINTS_A_CALL or not path.exists():
            return False
        with path.open("rb") as file:
            file.seek(self._offset)
            data = file.read(READ_BYTES)
        self.check_order()  # The file that was read is still the one this sender was started for.
        data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        now_ms = int(time.time() * 1000)
        for line in data.splitlines():
            points = unsent_points(line, self.sent.step, self.sent.names, now_ms)
            if points is None:
                print(f"skipped a line that is not a record: {line[:200]!r}", flush=True)
            self._pending += points or []
        return bool(data)

    def _send_points(self) -> None:
        # They are kept until the call succeeds, times included, to be the very same in the next.
        batch = self._pending[:POINTS_A_CALL]
        self.backend.log(batch)
        del self._pending[: len(batch)]
        last = batch[-1].step
        before = self.sent.names if last == self.sent.step else []
        names = before + [point.name for point in batch if point.step == last]
        self.sent.step, self.sent.names = last, names
        self.sent.save()

    def _send_appended(self) -> bool:
        """Send the next of what others than training have appended; return False where there is
        nothing.
        """
        sent = self.sent
        points, read_bytes = appended.read_new(self.run_dir, sent.bytes, POINTS_A_CALL)
        if read_bytes == sent.bytes:
            return False
        if points:
            self.backend.log(points)
        sent.bytes = read_bytes
        sent.save()
        return True

    def _send_goodput(self) -> None:
        from dnt_scale.record import goodput  # Its numpy and rich are for later than the start.

        now_ms, step = int(time.time() * 1000), max(0, self.sent.step)
        metrics = goodput.metrics(self.run_dir)
        if metrics:
            self.backend.log([Point(step, *metric, now_ms) for metric in metrics.items()])

    def _try_files(self) -> bool:
        """Send the files that changed; return False where that fails, which holds up no numbers."""
        try:
            self._send_files()
        except (Lost, TakenOver):
            raise
        except Exception as error:  # Whatever a store of files raises.
            print(without_login(self.address, traceback.format_exc()), flush=True)
            self._file_failures += 1
            if self._file_failures == FILE_TRIES:
                has = f"{self.backend.title} has the run's numbers"
                lacks = f"not all of its files ({reason(error)})"
                self.sent.notes.append(f"{has}, but {lacks}")
            return False
        self._file_failures = 0
        return True

    def _send_files(self) -> None:
        folders = [self.run_dir / name for name in FOLDERS]
        files = [path for folder in folders for path in sorted(folder.glob("[!.]*"))]
        for path in [self.run_dir / "config.yaml", *files]:
            if not path.is_file():
                continue
            changed = path.stat().st_mtime_ns
            if changed != self._files_sent.get(path):
                self.backend.store_file(path)
                self._files_sent[path] = changed

    def _ended_ms(self) -> int | None:
        """Return when the run gave its last sign, in milliseconds since 1970; None: now."""
        file = self.run_dir / METRICS
        return int(file.stat().st_mtime * 1000) if not self.live and file.exists() else None


def send_all(sender: Sender, training: Training) -> int:
    """Send until training has ended and all is sent; return the exit status."""
    over = threading.Event()
    watch = threading.Thread(target=_end_when_hung, args=(sender, training, over), daemon=True)
    watch.start()
    try:
        return _send_until_over(sender, training)
    finally:
        over.set()


def _send_until_over(sender: Sender, training: Training) -> int:
    failures = 0
    while True:
        # Asked before reading: no line is missed that was written before training ended.
        status = training.status()
        try:
            more = sender.send()
            if status and not more:
                sender.end(status)
            sender.sent.save()
            if not sender.answered_at and not status:
                let_training_go_first()  # Not before: people should soon see that it runs.
            sender.answered_at = time.monotonic()
            failures = 0
            if status and not more:
                return ALL_SENT
            pause = 0.0 if more else SEND_EVERY_S
        except Superseded:
            return SUPERSEDED
        except Lost as error:
            sender.start_over()
            failures += 1
            pause = min(2.0 ** (failures - 1), LONGEST_PAUSE_S) if failures > 1 else 0.0
            if failures > 1:  # It goes whatever is done: wait, as for any other failure.
                _report_failure(sender, error, to_user=True)
        except TakenOver:
            if sender.live:
                sender.start_over()
                continue
            # What there is to tell is the other folder's to tell.
            sender.sent.ended = {"status": status, "sizes": sizes_of(sender.run_dir)}
            sender.sent.save()
            return ALL_SENT
        except Exception as error:  # Whatever a library, a database or the network raises.
            failures += 1
            pause = min(2.0 ** (failures - 1), LONGEST_PAUSE_S)
            # One failed call in the middle of a run is not worth a warning.
            _report_failure(sender, error, to_user=failures > 1 or status is not None)
        if status and _silent_s(sender, training) > training.patience_s:
            return UNSENT
        training.wait(pause)


def _report_failure(sender: Sender, error: Exception, *, to_user: bool) -> None:
    print(without_login(sender.address, traceback.format_exc()), flush=True)
    if to_user:
        with contextlib.suppress(OSError):
            why, remedy = sender.backend.explain(error)
            sender.sent.save(without_login(sender.address, why), remedy)


def _silent_s(sender: Sender, training: Training) -> float:
    """Return the seconds since the end of training, or the backend's last answer after it."""
    return time.monotonic() - max(training.ended_at, sender.answered_at)


def _end_when_hung(sender: Sender, training: Training, over: threading.Event) -> None:
    """End this process where a call hangs, which should have a time limit of its own."""
    while not over.wait(1):
        silent_s = _silent_s(sender, training)
        if training.ended_at and silent_s > training.patience_s + HUNG_S:
            os._exit(UNSENT)


# --- the process ----------------------------------------------------------------------------------


def main(run_dir: Path, backend: str) -> int:
    """Be the sender of ``run_dir`` until training ends; return the exit status."""
    order = read_order(run_dir)
    if not order:
        return SUPERSEDED
    load(backend).prepare(order)
    training = LiveTraining(order["parent_pid"])
    with lock_file(run_dir, backend).open("wb") as lock:
        if not _wait_for_lock(lock.fileno(), training):
            return UNSENT
        return send_all(Sender(run_dir, order, backend, live=True), training)


def finalize_here(run_dir: Path, backend: str, status: Status) -> int:
    """Do in this process what :mod:`dnt_scale.record.finalize` wants; return the exit status."""
    order = read_order(run_dir)
    if is_finalized(run_dir, order, backend, status):
        return ALL_SENT
    load(backend).prepare(order)
    with lock_file(run_dir, backend).open("wb") as lock:
        if flock(lock.fileno()) is False:
            return AT_WORK
        return send_all(Sender(run_dir, order, backend, live=False), EndedTraining(status))


def finalize_sweep_here(run_dir: Path, backend: str, status: Status) -> int:
    """Do the same for the sweep that the run is part of."""
    order = read_order(run_dir)
    if load(backend).is_sweep_finalized(run_dir, order, status):
        return ALL_SENT
    load(backend).prepare(order)
    deadline = threading.Timer(FINALIZE_S + HUNG_S, os._exit, (UNSENT,))
    deadline.daemon = True
    deadline.start()
    try:
        load(backend).finalize_sweep(run_dir, order, status)
    except Exception:
        address = load(backend).address(order)
        print(without_login(address, traceback.format_exc()), flush=True)
        return UNSENT
    return ALL_SENT


def _wait_for_lock(lock: int, training: Training) -> bool:
    """Wait for an earlier start's sender to leave; return False when it does not in time."""
    while flock(lock) is False:
        if training.status() and time.monotonic() - training.ended_at > GIVE_UP_S:
            return False
        training.wait(0.2)
    return True


if __name__ == "__main__":
    command = "python -m dnt_scale.record.sender"
    parser = argparse.ArgumentParser(prog=command, description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("backend")
    ends = get_args(Status)
    parser.add_argument("--finalize", choices=ends, help="the run has ended with this status")
    parser.add_argument("--finalize-sweep", choices=ends, help="the sweep it is part of has")
    options = parser.parse_args()
    run, name = options.run_dir.absolute(), options.backend
    if options.finalize_sweep:
        raise SystemExit(finalize_sweep_here(run, name, options.finalize_sweep))
    if options.finalize:
        raise SystemExit(finalize_here(run, name, options.finalize))
    raise SystemExit(main(run, name))
