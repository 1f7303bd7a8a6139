"""``RUN/jobs/``: what a run's jobs need and what became of them. All that decides is here, nothing
in a pickle.

    run.json              the submission: cluster, jobs, what is left out (:class:`Submission`)
    config.yaml           the run, resolved when it was submitted
    given.json            what was typed for it
    code/                 the packages as they were then; the jobs import these
    slurm/                submitit's folder: JOB_submission.sh, JOB_submitted.pkl, JOB_RANK_log.out
    exits/JOB.RESTART/N.json    how rank N ended: host, status. None after a kill

And events in ``RUN/logs/timeline-HOST.jsonl`` beside those of training
(:mod:`dnt_scale.record.timeline`):

    submitted   job, nodes, ranks; attempt is the job's id
    allocated   nodes, ranks, queued (since when it waited), started: rank 0 runs
    ended       status (:data:`EndStatus`), next, reason, blamed (hosts), until (when)
"""

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal, Self

import orjson
from pydantic import Field, ValidationError

from cluster.cluster_config import ClusterConfig
from data_prep.files import file_lock
from data_prep.words import first_problem
from dnt_scale.config import Strict
from dnt_scale.distributed.host import host
from dnt_scale.record import timeline
from dnt_scale.record.files import read_json, write_json
from dnt_scale.record.timeline import Event
from dnt_scale.record.tracker import Status

EndStatus = Literal[
    "finished",  # the token budget is spent
    "stopped",  # a signal, with a checkpoint
    "crashed",  # a fault that another try may not meet
    "refused",  # an error that the user has to mend
    "cancelled",  # by a person
    "killed",  # without a word: found out later
]
Next = Literal["requeued", "resubmitted", "none"]
# what MLflow is told of a run that ended so for good
MLFLOW_STATUS: dict[str, Status] = {
    "finished": "FINISHED",
    "stopped": "KILLED",
    "crashed": "FAILED",
    "refused": "FAILED",
    "cancelled": "KILLED",
    "killed": "FAILED",
}

DAY_S = 86400.0


class RecordError(ValueError):
    """A run folder was not submitted, or is not ours to use."""


class Submission(Strict):
    """``run.json``."""

    name: str
    cluster: ClusterConfig
    slurm: str = ""  # the name of the SLURM that has them
    jobs: list[str] = Field(
        [], description="ids, the last one to be queued or to begin last; of a task ARRAY_TASK"
    )
    logs: Path  # submitit's folder
    checkpoints: str = ""  # their folder or URL
    excluded: list[str] = Field([], description="nodes that failed too often")
    cancelled: bool = False  # by `dnt cancel`; nothing goes on with it until `dnt resubmit`
    parent: str | None = None  # the sweep that it is part of, as ID:NAME

    def with_job(self, job_id: str) -> Self:
        return self.model_copy(
            update={"jobs": [*(job for job in self.jobs if job != job_id), job_id]}
        )

    @property
    def job(self) -> str:
        """Return the newest job's id; empty before there is one."""
        return self.jobs[-1] if self.jobs else ""


def jobs_folder(run_dir: Path) -> Path:
    return run_dir / "jobs"


def config_file(run_dir: Path) -> Path:
    return jobs_folder(run_dir) / "config.yaml"


def write_given(run_dir: Path, given: Sequence[str]) -> None:
    """Keep what was typed for the run. Raises OSError."""
    write_json(jobs_folder(run_dir) / "given.json", {"given": list(given)})


def read_given(run_dir: Path) -> list[str]:
    """Return what was typed for the run; empty where that was not kept."""
    return [str(word) for word in read_json(jobs_folder(run_dir) / "given.json").get("given", [])]


def is_submitted(run_dir: Path) -> bool:
    return (jobs_folder(run_dir) / "run.json").exists()


def read_submission(run_dir: Path, *, of_any_owner: bool = False) -> Submission:
    """Read the submission of ``run_dir``.

    Raises:
        RecordError: it was never submitted, the file is damaged, or the folder is another user's.
    """
    file = jobs_folder(run_dir) / "run.json"
    try:
        if not of_any_owner:
            check_owner(file)
        return Submission.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise RecordError(
            f"{run_dir}: no job was submitted for it; `dnt submit` does, `dnt jobs` lists those"
        ) from None
    except (OSError, ValidationError) as error:
        raise RecordError(
            f"{file}: cannot be read ({first_problem(error)}); delete it and submit the run again"
        ) from None


def check_owner(path: Path) -> None:
    """Check that a path is this user's alone: jobs run code and pickles from a run folder.

    Raises:
        RecordError: it is another user's, or others may write there.
        OSError: there is no such file.
    """
    for place in (path, path.parent):
        found = place.stat()
        if found.st_uid != os.getuid():
            raise RecordError(
                f"{place} belongs to another user (uid {found.st_uid}, you are {os.getuid()}); "
                "copy the run"
            )
        if found.st_mode & 0o022:
            raise RecordError(
                f"{place} may be written by others (mode {found.st_mode & 0o777:o}); chmod go-w it"
            )


def write_submission(run_dir: Path, submission: Submission) -> None:
    """Write ``run.json``. Raises OSError."""
    write_json(jobs_folder(run_dir) / "run.json", submission.model_dump(mode="json"))


