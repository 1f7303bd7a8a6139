"""What runs on every rank of a SLURM job: the run as it was submitted, from what is on disk.

submitit calls :func:`rank` in each task of the job's one srun step. What comes after the ranks is for
:mod:`cluster.after`, which the batch script calls when srun has returned.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from cluster import ledger, slurm
from dnt_scale import config, timeline


def rank(run_dir: str) -> None:
    """Be one rank of an attempt; ends the process with the exit status of ``dnt_scale.train.run_rank``."""
    place = Path(run_dir)
    attempt = slurm.this_attempt()
    os.environ["DNT_ATTEMPT"] = attempt
    number = int(os.environ["SLURM_PROCID"])

    def told(status: int) -> int:
        with suppress(OSError):
            ledger.write_exit(place, attempt, number, status)
        # a stop is no failure: --kill-on-bad-exit would end ranks that still say what they have to
        return 0 if status > 128 else status

    def leave(received: int, frame: FrameType | None) -> None:
        """For a signal before the first step or after the last, when there is nothing to save."""
        os._exit(told(128 + received))

    # submitit's own would save and requeue on one rank; training takes these over while it can save
    for stop in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(stop, leave)
    status = 1
    try:
        if number == 0:
            begin(place, attempt)
        status = train(place)
    finally:
        status = told(status)
    sys.exit(status)


def train(run_dir: Path) -> int:
    from dnt_scale.train import run_rank

    submission = ledger.load(run_dir)
    if submission.parent:
        os.environ["DNT_PARENT"] = submission.parent
    run = config.from_yaml(ledger.config_file(run_dir))
    if not submission.cluster.preflight:
        return run_rank(run)
    from cluster.preflight import check

    return run_rank(run, lambda me: check(me, run, submission.cluster))


def begin(run_dir: Path, attempt: str) -> None:
    """Rank 0 tells the timeline that the run has its nodes, and how earlier attempts ended that could not say so."""
    events = timeline.read(run_dir)
    for earlier in ledger.open_attempts(events):
        ledger.found_ended(run_dir, events, earlier, then="requeued")
    waits: list[float] = [
        event.get("until") or event["time"]
        for event in timeline.read(run_dir)
        if event["event"] in ("ended", "submitted")
    ]
    started, nodes = time.time(), [os.environ.get("SLURM_JOB_NODELIST", "")]
    with suppress(slurm.SlurmError):  # a container may lack SLURM's commands
        nodes = slurm.hostnames(nodes[0])
        if (job := slurm.job(slurm.this_job())) and job.started:
            started = job.started
    timeline.append(
        run_dir,
        "allocated",
        attempt=attempt,
        nodes=nodes,
        ranks=int(os.environ["SLURM_NTASKS"]),
        queued=min(max(waits, default=started), started),
        started=started,
    )
