"""`dnt sweep`: train the runs of a sweep on this machine, one after the other.

Which run is next and how far it trains is a function of sweep.json and results.json
(:mod:`dnt_scale.sweep.rungs`), and a run that is started again goes on from its checkpoint. So the
same command goes on after whatever has ended it.
"""

import itertools
import math
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import orjson
from rich.console import Console

from dnt_scale.config import ConfigError, RunConfig, typed
from dnt_scale.record import finalize, run_lock
from dnt_scale.record.backend import Status
from dnt_scale.record.metrics_file import METRICS
from dnt_scale.sweep import one_run, sampling, sweep_file
from dnt_scale.sweep.combinations import (
    Override,
    load_members,
    members,
    name_run,
    read_override,
    with_values,
)
from dnt_scale.sweep.progress import SweepProgress, results_table
from dnt_scale.sweep.rungs import next_part, rungs, steps_left
from dnt_scale.sweep.sweep_file import Asked, Result, Sweep, SweepRun
from dnt_scale.train.signals import stop_signals
from dnt_scale.train.stages import load_stages

WIDE = 200  # columns of a table that goes into a file or another program
Member = tuple[SweepRun, list[str]]  # a run, and the overrides that make it


@dataclass
class Here:
    """A sweep at work."""

    folder: Path
    sweep: Sweep
    asked: Asked
    size: int  # runs that there are going to be
    ranks: int
    lines: dict[str, list[str]] = field(default_factory=dict)  # what trains each run
    stops: dict[str, list[int]] = field(default_factory=dict)  # its rungs and its last step
    results: dict[str, Result] = field(default_factory=dict)

    @property
    def eta(self) -> int:
        return self.asked.halving or 1

    @property
    def choices(self) -> list[Override]:
        """The overrides, read."""
        return [read_override(line) for line in self.asked.overrides]


def sweep_here(
    asked: Asked, trials: int | None, *, ranks: int, retry_failed: bool, dry_run: bool
) -> int:
    """Train what is left of a sweep, and print what all its runs led to.

    Args:
        trials: runs that a sampler makes; None with a grid.
        ranks: processes a run.
        retry_failed: go on with runs that have failed.
        dry_run: show the runs, and change nothing.

    Returns:
        0: every run has ended as it should; 1: one failed; 128 + n: stopped by signal n.

    Raises:
        ConfigError: the sweep is none, or its folder holds something else.
        OSError: the folder cannot be written.
    """
    here = opened(asked, trials, ranks)
    if dry_run:
        print_plan(here)
        return 0
    with run_lock.held(here.folder, "dnt sweep"):
        here.results = sweep_file.read_results(here.folder)
        if retry_failed:
            here.results = {name: each for name, each in here.results.items() if not each.failed}
        sweep_file.write_sweep(here.folder, here.sweep)
        with stop_signals() as signals, SweepProgress() as progress:
            while not signals and (part := next_of(here)):
                train_part(here, *part, signals, progress)
        return finish(here, signals)


# --- what there is to train -----------------------------------------------------------------------


def opened(asked: Asked, trials: int | None, ranks: int) -> Here:
    """Return the sweep with the runs that are known by now. Changes nothing.

    Raises:
        ConfigError: see :func:`sweep_here`.
    """
    choices = [read_override(line) for line in asked.overrides]
    if trials is None:
        found = members(asked.overrides)
    else:
        sampling.check(choices, asked.sampler)
        found = [trial(choices, asked.sampler, [], 0)]
    name, runs = load_members(found)
    folder = runs[0].run.dir.parent
    before = sweep_file.read_sweep(folder) if sweep_file.is_sweep(folder) else None
    if before:
        check_same(before, asked, folder)
    elif (folder / "config.yaml").exists():
        raise ConfigError(
            f"run.name: {folder} is the folder of a run; take another run.name for the sweep"
        )
    if trials is not None:
        if before:
            found = [(run, overrides_of(run, choices)) for run in before.runs]
        if asked.sampler == "random":  # which does not wait for results
            found += [trial(choices, "random", [], each) for each in range(len(found), trials)]
        runs = load_members(found)[1]
    sweep = Sweep(
        name=name,
        id=before.id if before else uuid.uuid4().hex,
        runs=[run for run, _ in found],
        here=asked,
    )
    here = Here(folder, sweep, asked, max(trials or 0, len(runs)), ranks)
    for (_, lines), run in zip(found, runs, strict=True):
        add_run(here, lines, run)
    if asked.halving:
        set_rungs(here, runs)
    return here


