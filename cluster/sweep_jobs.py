"""A sweep on SLURM: its runs are trained as the tasks of one array.

    SWEEP/sweep.json      its runs (:mod:`dnt_scale.sweep.sweep_file`); task K trains the K-th
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

from cluster import run_record
from dnt_scale.record import finalize, timeline
from dnt_scale.record.tracker import Status
from dnt_scale.sweep.sweep_file import is_sweep, read_sweep


def run_of_task(folder: Path) -> Path:
    """Return the run folder that this job works on: of a sweep's array, its task's; ``folder``
    itself where it is a run.

    Raises:
        ConfigError: sweep.json cannot be read.
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
    ConfigError."""
    ends = [_final_status(folder / run.name) for run in read_sweep(folder).runs]
    if None in ends:
        return None
    found = {run_record.MLFLOW_STATUS.get(end, "KILLED") for end in ends if end}
    order: list[Status] = ["FAILED", "KILLED", "FINISHED"]  # what ended worst counts
    return next(status for status in order if status in found)


def finalize_sweep(folder: Path) -> None:
    """Let MLflow have the sweep's true end, once it is over. Raises ConfigError."""
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
