"""Groups of runs: those that differ in nothing but their seed; and the settings that vary."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dnt_scale.config import ConfigError
from dnt_scale.report.runs import Run

SEED = "run.seed"
RATE = "optim.lr"
# What says nothing of what a run learns.
IGNORED = {
    "run.name",
    "run.dir",
    "run.stop_at",
    "run.device",
    "health.hang_s",
    "health.check_every",
}
IGNORED_SECTIONS = {"tracking", "checkpoint", "profile", "garbage", "measure"}
# The key that names a choice of files: what follows from it is not told again.
NAMING = {"model": "model.name", "optim": "optim.algorithm", "engine": "engine.name"}


@dataclass(frozen=True)
class Group:
    """Runs with the same values of the settings that vary, of several seeds."""

    values: dict[str, object]  # of the settings that vary, but for the seed
    runs: list[Run]  # by seed

    @property
    def losses(self) -> list[float]:
        """The final validation losses of the runs that came to their end."""
        return [run.loss for run in self.runs if run.loss is not None]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.losses) if self.losses else None

    @property
    def failed(self) -> int:
        return sum(run.state == "failed" for run in self.runs)


def varying(runs: Sequence[Run]) -> list[str]:
    """Return the settings whose values differ between the runs, names of choices first, then
    in the configuration's order, without the seed.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    found = [
        key
        for key in keys
        if key != SEED
        and key not in IGNORED
        and key.partition(".")[0] not in IGNORED_SECTIONS
        and len({repr(run.settings.get(key)) for run in runs}) > 1
    ]
    told = [key for key in found if key == RATE or not _follows(key, found, runs)]
    return sorted(told, key=lambda key: key not in NAMING.values())


def _follows(key: str, found: Sequence[str], runs: Sequence[Run]) -> bool:
    """Return whether a setting follows from the choice of its section's file."""
    name = NAMING.get(key.partition(".")[0])
    if name is None or name == key or name not in found:
        return False
    values: dict[str, set[str]] = {}
    for run in runs:
        chosen = repr(run.settings.get(name))
        values.setdefault(chosen, set()).add(repr(run.settings.get(key)))
    return all(len(each) == 1 for each in values.values())


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Return the groups in the order of their values."""
    keys = varying(runs)
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(repr(run.settings.get(key)) for key in keys), []).append(run)
    groups = [
        Group(
            {key: each[0].settings.get(key) for key in keys},
            sorted(each, key=lambda run: (order(run.settings.get(SEED)), str(run.folder))),
        )
        for each in found.values()
    ]
    return sorted(groups, key=lambda group: [order(value) for value in group.values.values()])


def order(value: object) -> tuple[int, float, str]:
    """Return what sorts values of a setting: numbers by size, then the others by name."""
    if is_number(value):
        return 0, float(value), ""  # type: ignore[arg-type]
    return 1, 0.0, str(value)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def axis(groups: Sequence[Group], asked: str | None) -> str | None:
    """Return the numeric setting that losses are drawn against: the one asked for, the learning
    rate, else the first that varies; None without any.

    Raises:
        ConfigError: the one asked for does not vary, or is no number.
    """
    keys = groups[0].values
    numeric = [key for key in keys if all(is_number(group.values[key]) for group in groups)]
    if asked is not None and asked not in numeric:
        raise ConfigError(
            f"--against {asked}: no number that differs between these runs; those that do: "
            f"{', '.join(numeric) or 'none'}"
        )
    return asked or (RATE if RATE in numeric else next(iter(numeric), None))


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return for each key its last word, where no other has the same, else all of it."""
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: word if last.count(word) == 1 else key for key, word in zip(keys, last, strict=True)
    }


def text(value: object) -> str:
    """Return a value of a setting as people read it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value is None else str(value)


def label(values: dict[str, object]) -> str:
    """Return settings and their values in words."""
    names = short_names(list(values))
    return ", ".join(f"{names[key]} {text(value)}" for key, value in values.items())
