"""What a run is doing now: found out from its folder and from SLURM, and written down where nobody else did."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import cast

from cluster import run_record, slurm
from cluster.cluster_config import ClusterConfig
from cluster.run_record import EndStatus, LedgerError, Submission
from cluster.words import ago
from dnt_scale.record import timeline
from dnt_scale.record.files import read_json
from dnt_scale.record.finalize import finalize_run
from dnt_scale.record.timeline import Event

# SLURM keeps a job for some minutes after its end (MinJobAge, 300 s by default): one that gave a sign of life since and
# is unknown to it is another cluster's.
FORGETS_S = 300.0
SILENT_S = 120.0
SETTLED_S = 30.0  # after a job's end, until what it wrote can be read on every machine


@dataclass(frozen=True)
class Standing:
    state: str  # queued, requeued, starting, running, cancelling, or an EndStatus
    live: bool  # it goes on by itself
    why: str = ""
    nodes: str = ""
    attempt: str = ""  # that has ended, or has its nodes
    untold: bool = False  # it ended, and no event says so

    @property
    def in_words(self) -> str:
        on = f" on {self.nodes}" if self.nodes and self.live else ""
        return f"{self.state}{on}" + (f" ({self.why})" if self.why else "")


def standing(submission: Submission, events: list[Event], job: slurm.Job | None, now: float, asked: bool) -> Standing:
    """What a run is doing.

    Args:
        events: its timeline.
        job: SLURM's word on the newest of its jobs; None: it does not know that one.
        now: seconds since 1970.
        asked: False where SLURM could not be asked, and the folder is all there is to go by.
    """
    told = [event for event in events if event["event"] in ("submitted", "allocated", "ended")]
    newest = told[-1] if told else None
    if not submission.jobs:
        return Standing("queued", True, "being submitted")
    if newest and newest["event"] == "ended" and newest["next"] == "none" and _job_of(newest) == submission.job:
        return Standing(newest["status"], False, newest["reason"], attempt=newest["attempt"])
    sign = max((event["time"] for event in events), default=now)
    if not asked or (job is None and now - sign < FORGETS_S and not submission.cancelled):
        unknown = f"SLURM here does not know job {submission.job}; " if asked else ""
        return _by_folder(events, newest, f"{unknown}last sign of life {ago(now - sign)} ago")
    if job is not None and job.live:
        return _in_slurm(submission, events, newest, job, now)
    return _gone(submission, events, job)


def _job_of(event: Event) -> str:
    return str(event["attempt"]).partition(".")[0]


def _by_folder(events: list[Event], newest: Event | None, why: str) -> Standing:
    if newest is None or newest["event"] == "submitted":
        return Standing("queued" if newest is None or newest["by_user"] else "requeued", True, why)
    if newest["event"] == "ended":
        return Standing("requeued", True, why)
    return _at_work(events, newest["attempt"], " ".join(newest["nodes"]), why)


def _in_slurm(
    submission: Submission, events: list[Event], newest: Event | None, job: slurm.Job, now: float
) -> Standing:
    attempt = f"{job.id}.{job.restarts}"
    if submission.cancelled:
        return Standing("cancelling", True, f"SLURM is ending job {job.id}", job.nodes, attempt)
    if job.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD"):
        again = job.restarts or (newest is not None and (newest["event"] == "ended" or not newest.get("by_user")))
        why = f"may start in {ago(job.eligible - now)}" if job.eligible > now else job.reason
        return Standing("requeued" if again else "queued", True, why)
    end = run_record.last(events, "ended", attempt)
    if end or (job.restarts and job.state == "COMPLETING" and not run_record.last(events, "allocated", attempt)):
        return Standing("requeued", True, f"job {job.id} is still ending", attempt=attempt if end else "")
    why = ""
    sign = max((event["time"] for event in events if event["attempt"] == attempt), default=job.started)
    if job.state != "RUNNING":
        why = f"SLURM says {job.state}"
    elif now - sign > SILENT_S:
        why = f"no sign of life for {ago(now - sign)}"
    return _at_work(events, attempt, job.nodes, why)


def _at_work(events: list[Event], attempt: str, nodes: str, why: str) -> Standing:
    state = "running" if run_record.last(events, "ready", attempt) else "starting"
    return Standing(state, True, why, nodes, attempt)


def _gone(submission: Submission, events: list[Event], job: slurm.Job | None) -> Standing:
    """Its job is over, and nothing was said of an end or of what was to go on."""
    begun = [event["attempt"] for event in events if event["event"] == "allocated" and _job_of(event) == submission.job]
    open_now = [attempt for attempt in run_record.open_attempts(events) if attempt in begun]
    attempt = open_now[-1] if open_now else f"{submission.job}.{job.restarts if job else len(begun)}"
    end = run_record.last(events, "end", attempt)
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
    return Standing(status, False, why, attempt=attempt, untold=True)


# --- from disk --------------------------------------------------------------------------------------------------------


class Asking:
    """SLURM, asked about the queue once, and about one job after another that is not in it until it does not answer."""

    def __init__(self) -> None:
        self.name = ""  # of the SLURM here
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
                self.problem = f"its jobs are with the SLURM {submission.slurm}, this one is {self.name}"
                return None
            except slurm.SlurmError as error:
                self.down = str(error)
        self.problem = self.down
        return None


def newest_job(submission: Submission, queue: Mapping[str, slurm.Job] = MappingProxyType({})) -> slurm.Job | None:
    """The newest of a run's jobs, from the ``queue`` or by asking; None when SLURM does not know it. Raises SlurmError.

    Where SLURM was set up anew its numbers begin anew: another job may have this one's.
    """
    job = queue.get(submission.job) or slurm.job(submission.job)
    return None if job and job.output and Path(job.output).parent != submission.logs else job


def check_idle(run_dir: Path) -> None:
    """Raises LedgerError while jobs work on the run folder, or wait to."""
    if run_record.submitted(run_dir):
        asking = Asking()
        found, _ = look(run_dir, run_record.load(run_dir, to_look=True), asking)
        if found.live:
            ends = f"`dnt cancel {run_dir}` ends that"
            if asking.problem:
                ends = f"{asking.problem}; if that job is surely over, delete {run_record.folder(run_dir) / 'run.json'}"
            raise LedgerError(
                f"run.dir: {run_dir} is in use by its job: {found.in_words}; {ends}, or take another run.name"
            )


def look(run_dir: Path, submission: Submission, asking: Asking) -> tuple[Standing, list[Event]]:
    """What a run is doing now, and its timeline. An end that nobody wrote down is written now, by the run's owner.

    SLURM is asked only about a run that its folder does not tell to be over.
    """
    events = timeline.read(run_dir)
    found = standing(submission, events, None, time.time(), asked=False)
    if not found.live or not submission.jobs:
        return found, events
    job = asking.job(submission)
    events = timeline.read(run_dir)  # again: a job that is over wrote its last before we asked
    now = time.time()
    found = standing(submission, events, job, now, asked=not asking.problem)
    if found.untold and (job is None or now - job.ends > SETTLED_S) and ours(run_dir):
        with suppress(OSError):  # a full disk: it is found out again
            write_end(run_dir, found, events, job)
        events = timeline.read(run_dir)
    return found, events


def left_out(site: ClusterConfig, events: list[Event], before: list[str]) -> list[str]:
    """The nodes that a run's next job leaves out: those that failed too often in a day, while enough are left.

    Args:
        before: what it left out so far, and goes on to where SLURM does not tell, or certain nodes were asked for.
    """
    found = run_record.unreliable(events, time.time(), site.exclude_after)
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


def write_end(run_dir: Path, found: Standing, events: list[Event], job: slurm.Job | None) -> None:
    """Tell the timeline of an end that was found out. Raises OSError."""
    status = cast(EndStatus, found.state)
    blamed, _ = run_record.blamed_hosts(events, found.attempt) if status == "killed" else ([], "")
    signs = [event["time"] for event in events if event["attempt"] == found.attempt]
    until = job.ends if job and job.ends else max(signs, default=time.time())
    run_record.ended(run_dir, found.attempt, status, "none", found.why, blamed, until)


def ours(run_dir: Path) -> bool:
    """Whether this user may change the run folder."""
    try:
        run_record.check_owner(run_record.folder(run_dir) / "run.json")
    except (LedgerError, OSError):
        return False
    return True


def mlflow_status(run_dir: Path) -> str | None:
    """What MLflow was told last of the run; None: nothing yet, or tracking is off."""
    status = read_json(run_dir / "logs" / "mlflow.json").get("status")
    return str(status) if status else None


def mend_mlflow(run_dir: Path, found: Standing) -> bool:
    """Let MLflow have the true status of a run of ours that no process works on, and what it lacks of it.

    Returns:
        False when it could not be told; a line on stderr says why.
    """
    if found.live and (found.state not in ("queued", "requeued") or mlflow_status(run_dir) != "RUNNING"):
        return True
    if not ours(run_dir):
        return True
    # in the queue KILLED too, until the next attempt says RUNNING
    return finalize_run(run_dir, run_record.MLFLOW_STATUS.get(found.state, "KILLED"))
