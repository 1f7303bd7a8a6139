"""`dnt sweep` for tests: its runs are forked from a process that has torch imported already."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from dnt_scale import startup
from dnt_scale.cli.main import main
from dnt_scale.sweep import one_run
from testbed.run import Ranks, _run_module


class Forked:
    """What of subprocess.Popen is asked for."""

    def __init__(self, overrides: Sequence[str], ranks: int, log: Path, env: dict[str, str]):
        assert ranks == 1
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                _become(log, env)
                _run_module("dnt_scale.train", overrides)
            except SystemExit as end:
                status = int(end.code or 0)
            finally:
                sys.stderr.flush()
                os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _become(log: Path, env: dict[str, str]) -> None:
    os.setsid()
    startup.end_with_parent()
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.closerange(3, 1024)
    os.environ.clear()
    os.environ.update(env)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)


def _sweep(*words: str) -> None:
    one_run.start = Forked  # type: ignore[assignment]
    sys.exit(main(["sweep", *words]))


def start_sweep(*words: object) -> Ranks:
    """Start `dnt sweep` in a process of its own."""
    return Ranks(_sweep, tuple(map(str, words)), 1, {})
