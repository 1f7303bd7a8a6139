"""Whether a process has ended: real processes."""

import os
import subprocess
import sys
import time

import psutil

from dnt_scale.distributed.host import has_ended, machine, start_ticks


def test_a_process_lives_until_it_ends() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    started = start_ticks(child.pid)
    assert started > start_ticks(os.getpid()) > 0
    assert not has_ended(child.pid, started, machine())
    assert not has_ended(child.pid, 0, machine())
    child.kill()
    deadline = time.monotonic() + 60
    while (
        psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    assert has_ended(child.pid, started, machine())  # only its exit status is left
    child.wait()
    assert has_ended(child.pid, started, machine())
    assert has_ended(child.pid, 0, machine())
    assert start_ticks(child.pid) == 0


def test_another_process_with_its_number_is_not_it() -> None:
    assert has_ended(os.getpid(), start_ticks(os.getpid()) - 1, machine())


def test_nothing_is_known_of_other_machines() -> None:
    assert not has_ended(1 << 22, 1, "elsewhere")
