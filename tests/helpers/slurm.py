"""The sandbox's SLURM, for tests. All of this runs the real commands."""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from cluster.sandbox import SCRIPT
from cluster.slurm import job
from testbed.run import Finished

BASE = Path("/var/lib/dnt-sandbox")
LEFT_OUT = "SLURM tests left out: "
# of sandbox.sh up: nodes, CPUs, GPUs, accounting, signal before preemption
STANDARD = ("3", "8", "8", "1", "1")
Found = TypeVar("Found")


def command(*words: object) -> Finished:
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    return Finished([done.returncode], done.stdout, done.stderr)


def sandbox(*words: str) -> Finished:
    return command("bash", SCRIPT, *words)


def options() -> tuple[str, ...] | None:
    """What `sandbox.sh up` was last called with; None where the sandbox does not run."""
    return (
        tuple((BASE / "run/options").read_text().split()) if sandbox("status").code == 0 else None
    )


def wait_for(condition: Callable[[], Found], what: str, timeout: float = 300.0) -> Found:
    """The first true value of `condition`, asked five times a second, for SLURM's answers cost
    it time.
    """
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"gave up waiting after {timeout:.0f} s: {what}"
        time.sleep(0.2)
    return found


def submit(script: str, *words: str) -> str:
    """The id of a job whose batch script is these shell lines; `words` are sbatch's options."""
    done = command("sbatch", "--parsable", "--output=/dev/null", *words, "--wrap", script)
    assert done.code == 0, done.err
    return done.out.strip()


def state(job_id: str) -> str:
    """SLURM's word for it, "" where it knows no such job."""
    found = job(job_id)
    return found.state if found else ""


def wait_state(job_id: str, *states: str, timeout: float = 120.0) -> str:
    return wait_for(
        lambda: (now := state(job_id)) in states and now,
        f"job {job_id} to be {' or '.join(states)}",
        timeout,
    )


def free(*job_ids: str) -> None:
    """End these jobs, or all there are, and wait until nothing of them is left."""
    ids = job_ids or tuple(command("squeue", "--noheader", "--format=%A").out.split())
    if ids:
        command("scancel", *ids)
        wait_for(
            lambda: not command("squeue", "--noheader", f"--jobs={','.join(ids)}").out.strip(),
            f"the end of {ids}",
        )


def kill_node(node: str) -> None:
    """SIGKILL to all processes of a node. SLURM finds it down after some 35 s."""
    sandbox("kill-node", node).ok()


def start_node(node: str) -> None:
    sandbox("start-node", node).ok()


@contextmanager
def no_accounting() -> Iterator[None]:
    """A site without sacct. Jobs live on; it takes a second or two each way."""
    sandbox("up", *STANDARD[:3], "0", "1").ok()
    try:
        yield
    finally:
        sandbox("up", *STANDARD).ok()
