"""The training process as its sender knows it: at work or how it ended, and not to be disturbed."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Protocol, get_args

from dnt_scale.record.backend import Status

GIVE_UP_S = 120.0  # A sender tries for so long after training, or after the last answer since.
FINALIZE_S = 8.0  # A sender that only finalizes tries for so long.
LONGEST_WAIT_S = 5.0  # After the end of training.


class Training(Protocol):
    """Whether training is at work, and how it ended."""

    patience_s: float  # How long its sender goes on after the end without an answer.
    ended_at: float  # On the monotonic clock; 0 while it is at work.

    def status(self) -> Status | None:
        """Return how training ended; None while it is at work."""

    def wait(self, seconds: float) -> None:
        """Wait, but not past the end of training, and after it not for long."""


class LiveTraining:
    """The process that has started this one, and says through a pipe how it ends."""

    def __init__(self, pid: int) -> None:
        self.patience_s = GIVE_UP_S
        self.ended_at = 0.0
        self._pid = pid
        self._status: Status | None = None
        self._has_ended = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        """Hear how training ended; where it does so without a word, it was killed."""
        # This is not sys.stdin: a thread waiting in that makes the interpreter abort at its end.
        word = os.read(0, 64).decode().strip()
        known: tuple[Status, ...] = get_args(Status)
        self._note_end(next((status for status in known if status == word), "KILLED"))

    def _note_end(self, status: Status) -> None:
        self._status = self._status or status
        self.ended_at = self.ended_at or time.monotonic()
        self._has_ended.set()
        set_session_nice(0)  # Nobody is disturbed any more.

    def status(self) -> Status | None:
        """Return what was heard of the end; KILLED where the process is gone without a word."""
        # A child that training forked may hold the pipe open after training was killed. A last word
        # that is still in the pipe comes first.
        if not self._status and os.getppid() != self._pid and not self._has_ended.wait(1):
            self._note_end("KILLED")
        return self._status

    def wait(self, seconds: float) -> None:
        """Wait as :class:`Training` says."""
        if self._status:
            time.sleep(min(seconds, LONGEST_WAIT_S))
        else:
            self._has_ended.wait(seconds)


class EndedTraining:
    """A run that no process works on: it ended with ``status``, whoever found that out."""

    def __init__(self, status: Status) -> None:
        self.patience_s = FINALIZE_S
        self.ended_at = time.monotonic()
        self._status = status

    def status(self) -> Status:
        """Return how the run ended."""
        return self._status

    def wait(self, seconds: float) -> None:
        """Wait, but not for long."""
        time.sleep(min(seconds, LONGEST_WAIT_S))


def let_training_go_first() -> None:
    """Lower the priority of this process and of its session."""
    os.nice(10)
    set_session_nice(10)


def set_session_nice(nice: int) -> None:
    """Set what this process's session may take from others.

    Linux may weigh sessions against each other, whatever the priorities of their processes.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(nice))
