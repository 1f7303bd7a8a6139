"""The folder of a sweep.

    SWEEP/sweep.json      its runs, and of one that is trained here what was asked (:class:`Sweep`)
    SWEEP/results.json    what became of them here so far (:class:`Result`), after each part of one
    SWEEP/RUN/            a run folder as any other

Both files are replaced in one piece, so whoever is killed leaves one that is whole. On SLURM there
is a folder SWEEP/jobs too (:mod:`cluster.sweep_jobs`), and runs tell by their own folders how they
are. In MLflow the runs are the children of one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter, ValidationError

from dnt_scale.config import ConfigError, Strict
from dnt_scale.record.files import write_json

FILE = "sweep.json"
RESULTS = "results.json"

Sampler = Literal["grid", "random", "tpe"]


class SweepRun(Strict):
    name: str  # its folder has the same name
    values: dict[str, str]  # what it has of its own, by field


class Asked(Strict):
    """What a sweep that is trained here was begun with."""

    overrides: list[str]
    sampler: Sampler = "grid"
    metric: str = "val/loss"  # of metrics.jsonl; the lowest is the best
    halving: int | None = None  # one in so many goes on after each rung; None: all to the end


class Sweep(Strict):
    """``sweep.json``."""

    name: str
    id: str  # the parent run in MLflow has it
    runs: list[SweepRun]  # in the order of training; on SLURM of the array's tasks
    here: Asked | None = None  # None: on SLURM


class Result(Strict):
    """What became of a run so far."""

    values: dict[int, float] = Field({})  # the metric, by the step at which it was judged
    seconds: float = 0.0  # that its processes took
    failed: str = ""  # why it ended before its time


_RESULTS = TypeAdapter(dict[str, Result])


def is_sweep(folder: Path) -> bool:
    return (folder / FILE).exists()


def read_sweep(folder: Path) -> Sweep:
    """Read the folder's sweep.json. Raises ConfigError when that fails."""
    file = folder / FILE
    try:
        return Sweep.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConfigError(f"{file}: cannot be read ({_problem(error)})") from None


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """Write the folder's sweep.json. Raises OSError."""
    write_json(folder / FILE, sweep.model_dump(mode="json", exclude_none=True))


def read_results(folder: Path) -> dict[str, Result]:
    """Read the results of runs by their names; empty before the first. Raises ConfigError."""
    file = folder / RESULTS
    try:
        return _RESULTS.validate_json(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"{file}: cannot be read ({_problem(error)}); move it away, and the same command finds "
            "out again from the run folders what was trained"
        ) from None


def write_results(folder: Path, results: Mapping[str, Result]) -> None:
    """Write the folder's results.json. Raises OSError."""
    write_json(folder / RESULTS, _RESULTS.dump_python(dict(results), mode="json"))


def _problem(error: OSError | ValidationError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first["loc"] else first["msg"]