def update_submission(run_dir: Path, change: Callable[[Submission], Submission]) -> Submission:
    """Change ``run.json``, one process after another, and return what it holds then.

    Raises:
        RecordError: as :func:`read_submission`.
        OSError: it cannot be written.
    """
    with ExitStack() as stack:
        with suppress(OSError):  # a file system without locks
            stack.enter_context(file_lock(jobs_folder(run_dir) / ".run.lock", wait=True))
        submission = change(read_submission(run_dir))
        write_submission(run_dir, submission)
    return submission


# --- attempts -------------------------------------------------------------------------------------


def exits_folder(run_dir: Path, attempt: str) -> Path:
    return jobs_folder(run_dir) / "exits" / attempt


def write_exit(run_dir: Path, attempt: str, rank: int, status: int) -> None:
    """Keep how a rank ended, which calls this itself. Raises OSError."""
    place = exits_folder(run_dir, attempt)
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / f"{rank}.json", {"host": host(), "status": status})


def read_exits(run_dir: Path, attempt: str) -> dict[int, tuple[str, int]]:
    """Return host and exit status of each rank that ended by itself."""
    found = {}
    for file in exits_folder(run_dir, attempt).glob("*.json"):
        end = orjson.loads(file.read_bytes())
        found[int(file.stem)] = (str(end["host"]), int(end["status"]))
    return found


def record_end(
    run_dir: Path,
    attempt: str,
    status: EndStatus,
    then: Next,
    reason: str,
    blamed: Sequence[str] = (),
    until: float | None = None,
) -> None:
    """Tell the timeline how an attempt ended, at ``until`` (None: now). Raises OSError."""
    fields = {
        "status": status,
        "next": then,
        "reason": reason,
        "blamed": list(blamed),
        "until": until or time.time(),
    }
    timeline.append(run_dir, "ended", attempt=attempt, **fields)


def record_silent_end(
    run_dir: Path, events: list[Event], attempt: str, then: Next, until: float = 0.0
) -> None:
    """Tell the timeline of the end of an attempt that could not say so itself, found out later.
    Raises OSError.

    Args:
        until: when SLURM took its nodes back, where that is known; its last sign of life counts if
            it is later.
    """
    until = max([until, *(event["time"] for event in events if event["attempt"] == attempt)])
    end = last_event(events, "end", attempt)
    if end and end["outcome"] != "FAILED":
        status: EndStatus = "finished" if end["outcome"] == "FINISHED" else "stopped"
        did = "requeued" if then == "requeued" else "ended"
        record_end(run_dir, attempt, status, then, f"SLURM {did} the job", until=until)
        return
    blamed, why = blamed_hosts(events, attempt)
    reason = why or "no last word, as after the loss of a node"
    record_end(run_dir, attempt, "killed", then, reason, blamed, until)


def open_attempts(events: list[Event]) -> list[str]:
    """Return the attempts that were allocated and have no ``ended``, oldest first."""
    over = {event["attempt"] for event in events if event["event"] == "ended"}
    return [
        event["attempt"]
        for event in events
        if event["event"] == "allocated" and event["attempt"] not in over
    ]


def last_event(events: list[Event], kind: str, attempt: str | None = None) -> Event | None:
    """Return the newest event of a kind, of any attempt or of one."""
    return next(
        (
            event
            for event in reversed(events)
            if event["event"] == kind and attempt in (None, event["attempt"])
        ),
        None,
    )


def end_of_each_attempt(events: list[Event]) -> list[Event]:
    """Return the ``ended`` of each attempt, oldest first. Two lookers may both find an end out: the
    first to say so counts."""
    found: dict[str, Event] = {}
    for event in events:
        if event["event"] == "ended":
            found.setdefault(event["attempt"], event)
    return list(found.values())


def crashes_in_a_row(events: list[Event], newest: int | None = None) -> int:
    """Count the attempts at the end that crashed or were killed, since the last one that ended well
    or a checkpoint moved on.

    Args:
        newest: the step of the newest checkpoint, where that is known.
    """
    ready = {event["attempt"]: event["step"] for event in events if event["event"] == "ready"}
    asked = max(
        (event["time"] for event in events if event["event"] == "submitted" and event["by_user"]),
        default=0.0,
    )
    count, step = 0, newest
    for event in reversed(end_of_each_attempt(events)):
        if event["status"] not in ("crashed", "killed") or event["time"] < asked:
            break
        began = ready.get(event["attempt"])  # None: it crashed before its first step
        if began is not None:
            if step is not None and began < step:
                break
            step = began
        count += 1
    return count


def unreliable_hosts(events: list[Event], now: float, faults: int) -> list[str]:
    """Return the hosts that were to blame for ``faults`` ends at least in the last day."""
    blamed: Counter[str] = Counter()
    for event in end_of_each_attempt(events):
        if now - event["time"] < DAY_S:
            blamed.update(set(event.get("blamed", [])))
    return sorted(host for host, count in blamed.items() if count >= faults)


def newest_checkpoint(submission: Submission) -> int | None:
    """Return the step of the run's newest checkpoint; None without one, or where they are at a
    URL."""
    if not submission.checkpoints or "://" in submission.checkpoints:
        return None
    places = [place.name for place in Path(submission.checkpoints).glob("step-*") if place.is_dir()]
    steps = [
        found[1] for name in places if (found := re.fullmatch(r"step-(\d{8,})", name, re.ASCII))
    ]
    return max(map(int, steps), default=None)


def blamed_hosts(events: list[Event], attempt: str) -> tuple[list[str], str]:
    """Return the hosts at fault for the end of an attempt, and why: what a rank said of them."""
    found: Any = last_event(events, "lost", attempt)
    return (list(found["hosts"]), str(found["message"])) if found else ([], "")
