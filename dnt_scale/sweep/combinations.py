"""The runs of a sweep: every combination of the values that overrides list, each with a name and a
folder of its own."""

import itertools
import math
import re
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.types import IntervalSweep
from rich.console import Console

from dnt_scale import config
from dnt_scale.config import ConfigError, RunConfig, typed
from dnt_scale.config.tracking_uri import default_uri
from dnt_scale.sweep.sweep_file import Sweep, SweepRun

MOST = 1000  # runs: one less than the largest array that SLURM permits by default
NAME_LENGTH = 100


@dataclass(frozen=True)
class Override:
    """An override of a sweep: one value, several, or an interval to sample from."""

    line: str  # as it was typed
    key: str  # with its prefix, as in ++optim.lr
    values: tuple[str, ...] = ()  # of several, each as it stands behind KEY=
    interval: IntervalSweep | None = None

    @property
    def varies(self) -> bool:
        return bool(self.values or self.interval)


def read_override(line: str) -> Override:
    """Read one override in Hydra's grammar (``KEY=A,B``, choice(), range(), interval()).

    Names and paths are the text between the commas; one that holds a comma stands in quotes.

    Raises:
        ConfigError: it cannot be read.
    """
    prefix, key, value = typed.split(line)
    if value is not None and "~" not in prefix and typed.is_text(typed.at(RunConfig, key)):
        texts = typed.choices(value)
        return Override(line, prefix + key, tuple(texts) if len(texts) > 1 else ())
    parsed = typed.parse(line)
    if parsed is None:
        raise ConfigError(f"{config.refusal(line)}; write several values as KEY=A,B,C")
    found = str(parsed.get_key_element())
    if not parsed.is_sweep_override():
        return Override(line, found)
    if parsed.is_discrete_sweep():
        return Override(line, found, tuple(parsed.sweep_string_iterator()))
    interval = parsed.value()
    assert isinstance(interval, IntervalSweep)
    return Override(line, found, interval=interval)


def combinations(overrides: list[str]) -> list[tuple[dict[str, str], list[str]]]:
    """Return each combination of the values that ``overrides`` list, the last one changing fastest.

    Returns:
        For each its values by key, and all overrides with these in place.

    Raises:
        ConfigError: see :func:`read_override`; none has several values, one is an interval, or
            there are too many combinations.
    """
    found = [read_override(line) for line in overrides]
    for each in found:
        if each.interval:
            raise ConfigError(
                f"{each.line}: a grid needs single values; write them out, or as "
                "range(from,to,step), or let `dnt sweep --sampler random` or tpe choose them"
            )
    if not any(each.varies for each in found):
        raise ConfigError(
            "no override has several values, as a sweep needs; write them as KEY=A,B,C, or "
            "range(from,to,step)"
        )
    count = math.prod(len(each.values) or 1 for each in found)
    if count > MOST:
        raise ConfigError(
            f"{count:,} combinations of values, at most {MOST:,} are possible; give fewer"
        )
    return [
        with_values(found, chosen)
        for chosen in itertools.product(*(each.values for each in found if each.varies))
    ]


def with_values(
    overrides: list[Override], chosen: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Return the values of those overrides that vary by their keys, and all overrides with the
    values in place."""
    left = iter(chosen)
    values, lines = dict[str, str](), list[str]()
    for each in overrides:
        if each.varies:
            value = next(left)
            values[each.key.lstrip("+")] = typed.meant(value, place=False)
            lines.append(f"{each.key}={value}")
        else:
            lines.append(each.line)
    return values, lines


def name_runs(values: list[dict[str, str]]) -> list[str]:
    """Return a name for each run: its number and its values."""
    width = len(str(len(values) - 1))
    return [name_run(number, width, own) for number, own in enumerate(values)]


def name_run(number: int, width: int, values: dict[str, str]) -> str:
    """Return the name of a run: its number in ``width`` digits, and its values."""
    last = Counter(key.rpartition(".")[2] for key in values)
    words = [f"{number:0{width}}"]
    for key, value in values.items():
        short = key.rpartition(".")[2]
        words.append(f"{short if last[short] == 1 else key}_{value}")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(words))[:NAME_LENGTH]


def members(overrides: list[str]) -> list[tuple[SweepRun, list[str]]]:
    """Return the runs of the grid that ``overrides`` describe, each with the overrides that make
    it. Raises ConfigError, see :func:`combinations`.
    """
    found = combinations(overrides)
    names = name_runs([values for values, _ in found])
    return [
        (SweepRun(name=name, values=values), lines)
        for name, (values, lines) in zip(names, found, strict=True)
    ]


def load_members(found: Sequence[tuple[SweepRun, list[str]]]) -> tuple[str, list[RunConfig]]:
    """Return the sweep's name and its runs, with names and folders of their own.

    Raises:
        ConfigError: one is no valid run; or run.name or run.dir differ.
    """
    runs = []
    with Console(stderr=True).status("") as status:
        for number, (_, lines) in enumerate(found, 1):
            status.update(f"reading combination {number} of {len(found)}")
            runs.append(config.load(lines))
    own = runs[0].run
    if any((run.run.name, run.run.dir) != (own.name, own.dir) for run in runs):
        raise ConfigError(
            "run.name and run.dir are the sweep's; give one of each, the runs get names of their "
            "own"
        )
    return own.name, [
        run_in_sweep(run, member.name) for run, (member, _) in zip(runs, found, strict=True)
    ]


def expand_sweep(overrides: list[str]) -> tuple[Sweep, list[RunConfig]]:
    """Return the grid that ``overrides`` describe, whose folder is the ``run.dir`` they give, and
    its runs. Raises ConfigError, see :func:`combinations` and :func:`load_members`.
    """
    found = members(overrides)
    name, runs = load_members(found)
    return Sweep(name=name, id=uuid.uuid4().hex, runs=[member for member, _ in found]), runs


def run_in_sweep(run: RunConfig, name: str) -> RunConfig:
    """Return the run with a name and folders of its own inside the sweep's, and the sweep's MLflow
    store."""
    kept = run.checkpoint.dir
    return run.model_copy(
        update={
            "run": run.run.model_copy(update={"name": name, "dir": run.run.dir.absolute() / name}),
            "tracking": run.tracking.model_copy(
                update={"uri": run.tracking.uri or default_uri(run.run.dir)}
            ),
            "checkpoint": run.checkpoint.model_copy(
                update={"dir": kept and f"{kept.rstrip('/')}/{name}"}
            ),
        }
    )
