"""`dnt cancel`: end a run's job, and let nothing go on with it until `dnt resubmit`."""

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from cluster import run_record, slurm, sweep_jobs
from cluster.run_record import Submission
from cluster.slurm import SlurmError
from cluster.watch import run_state
from cluster.watch.find_runs import short_name
from cluster.watch.run_state import RunStatus, SlurmQuery
from data_prep.words import counted
from dnt_scale.record import timeline
from dnt_scale.record.metrics_file import last_metrics

POLL_S = 1.0
KILLED_WITHIN_S = (
    120.0  # SLURM kills a cancelled job's processes KillWait after their SIGTERM, 30 s by default
)


def cancel(run_dirs: list[Path]) -> Iterator[str]:
    """Cancel runs that are queued or running, all at once, and wait until their jobs are gone; a
    line to say of each.

    Raises:
        RecordError: a run was never submitted, or is another user's.
        SlurmError: there is no SLURM here, it refuses, or a job did not go.
    """
    submissions = {run_dir: run_record.read_submission(run_dir) for run_dir in run_dirs}
    query = SlurmQuery()
    found: dict[Path, RunStatus] = {}
    for run_dir, submission in submissions.items():
        found[run_dir], _ = run_state.read_status(run_dir, submission, query)
        if found[run_dir].live and query.problem:
            raise SlurmError(f"{submission.name} cannot be cancelled from here: {query.problem}")
    left = [run_dir for run_dir in run_dirs if found[run_dir].live]
    ended: dict[Path, RunStatus] = {}
    asked: dict[str, float] = {}  # when each job was asked to end
    with Console(stderr=True).status("") as status:
        while left:
            status.update(
                f"waiting for the end of job {submissions[left[0]].job}, "
                f"{counted(len(left), 'run')} to go"
            )
            ended |= {run_dir: over for run_dir in left if (over := end_job(run_dir, asked))}
            left = [run_dir for run_dir in left if run_dir not in ended]
            time.sleep(POLL_S if left else 0.0)
    for run_dir in submissions:
        if run_dir not in ended:
            yield f"{short_name(run_dir)} is not live: {found[run_dir].text}"
            continue
        run_state.correct_mlflow(run_dir, ended[run_dir])
        if ended[run_dir].state == "finished":
            yield f"{short_name(run_dir)} had finished by then"
        else:
            again = f"`dnt resubmit {short_name(run_dir)}` goes on with it"
            yield f"{short_name(run_dir)} is cancelled; {format_kept(run_dir)}; {again}"
    for folder in sweep_jobs.sweeps_of(ended):
        sweep_jobs.finalize_sweep(folder)


def end_job(run_dir: Path, asked: dict[str, float]) -> RunStatus | None:
    """Bring the run's job, or the one that follows it, nearer to its end; how it ended, once it is
    gone.

    Ranks get the signal that comes before a time limit, and as long as then to write a checkpoint;
    then scancel.

    Args:
        asked: when each job got the signal; filled in here.

    Raises:
        SlurmError: it did not go.
    """
    submission = run_record.read_submission(run_dir)
    # A new job, which had been on its way, may have come since; then it is marked again.
    if not submission.cancelled:
        submission = run_record.update_submission(
            run_dir, lambda now: now.model_copy(update={"cancelled": True})
        )
    job = run_state.newest_job(submission)
    if job is None or not job.live:
        return read_end(run_dir, submission, job)
    waited = time.monotonic() - asked.get(job.id, math.inf)
    if job.state == "RUNNING" and job.id not in asked:
        with suppress(SlurmError):  # it ended just now
            slurm.run("scancel", f"--signal={submission.cluster.signal}", job.id)
        asked[job.id] = time.monotonic()
    elif job.state != "COMPLETING" and (
        job.state != "RUNNING" or waited > submission.cluster.signal_s
    ):
        slurm.cancel(job.id)
    if waited > submission.cluster.signal_s + KILLED_WITHIN_S:
        raise SlurmError(
            f"job {job.id} of {submission.name} did not end in {waited:.0f} s; it is marked "
            f"cancelled and will not go on; `scontrol show job {job.id}` may tell why"
        )
    return None


def read_end(run_dir: Path, submission: Submission, job: slurm.Job | None) -> RunStatus:
    """Return how a run ended, by its job's own word or, where that could give none, ours."""
    events = timeline.read(run_dir)
    found = run_state.decide_status(submission, events, job, time.time(), asked=True)
    if found.unrecorded:
        run_state.record_found_end(run_dir, found, events, job)
    return found


def format_kept(run_dir: Path) -> str:
    lines, step = (
        last_metrics(run_dir),
        run_record.newest_checkpoint(run_record.read_submission(run_dir)),
    )
    if not lines:
        return "it had not begun"
    reached = f"it reached step {lines[-1]['step']:,}"
    return (
        f"{reached}, its newest checkpoint is of step {step:,}"
        if step is not None
        else f"{reached}"
    )
