"""Runs as a report sees them: settings and losses, read from their folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dnt_scale import config
from dnt_scale.config import ConfigError
from dnt_scale.record import timeline
from dnt_scale.record.metrics_file import METRICS, unit_of, whole_lines
from dnt_scale.record.plots import series
from dnt_scale.sweep.sweep_file import is_sweep, read_sweep

Floats = NDArray[np.float64]
RUNS = Path("runs")


@dataclass(frozen=True)
class Run:
    """A run.

    settings: every key of its configuration with its value, by dotted name.
    unit: what its rows are counted in, of text tokens.
    train, val: units seen and loss in nats, each (points,).
    units: seen in all.
    seconds: that its steps took.
    state: finished, failed, or stopped before the end of its budget.
    """

    name: str
    folder: Path
    settings: dict[str, object]
    unit: str
    train: tuple[Floats, Floats]
    val: tuple[Floats, Floats]
    units: int
    steps: int
    seconds: float
    state: str

    @property
    def loss(self) -> float | None:
        """The validation loss at its end; None where it did not come so far."""
        counts, losses = self.val
        at_end = counts.size and counts[-1] == self.units
        return float(losses[-1]) if self.state == "finished" and at_end else None


def read_runs(words: Sequence[str]) -> list[Run]:
    """Read runs, given by their folders, names in runs/, or by the sweep that they are part of;
    each once.

    Raises:
        ConfigError: one is neither, or cannot be read.
    """
    folders = dict.fromkeys(folder for word in words for folder in folders_of(word))
    runs = [read_run(folder) for folder in folders]
    if len(units := sorted({run.unit for run in runs})) > 1:
        raise ConfigError(
            f"these runs count {' and '.join(units)}, which do not compare; report them apart"
        )
    return runs


def folders_of(word: str) -> list[Path]:
    """Return the run folders that a word means. Raises ConfigError for none."""
    place = place_of(word)
    if not is_sweep(place):
        return [place]
    names = [run.name for run in read_sweep(place).runs]
    if found := [place / name for name in names if (place / name / METRICS).exists()]:
        return found
    raise ConfigError(f"{place}: a sweep of which no run has begun; train it first")


def place_of(word: str) -> Path:
    """Return the folder of a run or a sweep that a word means. Raises ConfigError for none."""
    for place in (Path(word), RUNS / word):
        if is_sweep(place) or (place / "config.yaml").exists():
            return place
    raise ConfigError(
        f"{word}: neither it nor {RUNS / word} is a run's folder (with a config.yaml) or a sweep's "
        "(with a sweep.json); `ls runs` shows what there is"
    )


def read_run(folder: Path) -> Run:
    """Read a run's folder. Raises ConfigError where its files cannot be read or hold no loss."""
    run = config.from_yaml(folder / "config.yaml")
    try:
        lines = whole_lines(folder / METRICS)
    except OSError as error:
        raise ConfigError(f"{folder / METRICS}: {error.strerror}; train the run first") from None
    unit = unit_of(lines)
    train, val = series(lines, "train/loss", unit), series(lines, "val/loss", unit)
    steps = [line for line in lines if line.get("step")]
    if not steps or not (train[0].size or val[0].size):
        raise ConfigError(f"{folder / METRICS}: holds no loss yet; train some steps first")
    step, units = int(steps[-1]["step"]), int(steps[-1][unit])
    reached = step >= run.train.steps if run.train.steps else units >= (run.train.tokens or 0)
    # A step's seconds are its units over its speed; what a resume did again stands there once.
    seconds, before = 0.0, {"step": 0, unit: 0}
    for line in steps:
        if speed := line.get(f"{unit}_per_s"):
            a_step = (line[unit] - before[unit]) / max(1, line["step"] - before["step"])
            seconds += a_step / speed
        before = line
    ends = [event for event in timeline.read(folder) if event["event"] == "end"]
    failed = bool(ends) and ends[-1].get("outcome") == "FAILED"
    return Run(
        name=run.run.name,
        folder=folder,
        settings=dict(config.flat(run)),
        unit=unit,
        train=train,
        val=val,
        units=units,
        steps=step,
        seconds=seconds,
        state="failed" if failed else "finished" if reached else "stopped",
    )
