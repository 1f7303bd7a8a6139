"""What runs on every rank of a SLURM job: the run as it was submitted, from what is on disk.

``python -m cluster.job.rank_main FOLDER`` is submitit's own start of a task but for what
:func:`name_files_only` mends. submitit calls :func:`rank` in each task of the job's one srun step.
What comes after the ranks is for :mod:`cluster.submit.on_exit`, which the batch script calls when
srun has returned.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from cluster import run_record, slurm
from cluster.run_record import EndStatus, RecordError, Submission
from dnt_scale import config, startup
from dnt_scale.config import ConfigError, RunConfig
from dnt_scale.distributed import output
from dnt_scale.record import timeline


def rank(run_dir: str) -> None:
    """Be one rank of an attempt, and end the process with the exit status of
    ``dnt_scale.train.run_rank``."""
    place = Path(run_dir)
    attempt = slurm.this_attempt()
    os.environ["DNT_ATTEMPT"] = attempt
    number = int(os.environ["SLURM_PROCID"])

    def record_exit(status: int) -> int:
        with suppress(OSError):
            run_record.write_exit(place, attempt, number, status)
        # a stop is no failure: --kill-on-bad-exit would end ranks that still say what they have to
        return 0 if status > 128 else status

    def leave(received: int, frame: FrameType | None) -> None:
        """End at once, for a signal before the first step or after the last, when there is nothing
        to save."""
        os._exit(record_exit(128 + received))

    # submitit's own would save and requeue on one rank; training takes these over while it can save
    for stop in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(stop, leave)
    status = 1
    try:
        run, submission = (
            config.from_yaml(run_record.config_file(place)),
            run_record.read_submission(place),
        )
        # wherever the folder was when it was submitted
        run = run.model_copy(update={"run": run.run.model_copy(update={"dir": place})})
        if number == 0:
            begin_attempt(place, attempt, submission)
        status = train(run, submission)
    except (ConfigError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    finally:
        status = record_exit(status)
    sys.exit(status)


def train(run: RunConfig, submission: Submission) -> int:
    from dnt_scale.train.rank import run_rank
    from dnt_scale.train.recorded import Typed

    if submission.parent:
        os.environ["DNT_PARENT"] = submission.parent
    typed = Typed(run_record.read_given(run.run.dir), whole=True)
    if not submission.cluster.preflight:
        return run_rank(run, typed=typed)
    from cluster.job.preflight import check

    return run_rank(run, lambda ranks: check(ranks, run, submission.cluster), typed=typed)


def begin_attempt(run_dir: Path, attempt: str, submission: Submission) -> None:
    """Tell the timeline, on rank 0, that the run has its nodes, and how earlier attempts ended that
    could not say so."""
    this = slurm.this_job()
    now = None
    with suppress(slurm.SlurmError):  # a container may lack SLURM's commands
        now = slurm.job(this)
    events = timeline.read(run_dir)
    for earlier in run_record.open_attempts(events):
        same = earlier.partition(".")[0] == this
        requeued = now.submitted if now and same else 0.0  # SLURM counts from the requeue
        run_record.record_silent_end(
            run_dir, events, earlier, then="requeued" if same else "resubmitted", until=requeued
        )
    if found := reason_not_to_train(run_dir, submission, this):
        status, why = found
        run_record.record_end(run_dir, attempt, status, "none", why)
        print(f"error: {why}; this job ends", file=sys.stderr, flush=True)
        with suppress(slurm.SlurmError):
            slurm.cancel(this)
            time.sleep(60)  # until SLURM has ended it
        raise SystemExit(0)
    run_record.update_submission(run_dir, lambda current: current.with_job(this))
    waits: list[float] = [
        event.get("until") or event["time"]
        for event in timeline.read(run_dir)
        if event["event"] in ("ended", "submitted")
    ]
    started, nodes = (
        now.started if now and now.started else time.time(),
        [os.environ.get("SLURM_JOB_NODELIST", "")],
    )
    with suppress(slurm.SlurmError):
        nodes = slurm.hostnames(nodes[0])
    timeline.append(
        run_dir,
        "allocated",
        attempt=attempt,
        nodes=nodes,
        ranks=int(os.environ["SLURM_NTASKS"]),
        queued=min(max(waits, default=started), started),
        started=started,
    )


def reason_not_to_train(
    run_dir: Path, submission: Submission, this: str
) -> tuple[EndStatus, str] | None:
    """Return how the run ends if this job may not train it, and why: SLURM starts what a person or
    another job has ended."""
    if submission.cancelled:
        return "cancelled", "the run was cancelled"
    crashes = run_record.crashes_in_a_row(
        timeline.read(run_dir), run_record.newest_checkpoint(submission)
    )
    if crashes >= submission.cluster.max_crashes:
        return (
            "crashed",
            f"{crashes} crashes in a row without a new checkpoint (cluster.max_crashes)",
        )
    with suppress(slurm.SlurmError):
        for other in submission.jobs:
            if other != this and (found := slurm.job(other)) and found.state == "RUNNING":
                return "cancelled", f"job {other} of this run is running"
    return None


def name_files_only() -> None:
    """Let submitit put a job's number into the names of its files, not into a folder above that is
    called ``50%j``."""
    from submitit.core.utils import JobPaths

    if getattr(JobPaths, "_with_folders", None):
        return
    with_folders = JobPaths._with_folders = JobPaths._format_id  # type: ignore[attr-defined]

    def format_id(self: JobPaths, path: Path | str) -> Path:
        return Path(path).parent / Path(with_folders(self, Path(path).name))

    JobPaths._format_id = format_id  # type: ignore[method-assign]
    JobPaths.get_first_id_independent_folder = staticmethod(Path)  # type: ignore[method-assign]


if __name__ == "__main__":
    from submitit.core.submission import submitit_main

    startup.leave_folder_out()
    output.guard()
    name_files_only()
    submitit_main()
