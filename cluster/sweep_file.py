"""A sweep: runs that differ in some values, trained as the tasks of one SLURM array.

    SWEEP/sweep.json      its runs (:class:`Sweep`); the array's task K trains the K-th of them
    SWEEP/jobs/code/      the packages, for all runs
    SWEEP/jobs/slurm/     submitit's folder, for all runs
    SWEEP/RUN/            a run folder as any other (:mod:`cluster.run_record`); its jobs/code is a
                          link to the sweep's

Each run then goes its own way: requeued as a task of the array, or on with a job of its own. In
MLflow they are the children of one run.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from cluster import run_record
from cluster.run_record import RecordError
from data_prep.words import first_problem
from dnt_scale.config import Strict
from dnt_scale.record import finalize, timeline
from dnt_scale.record.files import write_json
from dnt_scale.record.tracker import Status

FILE = "sweep.json"


class SweepRun(Strict):
    name: str  # its folder has the same name
    values: dict[str, str]  # what it has of its own, by field


class Sweep(Strict):
    """``sweep.json``."""

    name: str
    id: str  # the parent run in MLflow has it
    runs: list[SweepRun]  # in the order of the array's tasks


def is_sweep(folder: Path) -> bool:
    return (folder / FILE).exists()


def read_sweep(folder: Path) -> Sweep:
    """Read the folder's sweep.json. Raises RecordError when that fails."""
    try:
        return Sweep.model_validate_json((folder / FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise RecordError(f"{folder / FILE}: cannot be read ({first_problem(error)})") from None


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """Write the folder's sweep.json. Raises OSError."""
    write_json(folder / FILE, sweep.model_dump(mode="json"))


def run_of_task(folder: Path) -> Path:
    """Return the run folder that this job works on: of a sweep's array, its task's; ``folder``
    itself where it is a run.

    Raises:
        RecordError: sweep.json cannot be read.
    """
    if not is_sweep(folder):
        return folder
    return folder / read_sweep(folder).runs[int(os.environ["SLURM_ARRAY_TASK_ID"])].name


def sweeps_of(run_dirs: Iterable[Path]) -> list[Path]:
    """Return the sweeps that some of the runs are part of, each once."""
    return [
        folder
        for folder in dict.fromkeys(run_dir.parent for run_dir in run_dirs)
        if is_sweep(folder)
    ]


def outcome(folder: Path) -> Status | None:
    """Return how the sweep ended; None while something goes on with one of its runs. Raises
    RecordError."""
    ends = [_final_status(folder / run.name) for run in read_sweep(folder).runs]
    if None in ends:
        return None
    found = {run_record.MLFLOW_STATUS.get(end, "KILLED") for end in ends if end}
    order: list[Status] = ["FAILED", "KILLED", "FINISHED"]  # what ended worst counts
    return next(status for status in order if status in found)


def finalize_sweep(folder: Path) -> None:
    """Let MLflow have the sweep's true end, once it is over. Raises RecordError."""
    places = [folder / run.name for run in read_sweep(folder).runs]
    tracked = [place for place in places if (place / "logs" / "tracking.json").exists()]
    if tracked and (status := outcome(folder)):
        finalize.finalize_sweep(tracked[0], status)


def _final_status(run_dir: Path) -> str | None:
    """Return how a run ended for good; None while it has not."""
    told = [
        event
        for event in timeline.read(run_dir)
        if event["event"] in ("submitted", "allocated", "ended")
    ]
    over = told and told[-1]["event"] == "ended" and told[-1]["next"] == "none"
    return str(told[-1]["status"]) if over else None
