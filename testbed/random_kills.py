"""A command that goes on where it was, killed by kill -9 at random moments and started again."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

NEVER = float("inf")
POLL_S = 0.1


class Kill(NamedTuple):
    """A kill -9: after so many seconds of processor time, of whom, and what lay in the folder then,
    a number of files of each kind."""

    seconds: float
    who: str
    left: dict[str, int]


class Ended(NamedTuple):
    """How a run ended: its exit status, whether it was killed, and the seconds of processor time
    that it and its children took, as far as was seen."""

    status: int
    killed: bool
    seconds: float


def run_until(
    command: Sequence[str], seconds: float, who: str, environment: dict[str, str]
) -> Ended:
    """Run a command, and once it has taken so many seconds of processor time kill it: "main", the
    process itself; "all", with its children; "worker", the youngest of them. Returns when all of
    them are gone.

    Processor time, for on a machine with other work most moments of the clock find a process that
    still imports.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    took: dict[int, float] = {}
    while process.poll() is None:
        below = _note_times(process.pid, took)
        if sum(took.values()) < seconds:
            time.sleep(POLL_S)
            continue
        with contextlib.suppress(ProcessLookupError):
            if who == "all":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                chosen = below[-1].pid if who == "worker" and below else process.pid
                os.kill(chosen, signal.SIGKILL)
        status = process.wait()
        psutil.wait_procs(below, 60)  # those without a parent end by themselves, a moment later
        return Ended(status, True, sum(took.values()))
    return Ended(process.returncode, False, sum(took.values()))


def _note_times(pid: int, took: dict[int, float]) -> list[psutil.Process]:
    """Note the processor time of a process and of those below it, which are returned."""
    try:
        main = psutil.Process(pid)
        below = main.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    for each in (main, *below):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            took[each.pid] = times.user + times.system
    return below


def kill_at_random(
    command: Sequence[str],
    out: Path,
    kills: int,
    within: float,
    seed: int,
    finished: Callable[[], None],
    environment: dict[str, str] | None = None,
) -> list[Kill]:
    """Kill a command so many times, each time at a moment of its first ``within`` seconds of
    processor time, and start it again where it was; at the end let it finish.

    Args:
        out: what it makes, which holds manifest.json once it is whole.
        finished: called each time that it is whole, also between kills; it may look at ``out`` and
            has to remove it.

    Raises AssertionError where a run that nobody killed does not end with status 0.
    """
    draw = random.Random(seed)
    environment = dict(os.environ) if environment is None else environment
    done: list[Kill] = []
    while len(done) < kills or out.exists():
        last = len(done) == kills
        seconds, who = draw.uniform(0, within), draw.choice(("main", "all", "worker"))
        ended = run_until(command, NEVER if last else seconds, who, environment)
        if ended.killed:
            done.append(Kill(ended.seconds, who, left_in(out)))
        else:
            assert ended.status == 0, f"status {ended.status}, though nobody killed it"
        if (out / "manifest.json").exists():
            finished()
    return done


def left_in(folder: Path) -> dict[str, int]:
    """Return how many files of each kind, by what a name ends in, lie below a folder."""
    found: dict[str, int] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            kind = "".join(path.suffixes[-2:]) or path.name
            found[kind] = found.get(kind, 0) + 1
    return found
