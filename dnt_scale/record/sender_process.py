"""A sender as training sees it: started, watched, told of the end, and waited for."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dnt_scale.config.tracking_uri import without_login
from dnt_scale.record.backend import Order, Status, load
from dnt_scale.record.files import warn
from dnt_scale.record.metrics_file import METRICS
from dnt_scale.record.sender_files import log_file, read_report, unsent_lines

CHECK_EVERY_S = 2.0  # Between two readings of what the sender reports.
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SENDER = "dnt_scale.record.sender"


def sender_command(run_dir: Path, backend: str, *options: str) -> list[str]:
    """Return how a sender is started."""
    return module_command(SENDER, str(run_dir), backend, *options)


def module_command(module: str, *arguments: str, first: str = "pass") -> list[str]:
    """Return how a module of ours is run in a process beside training.

    It comes out of this very copy of the packages, and takes nothing of the working folder. The
    packages may lie in that folder, beside files that are named like modules of other packages, so
    it is searched last.

    Args:
        first: a statement that the process begins with, once it can import what is ours.
    """
    packages = str(Path(__file__).parents[2])
    find = (
        "import runpy, sys; packages = sys.argv.pop(1); sys.path.insert(0, packages)",
        "import dnt_scale, data_prep",
        first,
        f"sys.path.append(sys.path.pop(0)); runpy.run_module({module!r}, None, '__main__', True)",
    )
    return [sys.executable, "-P", "-c", "; ".join(find), packages, *arguments]


def sender_environment() -> dict[str, str]:
    """Return this process's environment without a rank's variables.

    Nothing is imported from the working folder with it.
    """
    prefixes = ("LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "NCCL_")
    ranks = ("RANK", "WORLD_SIZE", *prefixes)
    env = {name: value for name, value in os.environ.items() if not name.startswith(ranks)}
    env["CUDA_VISIBLE_DEVICES"] = ""
    folders = env.pop("PYTHONPATH", "").split(os.pathsep)
    if kept := [folder for folder in folders if not _is_working_folder(folder)]:
        env["PYTHONPATH"] = os.pathsep.join(kept)
    return env


def _is_working_folder(folder: str) -> bool:
    try:
        return Path(folder).samefile(".")
    except OSError:
        return False


class SenderProcess:
    """The sender of one run to one backend. One that cannot be started is only warned of."""

    def __init__(self, run_dir: Path, backend: str, order: Order) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.warned = False  # The user knows that nothing is taken.
        self._run_dir = run_dir
        self._backend = backend
        self._session = order["session"]
        self._title = load(backend).title
        self._place = f"{self._title} at {without_login(load(backend).address(order))}"
        self._kept = f"Every line is kept in {run_dir / METRICS} and sent later."
        self._log = log_file(run_dir, backend)
        self._next_check = 0.0
        self._notes_shown = 0
        self._start()

    def _start(self) -> None:
        # A scheduler's signals reach every process of a job. The sender inherits this mask and does
        # not see them: it ends by itself, when training has. Training gets what arrives meanwhile
        # when the mask is lifted again.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
        try:
            with self._log.open("ab") as log:
                self.process = subprocess.Popen(
                    sender_command(self._run_dir, self._backend),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=sender_environment(),
                    start_new_session=True,  # The Ctrl-C that is meant for training misses it.
                )
        except OSError as error:
            what = f"{self._title} is off for this start, its sender cannot run: {error}."
            warn(f"{what} {self._kept}")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def check(self) -> None:
        """Tell the user when the backend stops taking lines, and when it takes them again."""
        if self.process is None or time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + CHECK_EVERY_S
        report = self._report()
        self._show_notes(report)
        error, remedy = report.get("error"), report.get("remedy")
        if self.process.poll() is not None:
            code = f"its sender ended with exit code {self.process.returncode}"
            error = error or f"{code}, see {self._log}"
        if error and not self.warned:
            what = f"nothing ({error}). {remedy}" if remedy else f"nothing now ({error})."
            warn(f"{self._place} takes {what} Training goes on. {self._kept}")
            self.warned = True
        elif self.warned and report and not error:
            warn(f"{self._place} answers again; the lines kept meanwhile are being sent.")
            self.warned = False

    def _report(self) -> dict[str, Any]:
        """Return what this start's sender reported last; empty before its first report."""
        report = read_report(self._run_dir, self._backend)
        return report if report.get("session") == self._session else {}

    def _show_notes(self, report: dict[str, Any]) -> None:
        notes = report.get("notes", [])
        for note in notes[self._notes_shown :]:
            warn(note)
        self._notes_shown = max(self._notes_shown, len(notes))

    def tell_end(self, status: Status) -> None:
        """Tell the sender how training ended."""
        if self.process is None:
            return
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # The sender is gone, which the user hears from wait.
            self.process.stdin.write(status.encode() + b"\n")
            self.process.stdin.flush()
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def wait(self, since: float, timeout_s: float) -> None:
        """Wait until all is sent or the backend refuses; what is unsent then is warned of.

        Args:
            since: when the sender was told of the end, in seconds since 1970.
            timeout_s: how long to wait, from then on.
        """
        if self.process is None:
            return
        deadline = time.monotonic() + timeout_s - (time.time() - since)
        why, remedy = f"not within {timeout_s:g} s, its sender goes on", ""
        while self.process.poll() is None and time.monotonic() < deadline:
            report = self._report()
            if report.get("error") and report["time"] > since:
                why, remedy = report["error"], report.get("remedy", "")
                break
            time.sleep(0.05)
        report = self._report()
        self._show_notes(report)
        if self.process.returncode == 0:
            return
        if (code := self.process.returncode) is not None:
            why = report.get("error") or f"its sender ended with exit code {code}"
            remedy = report.get("remedy", "")
        self._warn_unsent(why, f"{remedy} Then the" if remedy else "The")

    def _warn_unsent(self, why: str, then: str) -> None:
        unsent = unsent_lines(self._run_dir, self._backend)
        lines = f"{unsent} lines of {self._run_dir / METRICS} are"
        what = lines if unsent else f"the end of {self._run_dir} is"
        sends = f"same `dnt train` command sends {'them' if unsent else 'it'}"
        not_yet = f"not in {self._place} yet ({why})"
        warn(f"{what} {not_yet}. {then} {sends}; details in {self._log}.")


def tell_end(senders: Sequence[SenderProcess], status: Status, timeout_s: float) -> None:
    """Tell all senders how training ended, and wait up to ``timeout_s`` seconds for all of them."""
    since = time.time()
    for sender in senders:
        sender.tell_end(status)
    for sender in senders:
        sender.wait(since, timeout_s)
