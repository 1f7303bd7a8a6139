"""A command that goes on where it was, killed by kill -9 at random moments and started again."""

import os
import random
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

NEVER_S = 3600.0


class Kill(NamedTuple):
    """A kill -9: seconds after the start, who was killed, and what lay in the folder then, a
    number of files of each kind."""

    seconds: float
    who: str
    left: dict[str, int]


def run_until(
    command: Sequence[str], seconds: float, who: str, environment: dict[str, str]
) -> tuple[int, bool]:
    """Run a command, and after so many seconds kill it: "main", the process itself; "all", with its
    children; "worker", the youngest of them. Returns its exit status once all of them are gone, and
    whether it was killed."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        below = psutil.Process(process.pid).children(recursive=True)
        if who == "all":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            chosen = below[-1].pid if who == "worker" and below else process.pid
            os.kill(chosen, signal.SIGKILL)
        status = process.wait(NEVER_S)
        psutil.wait_procs(below, 60)  # those without a parent end by themselves, a moment later
        return status, True
    return process.returncode, False


def kill_at_random(
    command: Sequence[str],
    out: Path,
    kills: int,
    within: float,
    seed: int,
    finished: Callable[[], None],
    environment: dict[str, str] | None = None,
) -> list[Kill]:
    """Kill a command so many times, each time at a moment of the first ``within`` seconds, and
    start it again where it was; at the end let it finish.

    Args:
        out: what it makes, which holds manifest.json once it is whole.
        finished: called each time that it is whole, also between kills; it may look at ``out`` and
            has to remove it.

    Raises AssertionError where a run that nobody killed does not end with status 0.
    """
    draw = random.Random(seed)
    environment = dict(os.environ) if environment is None else environment
    done: list[Kill] = []
    while len(done) < kills:
        seconds, who = draw.uniform(0, within), draw.choice(("main", "all", "worker"))
        status, was_killed = run_until(command, seconds, who, environment)
        if was_killed:
            done.append(Kill(seconds, who, left_in(out)))
        else:
            assert status == 0, f"status {status}, though nobody killed it"
        if (out / "manifest.json").exists():
            finished()
    if out.exists():
        assert run_until(command, NEVER_S, "main", environment) == (0, False)
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
