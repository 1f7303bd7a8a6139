"""Train one run of a sweep in a process of its own, up to a step."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dnt_scale import startup
from dnt_scale.record import run_lock
from dnt_scale.record.files import warn
from dnt_scale.train import launch

LOG = "logs/sweep.log"  # of a run folder: what its last start said
POLL_S = 0.05
LAST_S = 30.0  # for a process that was interrupted twice


def train(
    overrides: Sequence[str],
    run_dir: Path,
    *,
    ranks: int,
    parent: str,
    signals: Sequence[int],
    watch: Callable[[], None],
) -> int:
    """Train, and return the exit status; -n where signal n killed it.

    Args:
        parent: the sweep in MLflow, as ID:NAME.
        signals: those that this process has got to end with; each is passed on.
        watch: called all the while.

    Raises:
        OSError: the log cannot be written.
        KeyboardInterrupt: Ctrl-C came twice. The process has ended then.
    """
    wait_for_others(run_dir, signals)
    if signals:
        return 128 + signals[0]
    log = run_dir / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    process = start(overrides, ranks, log, {**launch.environment(), "DNT_PARENT": parent})
    told = 0
    try:
        while process.poll() is None:
            for number in signals[told:]:
                process.send_signal(number)
                told += 1
            watch()
            time.sleep(POLL_S)
    except BaseException:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(LAST_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    return process.returncode


def start(
    overrides: Sequence[str], ranks: int, log: Path, env: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start the process. A terminal's Ctrl-C reaches it through this one alone, and it stops, with
    a checkpoint, when this one is killed.
    """
    with log.open("wb") as file:
        return subprocess.Popen(
            launch.command(overrides, ranks),
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
            preexec_fn=startup.end_with_parent,
        )


def wait_for_others(run_dir: Path, signals: Sequence[int]) -> None:
    """Wait while another process trains the run, such as one of a sweep that was just killed."""
    said = False
    while not signals and (other := run_lock.current_holder(run_dir)):
        if other.pid == os.getpid():
            return
        if not said:
            warn(f"{run_dir} is still written by {other.description}; waiting for its end")
            said = True
        time.sleep(POLL_S)


def why_failed(status: int, run_dir: Path) -> str:
    """Return in a line why a run ended with this status."""
    if status < 0:
        return f"its process was killed ({signal.Signals(-status).name})"
    if status > 128:
        return f"it was stopped by {signal.Signals(status - 128).name}"
    said = " ".join(launch.complaint(run_dir / LOG).split())
    return said[:500] or f"exit status {status}, without a word"
