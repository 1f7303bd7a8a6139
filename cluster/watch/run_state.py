"""What a run is doing now: found out from its folder and from SLURM, and written down where nobody
else did."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import cast

from cluster import run_record, slurm
from cluster.cluster_config import ClusterConfig
from cluster.run_record import EndStatus, RecordError, Submission
from data_prep.words import duration
from dnt_scale.record import timeline
from dnt_scale.record.files import read_json
from dnt_scale.record.finalize import finalize_run
from dnt_scale.record.timeline import Event

# SLURM keeps a job for some minutes after its end (MinJobAge, 300 s by default): one that gave a
# sign of life since and is unknown to it is another cluster's.
FORGETS_S = 300.0
SILENT_S = 120.0
# What a job wrote can be read on every machine this long after its end.
WRITTEN_AFTER_S = 30.0


@dataclass(frozen=True)
class RunStatus:
    state: str  # queued, requeued, starting, running, cancelling, or an EndStatus
    live: bool  # it goes on by itself
    why: str = ""
    nodes: str = ""
    attempt: str = ""  # the attempt that has ended, or has its nodes
    unrecorded: bool = False  # it ended, and no event says so

    @property
    def text(self) -> str:
        on = f" on {self.nodes}" if self.nodes and self.live else ""
        return f"{self.state}{on}" + (f" ({self.why})" if self.why else "")


def decide_status(
    submission: Submission, events: list[Event], job: slurm.Job | None, now: float, asked: bool
) -> RunStatus:
    """Return what a run is doing.

    Args:
        events: its timeline.
        job: SLURM's word on the newest of its jobs; None: it does not know that one.
        now: seconds since 1970.
        asked: False where SLURM could not be asked, and the folder is all there is to go by.
    """
    told = [event for event in events if event["event"] in ("submitted", "allocated", "ended")]
    newest = told[-1] if told else None
    if not submission.jobs:
        return RunStatus("queued", True, "being submitted")
    if (
        newest
        and newest["event"] == "ended"
        and newest["next"] == "none"
        and _job_of(newest) == submission.job
    ):
        return RunStatus(newest["status"], False, newest["reason"], attempt=newest["attempt"])
    sign = max((event["time"] for event in events), default=now)
    if not asked or (job is None and now - sign < FORGETS_S and not submission.cancelled):
        unknown = f"SLURM here does not know job {submission.job}; " if asked else ""
        return _status_by_folder(
            events, newest, f"{unknown}last sign of life {duration(now - sign, digits=1)} ago"
        )
    if job is not None and job.live:
        return _status_of_live_job(submission, events, newest, job, now)
    return _status_after_job(submission, events, job)


def _job_of(event: Event) -> str:
    return str(event["attempt"]).partition(".")[0]


def _status_by_folder(events: list[Event], newest: Event | None, why: str) -> RunStatus:
    if newest is None or newest["event"] == "submitted":
        return RunStatus("queued" if newest is None or newest["by_user"] else "requeued", True, why)
    if newest["event"] == "ended":
        return RunStatus("requeued", True, why)
    return _working_status(events, newest["attempt"], " ".join(newest["nodes"]), why)


def _status_of_live_job(
    submission: Submission, events: list[Event], newest: Event | None, job: slurm.Job, now: float
) -> RunStatus:
    attempt = f"{job.id}.{job.restarts}"
    if submission.cancelled:
        return RunStatus("cancelling", True, f"SLURM is ending job {job.id}", job.nodes, attempt)
    if job.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD"):
        again = job.restarts or (
            newest is not None and (newest["event"] == "ended" or not newest.get("by_user"))
        )
        why = (
            f"may start in {duration(job.eligible - now, digits=1)}"
            if job.eligible > now
            else job.reason
        )
        return RunStatus("requeued" if again else "queued", True, why)
    end = run_record.last_event(events, "ended", attempt)
    if end or (
        job.restarts
        and job.state == "COMPLETING"
        and not run_record.last_event(events, "allocated", attempt)
    ):
        return RunStatus(
            "requeued", True, f"job {job.id} is still ending", attempt=attempt if end else ""
        )
    why = ""
    sign = max(
        (event["time"] for event in events if event["attempt"] == attempt), default=job.started
    )
    if job.state != "RUNNING":
        why = f"SLURM says {job.state}"
    elif now - sign > SILENT_S:
        why = f"no sign of life for {duration(now - sign, digits=1)}"
    return _working_status(events, attempt, job.nodes, why)


def _working_status(events: list[Event], attempt: str, nodes: str, why: str) -> RunStatus:
    state = "running" if run_record.last_event(events, "ready", attempt) else "starting"
    return RunStatus(state, True, why, nodes, attempt)


def _status_after_job(
    submission: Submission, events: list[Event], job: slurm.Job | None
) -> RunStatus:
    """Return how a run ended whose job is over, where nothing was said of an end or of what was to
    go on."""
    begun = [
        event["attempt"]
        for event in events
        if event["event"] == "allocated" and _job_of(event) == submission.job
    ]
    open_now = [attempt for attempt in run_record.open_attempts(events) if attempt in begun]
    attempt = (
        open_now[-1] if open_now else f"{submission.job}.{job.restarts if job else len(begun)}"
    )
    end = run_record.last_event(events, "end", attempt)
    outcome = end["outcome"] if end else ""
    _, lost = run_record.blamed_hosts(events, attempt)
    status: EndStatus = "stopped" if outcome == "KILLED" else "killed"
    if outcome == "FINISHED":
        status, why = "finished", "the token budget is spent"
    elif submission.cancelled:
        status, why = "cancelled", "dnt cancel"
    elif job is not None and job.state == "CANCELLED":
        status, why = "cancelled", "the job was cancelled"
    else:
        says = f"SLURM says {job.state}" if job else "SLURM has forgotten it"
        why = f"job {submission.job} ended without a word, {says}" + (f"; {lost}" if lost else "")
    return RunStatus(status, False, why, attempt=attempt, unrecorded=True)


# --- from disk ------------------------------------------------------------------------------------


class SlurmQuery:
    """SLURM, asked about the queue once, and about one job after another that is not in it until it
    does not answer."""

    def __init__(self) -> None:
        self.name = ""  # the name of the SLURM here; empty until it was asked
        self.queue: dict[str, slurm.Job] = {}
        self.down = ""  # why it cannot be asked at all
        self.problem = ""  # why it could not be asked about the last job

    def job(self, submission: Submission) -> slurm.Job | None:
        if not self.down:
            try:
                if not self.name:
                    self.name, self.queue = slurm.cluster_name(), slurm.queue()
                self.problem = ""
                if submission.slurm in ("", self.name):
                    return newest_job(submission, self.queue)
                self.problem = (
                    f"its jobs are with the SLURM {submission.slurm}, this one is {self.name}"
                )
                return None
            except slurm.SlurmError as error:
                self.down = str(error)
        self.problem = self.down
        return None


def newest_job(
    submission: Submission, queue: Mapping[str, slurm.Job] = MappingProxyType({})
) -> slurm.Job | None:
    """Return the newest of a run's jobs, from the ``queue`` or by query; None when SLURM does not
    know it. Raises SlurmError.

    Where SLURM was set up anew its numbers begin anew: another job may have this one's.
    """
    job = queue.get(submission.job) or slurm.job(submission.job)
    return None if job and job.output and Path(job.output).parent != submission.logs else job


def check_idle(run_dir: Path) -> None:
    """Raise RecordError while jobs work on the run folder, or wait to."""
    if run_record.is_submitted(run_dir):
        query = SlurmQuery()
        found, _ = read_status(
            run_dir, run_record.read_submission(run_dir, of_any_owner=True), query
        )
        if found.live:
            ends = f"`dnt cancel {run_dir}` ends that"
            if query.problem:
                ends = (
                    f"{query.problem}; if that job is surely over, delete "
                    f"{run_record.jobs_folder(run_dir) / 'run.json'}"
                )
            raise RecordError(
                f"run.dir: {run_dir} is in use by its job: {found.text}; {ends}, or take another "
                "run.name"
            )


def read_status(
    run_dir: Path, submission: Submission, query: SlurmQuery
) -> tuple[RunStatus, list[Event]]:
    """Return what a run is doing now, and its timeline. An end that nobody wrote down is written
    now, by the run's owner.

    SLURM is asked only about a run that its folder does not tell to be over.
    """
    events = timeline.read(run_dir)
    found = decide_status(submission, events, None, time.time(), asked=False)
    if not found.live or not submission.jobs:
        return found, events
    job = query.job(submission)
    # Read them again: a job that is over wrote its last before we asked.
    events = timeline.read(run_dir)
    now = time.time()
    found = decide_status(submission, events, job, now, asked=not query.problem)
    if found.unrecorded and (job is None or now - job.ends > WRITTEN_AFTER_S) and is_ours(run_dir):
        with suppress(OSError):  # on a full disk it is found out again
            record_found_end(run_dir, found, events, job)
        events = timeline.read(run_dir)
    return found, events


def nodes_to_leave_out(site: ClusterConfig, events: list[Event], before: list[str]) -> list[str]:
    """Return the nodes that a run's next job leaves out: those that failed too often in a day,
    while enough are left.

    Args:
        before: what it left out so far, and goes on to where SLURM does not tell, or certain nodes
            were asked for.
    """
    found = run_record.unreliable_hosts(events, time.time(), site.exclude_after)
    if site.nodelist or found == before:
        return before
    try:
        partitions = slurm.partitions().values()
    except slurm.SlurmError as error:
        print(f"dnt: {error}", flush=True)
        return before
    nodes = [
        node.name
        for partition in partitions
        if partition.name == site.partition or (site.partition is None and partition.default)
        for node in partition.nodes
        if node.able and node.name not in (*found, *site.exclude)
    ]
    return found if len(nodes) >= site.nodes else before


def record_found_end(
    run_dir: Path, found: RunStatus, events: list[Event], job: slurm.Job | None
) -> None:
    """Tell the timeline of an end that was found out. Raises OSError."""
    status = cast(EndStatus, found.state)
    blamed, _ = run_record.blamed_hosts(events, found.attempt) if status == "killed" else ([], "")
    signs = [event["time"] for event in events if event["attempt"] == found.attempt]
    until = job.ends if job and job.ends else max(signs, default=time.time())
    run_record.record_end(run_dir, found.attempt, status, "none", found.why, blamed, until)


def is_ours(run_dir: Path) -> bool:
    """Whether this user may change the run folder."""
    try:
        run_record.check_owner(run_record.jobs_folder(run_dir) / "run.json")
    except (RecordError, OSError):
        return False
    return True


def read_mlflow_status(run_dir: Path) -> str | None:
    """Return what MLflow was told last of the run; None: nothing yet, or tracking is off."""
    status = read_json(run_dir / "logs" / "mlflow.json").get("status")
    return str(status) if status else None


def correct_mlflow(run_dir: Path, found: RunStatus) -> bool:
    """Let MLflow have the true status of a run of ours that no process works on, and what it lacks
    of it.

    Returns:
        False when it could not be told; a line on stderr says why.
    """
    if found.live and (
        found.state not in ("queued", "requeued") or read_mlflow_status(run_dir) != "RUNNING"
    ):
        return True
    if not is_ours(run_dir):
        return True
    # in the queue KILLED too, until the next attempt says RUNNING
    return finalize_run(run_dir, run_record.MLFLOW_STATUS.get(found.state, "KILLED"))
