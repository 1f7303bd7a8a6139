"""``RUN/jobs/``: what a run's jobs need and what became of them. All that decides is here, nothing in a pickle.

    run.json              the submission: cluster, jobs, what is left out (:class:`Submission`)
    config.yaml           the run, resolved when it was submitted
    code/                 the packages as they were then; the jobs import these
    slurm/                submitit's folder: JOB_submission.sh, JOB_submitted.pkl, JOB_RANK_log.out
    exits/JOB.RESTART/N.json    how rank N ended: host, status. None after a kill

And events in ``RUN/logs/timeline.jsonl`` beside those of training (:mod:`dnt_scale.timeline`):

    submitted   job, nodes, ranks; attempt is the job's id
    allocated   nodes, ranks, queued (since when it waited), started: rank 0 runs
    ended       status, next, reason, blamed (hosts), until (when): an attempt is over, see :data:`EndStatus`
"""

import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import ValidationError

from cluster.settings import ClusterConfig
from dnt_scale import timeline
from dnt_scale.config import Strict
from dnt_scale.timeline import Event
from dnt_scale.tracking import Status, write_json

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


class LedgerError(ValueError):
    """A run folder was not submitted, or is not ours to use."""


class Submission(Strict):
    """``run.json``."""

    name: str
    cluster: ClusterConfig
    jobs: list[str]  # ids, oldest first; of an array's task ARRAY_TASK
    logs: Path  # submitit's folder
    excluded: list[str]  # nodes that failed too often
    cancelled: bool  # by `dnt cancel`; nothing goes on with it until `dnt resubmit`
    parent: str | None  # of a sweep: ID:NAME

    @property
    def job(self) -> str:
        return self.jobs[-1]


def folder(run_dir: Path) -> Path:
    return run_dir / "jobs"


def config_file(run_dir: Path) -> Path:
    return folder(run_dir) / "config.yaml"


def submitted(run_dir: Path) -> bool:
    return (folder(run_dir) / "run.json").exists()


def load(run_dir: Path, *, to_look: bool = False) -> Submission:
    """The submission of ``run_dir``; only ``to_look``, when nothing of it is run or changed, whoever it belongs to.

    Raises:
        LedgerError: it was never submitted, the file is damaged, or the folder is another user's.
    """
    file = folder(run_dir) / "run.json"
    try:
        if not to_look:
            check_owner(file)
        return Submission.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise LedgerError(
            f"{run_dir}: no job was submitted for it; `dnt submit` does, `dnt jobs` lists those"
        ) from None
    except (OSError, ValidationError) as error:
        raise LedgerError(f"{file}: cannot be read ({str(error).splitlines()[0]}); submit the run again") from None


def check_owner(path: Path) -> None:
    """Jobs run code and pickles from a run folder, so it must be of the user who starts them.

    Raises:
        LedgerError: it is another user's, or others may write there.
        OSError: there is no such file.
    """
    for place in (path, path.parent):
        found = place.stat()
        if found.st_uid != os.getuid():
            raise LedgerError(
                f"{place} belongs to another user (uid {found.st_uid}, you are {os.getuid()}); copy the run"
            )
        if found.st_mode & 0o022:
            raise LedgerError(f"{place} may be written by others (mode {found.st_mode & 0o777:o}); chmod go-w it")


def save(run_dir: Path, submission: Submission) -> None:
    """Raises OSError."""
    write_json(folder(run_dir) / "run.json", submission.model_dump(mode="json"))


# --- attempts ---------------------------------------------------------------------------------------------------------


def exits_folder(run_dir: Path, attempt: str) -> Path:
    return folder(run_dir) / "exits" / attempt


def write_exit(run_dir: Path, attempt: str, rank: int, status: int) -> None:
    """Called by a rank that ends by itself. Raises OSError."""
    place = exits_folder(run_dir, attempt)
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / f"{rank}.json", {"host": socket.gethostname(), "status": status})


def read_exits(run_dir: Path, attempt: str) -> dict[int, int]:
    """The exit status of each rank that ended by itself."""
    found = {}
    for file in exits_folder(run_dir, attempt).glob("*.json"):
        found[int(file.stem)] = int(orjson.loads(file.read_bytes())["status"])
    return found


def ended(
    run_dir: Path,
    attempt: str,
    status: EndStatus,
    then: Next,
    reason: str,
    blamed: Sequence[str] = (),
    until: float | None = None,
) -> None:
    """Tell the timeline how an attempt ended, at ``until`` (None: now). Raises OSError."""
    fields = {"status": status, "next": then, "reason": reason, "blamed": list(blamed), "until": until or time.time()}
    timeline.append(run_dir, "ended", attempt=attempt, **fields)


def found_ended(run_dir: Path, events: list[Event], attempt: str, then: Next, slurm_says: str = "") -> None:
    """The same of an attempt that ended without saying so, found out later. Raises OSError."""
    signs = [event["time"] for event in events if event["attempt"] == attempt]
    end = last(events, "end", attempt)
    if end and end["outcome"] != "FAILED":
        status: EndStatus = "finished" if end["outcome"] == "FINISHED" else "stopped"
        ended(run_dir, attempt, status, then, slurm_says or "SLURM ended the job", until=max(signs))
        return
    blamed, why = blamed_hosts(events, attempt)
    reason = why or slurm_says or "no last word, as after the loss of a node"
    ended(run_dir, attempt, "killed", then, reason, blamed, max(signs))


def open_attempts(events: list[Event]) -> list[str]:
    """Attempts that were allocated and have no ``ended``, oldest first."""
    over = {event["attempt"] for event in events if event["event"] == "ended"}
    return [event["attempt"] for event in events if event["event"] == "allocated" and event["attempt"] not in over]


def last(events: list[Event], kind: str, attempt: str | None = None) -> Event | None:
    """The newest event of a kind, of any attempt or of one."""
    return next(
        (event for event in reversed(events) if event["event"] == kind and attempt in (None, event["attempt"])), None
    )


def crashes_in_a_row(events: list[Event]) -> int:
    """Attempts at the end that crashed or were killed, since the last one that ended well or a checkpoint moved on."""
    ready = {event["attempt"]: event["step"] for event in events if event["event"] == "ready"}
    count, step = 0, None
    for event in reversed(events):
        if event["event"] == "submitted" and event.get("by_user"):
            break
        if event["event"] != "ended":
            continue
        if event["status"] not in ("crashed", "killed"):
            break
        began = ready.get(event["attempt"])  # None: it crashed before its first step
        if began is not None:
            if step is not None and began < step:
                break
            step = began
        count += 1
    return count


def unreliable(events: list[Event], now: float, faults: int) -> list[str]:
    """Hosts that were to blame for ``faults`` ends at least in the last day."""
    blamed: Counter[str] = Counter()
    for event in events:
        if event["event"] == "ended" and now - event["time"] < DAY_S:
            blamed.update(set(event.get("blamed", [])))
    return sorted(host for host, count in blamed.items() if count >= faults)


def blamed_hosts(events: list[Event], attempt: str) -> tuple[list[str], str]:
    """The hosts at fault for the end of an attempt, and why: what a rank said of them."""
    found: Any = last(events, "lost", attempt)
    return (list(found["hosts"]), str(found["message"])) if found else ([], "")