def check_same(before: Sweep, asked: Asked, folder: Path) -> None:
    """Raise ConfigError where the folder's sweep is another one than is asked for."""
    if before.here is None:
        raise ConfigError(
            f"run.name: {folder} is a sweep on SLURM, see `dnt jobs {folder}`; take another "
            "run.name"
        )
    had, now = set(words(before.here)), set(words(asked))
    if had != now:
        raise ConfigError(
            f"run.name: {folder} is another sweep: it has {' '.join(sorted(had - now)) or 'less'}, "
            f"this command {' '.join(sorted(now - had)) or 'less'}; give the same, or take another "
            "run.name"
        )


def words(asked: Asked) -> list[str]:
    """Return what was asked as a command line has it."""
    halving = [f"--halving {asked.halving}"] if asked.halving else []
    return [*asked.overrides, f"--sampler {asked.sampler}", f"--metric {asked.metric}", *halving]


def add_run(here: Here, lines: list[str], run: RunConfig) -> None:
    """Add a run to those that can be trained.

    Raises:
        ConfigError: its data cannot be read, or nothing of it can be judged.
    """
    if here.asked.metric.startswith("val/") and not run.eval.every:
        raise ConfigError(
            f"eval.every is 0, so no run has a {here.asked.metric} to be judged by; give steps "
            "between validations, or --metric train/loss"
        )
    if run.run.stop_at is not None:
        raise ConfigError("run.stop_at: a sweep sets it by itself; leave it out, see --halving")
    own = [f"run.name={run.run.name}", f"run.dir={run.run.dir}", f"tracking.uri={run.tracking.uri}"]
    own += [f"checkpoint.dir={run.checkpoint.dir}"] if run.checkpoint.dir else []
    here.lines[run.run.name] = [*lines, *own]
    here.stops[run.run.name] = [load_stages(run).total_steps]


def set_rungs(here: Here, runs: list[RunConfig]) -> None:
    """Let runs stop at rungs. Raises ConfigError where they cannot be compared there."""
    lasts = {stops[-1] for stops in here.stops.values()}
    everies = {run.eval.every or 1 for run in runs}
    if len(lasts) > 1 or len(everies) > 1:
        raise ConfigError(
            "--halving compares runs at the same steps, so they need the same train.steps (or "
            f"tokens and batch) and eval.every; found {sorted(lasts)} steps, eval.every "
            f"{sorted(everies)}"
        )
    last, every = lasts.pop(), everies.pop()
    warmup = max(run.optim.schedule.steps_of_warmup(last) for run in runs)
    found = rungs(last, len(runs), here.eta, every, warmup)
    if not found:
        raise ConfigError(
            f"--halving {here.eta}: {len(runs)} runs of {last} steps have no validation at a step "
            f"to compare them, after a warmup of {warmup} and before the end; give more runs or an "
            f"eval.every below {every}, or leave --halving out"
        )
    here.stops = {name: [*found, last] for name in here.stops}


def trial(
    choices: list[Override], sampler: str, history: list[tuple[list[str], float]], number: int
) -> Member:
    """Return the run that a sampler tries next. Raises ConfigError for an interval that is none."""
    values, lines = with_values(choices, sampling.propose(choices, sampler, history, number))
    return SweepRun(name=name_run(number, 3, values), values=values), lines


def overrides_of(run: SweepRun, choices: list[Override]) -> list[str]:
    """Return the overrides that make a run that a sampler chose earlier."""
    return with_values(choices, chosen_for(run, choices))[1]


def chosen_for(run: SweepRun, choices: list[Override]) -> list[str]:
    """Return a run's values as they stand behind KEY=, in the order of the overrides."""
    found = []
    for each in choices:
        if each.varies:
            text = run.values[each.key.lstrip("+")]
            quoted = (value for value in each.values if typed.meant(value, place=False) == text)
            found.append(next(quoted, text))
    return found


def next_of(here: Here) -> tuple[str, int] | None:
    """Return the run that trains next and the step that it trains to; None when all is done. A run
    that a sampler chooses is in sweep.json then.
    """
    part = next_part(here.stops, here.eta, here.results)
    if part or len(here.sweep.runs) >= here.size:
        return part
    choices = here.choices
    history = []
    for run in here.sweep.runs:
        result = here.results[run.name]
        loss = math.inf if result.failed else result.values[here.stops[run.name][-1]]
        history.append((chosen_for(run, choices), loss))
    made = trial(choices, here.asked.sampler, history, len(here.sweep.runs))
    runs = load_members([made])[1]
    add_run(here, made[1], runs[0])
    here.sweep = here.sweep.model_copy(update={"runs": [*here.sweep.runs, made[0]]})
    sweep_file.write_sweep(here.folder, here.sweep)
    return next_of(here)


# --- training -------------------------------------------------------------------------------------


def train_part(
    here: Here, name: str, stop: int, signals: list[int], progress: SweepProgress
) -> None:
    """Train a run to a step, and write down what came of it."""
    run_dir, before = here.folder / name, here.results.get(name, Result())
    number = list(here.stops).index(name) + 1
    what = f"run {number} of {here.size} {name}"
    left = steps_left(here.size, here.stops, here.eta, here.results)
    progress.begin(what, run_dir, stop, left)
    lines = here.lines[name]
    status = one_run.train(
        [*lines, f"run.stop_at={stop}"] if stop < here.stops[name][-1] else lines,
        run_dir,
        ranks=here.ranks,
        parent=f"{here.sweep.id}:{here.sweep.name}",
        signals=signals,
        watch=progress.look,
    )
    seconds = progress.end(stop - max(before.values, default=0)) + before.seconds
    if status and signals:
        here.results[name] = before.model_copy(update={"seconds": seconds})
        progress.say(f"{what}: stopped with a checkpoint")
    else:
        value = math.nan
        failed = one_run.why_failed(status, run_dir) if status else ""
        if not failed:
            value, failed = judged(run_dir, here.asked.metric, stop)
        values = before.values if failed else {**before.values, stop: value}
        here.results[name] = Result(values=values, seconds=seconds, failed=failed)
        outcome = failed or f"{here.asked.metric} {value:.4f} at step {stop} after {seconds:.0f} s"
        progress.say(f"{what}: {'failed: ' if failed else ''}{outcome}")
    sweep_file.write_results(here.folder, here.results)
    if here.results[name].failed:
        finalize.finalize_run(run_dir, "FAILED")


def judged(run_dir: Path, metric: str, step: int) -> tuple[float, str]:
    """Return a run's metric at a step; or nan, and why there is none."""
    line: dict[str, object] = {}
    for text in (run_dir / METRICS).read_bytes().splitlines():
        found = orjson.loads(text)
        if found.get("step") == step:
            line = found
    if metric not in line:
        known = ", ".join(sorted(name for name in line if name not in ("step", "time")))
        return math.nan, f"no {metric} at step {step} of metrics.jsonl, which has {known or 'none'}"
    value = line[metric]
    if not isinstance(value, int | float):
        return math.nan, f"{metric} is not finite at step {step}: it diverged"
    return float(value), ""


def finish(here: Here, signals: list[int]) -> int:
    """Tell MLflow and the user how the sweep ended, and return the exit status."""
    failed = sum(bool(each.failed) for each in here.results.values())
    status: Status = "KILLED" if signals else "FAILED" if failed else "FINISHED"
    places = [here.folder / name for name in here.stops]
    if tracked := [place for place in places if (place / "logs" / "tracking.json").exists()]:
        finalize.finalize_sweep(tracked[0], status)
    last = {name: stops[-1] for name, stops in here.stops.items()}
    console = Console(highlight=False)
    console.print(
        results_table(here.sweep.runs, here.results, last, here.asked.metric),
        width=console.width if console.is_terminal else WIDE,
    )
    if signals:
        print("stopped; the same command goes on with it")
        return 128 + signals[0]
    if failed:
        print(f"failed: {failed} of {here.size} runs; --retry-failed goes on with them")
    print(f"`dnt report {here.folder}` draws it")
    return 1 if failed else 0


def print_plan(here: Here) -> None:
    """Print the runs, and how far each trains."""
    for run in here.sweep.runs:
        print(run.name, *(f"{key}={value}" for key, value in run.values.items()))
    if len(here.sweep.runs) < here.size:
        print(f"and {here.size - len(here.sweep.runs)} more, chosen by what comes of those before")
    stops = next(iter(here.stops.values()))
    for stop, then in itertools.pairwise(stops):
        print(f"at step {stop} the best of each {here.eta} goes on to step {then}")
