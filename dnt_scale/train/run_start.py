"""What a start does with what it finds: begins, goes on from a checkpoint, or refuses. Never the
first for the second.

``run_folder.decide`` only looks. What has to go before a run can begin (with ``--fresh``; or where
a run of other settings was killed before its first checkpoint) is moved aside by :func:`make_room`,
into RUN/before-DATE, once nothing speaks against the start. Nothing is ever deleted. Rank 0 does
both, while it holds the run's lock (:mod:`dnt_scale.record.run_lock`).
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from dnt_scale import checkpoint, config
from dnt_scale.checkpoint.read import complete
from dnt_scale.checkpoint.state import step_of
from dnt_scale.checkpoint.storage import Storage
from dnt_scale.config import ConfigError, RunConfig
from dnt_scale.distributed import compute_dtype
from dnt_scale.distributed.agree import check_settings, on_first
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.record import run_lock, timeline
from dnt_scale.record.appended import EVALUATIONS, EVALUATIONS_FOLDER, set_evaluations_aside
from dnt_scale.record.backend import check_backends
from dnt_scale.record.files import warn
from dnt_scale.record.metrics_file import DIAGNOSTICS, METRICS
from dnt_scale.record.sender_files import backends_of, read_order
from dnt_scale.train import micro_batch, recorded
from dnt_scale.train.recorded import Typed
from dnt_scale.train.run_folder import (
    Start,
    check_is_ours,
    decide,
    elsewhere,
    real_path,
    settings_of,
)
from dnt_scale.train.stages import load_stages

AT_WORK = ("submitted", "allocated", "ended")
ASIDE = "before-"
JOB_PATIENCE_S = 120.0  # a file server may notice the end of a lost node so late
# Moved aside by --fresh, with the checkpoints and what trackers made.
MOVED = (
    "config.yaml",
    METRICS,
    DIAGNOSTICS,
    EVALUATIONS,
    EVALUATIONS_FOLDER,
    "plots",
    "profile",
    "logs",
    "jobs",
)


@dataclass(frozen=True)
class Begun:
    """A run as it begins or goes on, for every rank."""

    run: RunConfig
    start: Start
    given: list[str] = field(default_factory=list)  # what was typed for it, now and before
    notes: tuple[str, ...] = ()


def begin(
    run: RunConfig, typed: Typed, *, fresh: bool = False, from_step: int | None = None
) -> Begun:
    """What a start does, and the run with what it keeps of its checkpoint's settings. Changes
    nothing.

    Args:
        fresh: move aside what is there, and begin at step 0.
        from_step: go on from the newest checkpoint of so many steps or fewer; of a run that is to
            be longer, also from before its learning rate decayed (schedule ``wsd``).

    Raises:
        ConfigError: as :func:`decide`, or what was typed does not go with what is kept.
        ValueError: a tracking backend cannot work here.
        CheckpointError: the newest checkpoint is damaged.
        OSError: something cannot be read.
    """
    if os.path.lexists(run.run.dir / "sweep.json"):  # cluster/sweep_file.py
        raise ConfigError(
            f"run.dir: {run.run.dir} is the folder of a sweep, by its sweep.json; {elsewhere(run)}"
        )
    if run.tracking.enabled:
        check_backends(run.tracking.backends)
    if from_step is not None:
        return _earlier(run, typed, from_step)
    start = _anew_start(run) if fresh else decide(run)
    if start.state is None:
        return Begun(run, start, list(typed.overrides), start.notes)
    kept, more = recorded.kept(run, typed, start.state.config, start.state.given, start.newest)
    return Begun(
        kept, start, recorded.together(start.state.given, typed.overrides), start.notes + more
    )


def _earlier(run: RunConfig, typed: Typed, from_step: int) -> Begun:
    """A run that goes on from an earlier checkpoint than its newest. Raises ConfigError."""
    begun = begin(run, typed)
    last = begun.start
    if last.state is None:
        raise ConfigError(
            f"--from-step: {run.run.dir} has no checkpoint to go on from; leave it out"
        )
    if Storage(run.checkpoints).local is None:
        raise ConfigError(
            f"--from-step: nothing is moved at a URL, and {run.checkpoints} is one; move the later "
            "checkpoints yourself and leave it out"
        )
    trained = config.validate(last.state.config, f"{last.newest}/state.json")
    units = load_stages(begun.run).a_rows
    total = trained.total_steps(*units)
    decay = trained.optim.schedule.steps_before_decay(total)
    notes = begun.notes
    if decay is not None and decay < from_step and total < begun.run.total_steps(*units):
        notes += (f"the learning rate decayed after step {decay}: --from-step is {decay}",)
        from_step = decay
    start = decide(run, from_step)
    assert start.state
    if start.state.step == last.state.step:
        return replace(begun, notes=notes)
    trackers = {path.stem for path in (run.run.dir / "logs").glob("*.json")} - {"tracking"}
    aside = ("plots", "profile", "logs", *sorted(trackers))
    return replace(begun, start=replace(start, aside=aside, rewound=True), notes=notes)


@contextmanager
def only_writer(
    run: RunConfig, ranks: Ranks, check_no_job: Callable[[Path], None]
) -> Iterator[None]:
    """Hold the locks of the run folder and of a folder of its checkpoints elsewhere, on rank 0. A
    collective.

    Args:
        check_no_job: raises ConfigError while a job of a launcher trains the run, or is going to;
            not asked by a job.

    Raises:
        AgreedError: on every rank: another process writes the run folder, or nothing can be written
            there.
    """
    locks: list[run_lock.Lock] = []
    attempt = os.environ.get("DNT_ATTEMPT")

    def lock() -> None:
        mine = run_lock.this_process("training", ranks.world_size)
        patience = JOB_PATIENCE_S if attempt else 0.0
        locks.append(run_lock.take(run.run.dir, mine, patience_s=patience))
        place = run.checkpoints
        # a run in another folder may share it
        if (
            run.checkpoint.dir is not None
            and isinstance(place, Path)
            and real_path(place) != real_path(run.run.dir)
        ):
            locks.append(run_lock.take(place, mine, patience_s=patience, field="checkpoint.dir"))
        if not attempt:
            check_no_job(run.run.dir)

    try:
        on_first(ranks, lock)
        yield
    finally:
        for held in reversed(locks):
            held.release()


def begun_on_all(
    run: RunConfig, ranks: Ranks, typed: Typed, *, fresh: bool, from_step: int | None = None
) -> Begun:
    """:func:`begin` on rank 0, for every rank, once all are found to have the same settings. A
    collective.

    Raises:
        AgreedError: on every rank, as :func:`begin`, or where their settings differ.
    """
    # a set may lie elsewhere on each node: its manifest tells which it is, see
    # data.sources.check_parts
    check_settings(
        ranks, {key: value for key, value in config.flat(run).items() if not is_set_path(key)}
    )
    begun = on_first(ranks, lambda: begin(run, typed, fresh=fresh, from_step=from_step))
    here = begun.run.model_copy(update={"data": run.data})
    run, of_dtype = compute_dtype.resolve(here, ranks, run.train.dtype, begun.start.dtype)
    run, of_rows = micro_batch.resolve(run, ranks, begun.start)
    for note in (*begun.notes, of_dtype, of_rows) if ranks.first else ():
        if note:
            warn(note)
    return replace(begun, run=run)


def is_set_path(key: str) -> bool:
    """Whether a flattened configuration's key is the place of a set."""
    return key.startswith("data.") and key.endswith(".path")


# --- moving aside ---------------------------------------------------------------------------------


def _anew_start(run: RunConfig) -> Start:
    """A start at step 0 whatever is there. Raises ConfigError where checkpoints at a URL are in
    the way.
    """
    place = Storage(run.checkpoints)
    if place.local is None and any(step_of(name) is not None for name in place.names()):
        raise ConfigError(
            f"checkpoint.dir: --fresh moves nothing at a URL, and {place} holds checkpoints; move "
            "them yourself, or give another checkpoint.dir"
        )
    if run.checkpoint.dir is not None and place.local and (whole := complete(place)):
        newest, settings = whole[max(whole)], {}
        with suppress(ConfigError):  # not a run's: it goes aside too
            settings = settings_of(run)
        with suppress(checkpoint.CheckpointError):  # damaged: the same
            check_is_ours(run, settings, newest, checkpoint.read_state(newest.path))
    reports = {path.stem for path in (run.run.dir / "logs").glob("*.json")}  # one of each backend
    trackers = {*backends_of(read_order(run.run.dir)), *reports} - {*MOVED, "tracking"}
    return Start(aside=(*MOVED, *sorted(trackers)), fresh=True)


def make_room(begun: Begun) -> None:
    """Move aside what is to go before the run begins, and say so. Raises OSError; what was moved
    stays so.
    """
    run_dir, place = begun.run.run.dir, Storage(begun.run.checkpoints).local
    if begun.start.rewound and place:
        _rewind(begun, run_dir, place)
        return
    moves = [(run_dir, [name for name in begun.start.aside if os.path.lexists(run_dir / name)])]
    if begun.start.fresh and place:
        if begun.run.checkpoint.dir is None and not (place.is_symlink() and place.is_dir()):
            moves[0][1].extend(["checkpoints"] if os.path.lexists(place) else [])
        elif place.is_dir():  # elsewhere: it stays there
            moves.append(
                (
                    place,
                    [path.name for path in sorted(place.iterdir()) if _of_checkpoints(path.name)],
                )
            )
    for folder, names in moves:
        if names:
            aside = _dated(folder)
            aside.mkdir()
            for name in names:
                (folder / name).rename(aside / name)
            warn(f"{', '.join(sorted(names))} of {folder} moved into {aside}")


def _rewind(begun: Begun, run_dir: Path, place: Path) -> None:
    """Move aside what came after the checkpoint that the run goes on from. Of the lines of metrics,
    diagnostics and evaluations a copy is moved: the run keeps those up to its checkpoint.
    """
    assert begun.start.state
    step = begun.start.state.step
    names = [path.name for path in place.iterdir()]
    later = [name for name in names if name == "latest" or (step_of(name) or 0) > step]
    aside = _dated(run_dir)
    aside.mkdir()
    for name in (METRICS, DIAGNOSTICS):
        if (run_dir / name).exists():
            shutil.copy2(run_dir / name, aside / name)
    set_evaluations_aside(run_dir, step, aside)
    for name in begun.start.aside:
        if os.path.lexists(run_dir / name):
            (run_dir / name).rename(aside / name)
    inside = begun.run.checkpoint.dir is None and not place.is_symlink()
    kept = aside / "checkpoints" if inside else _dated(place)
    kept.mkdir()
    for name in sorted(later):
        (place / name).rename(kept / name)
    warn(
        f"checkpoints after step {step} moved into {kept}; metrics as they were, logs and plots "
        f"into {aside}"
    )


def _of_checkpoints(name: str) -> bool:
    return name == "latest" or name.startswith(("step-", ".partial-step-", ".old-step-"))


def _dated(folder: Path) -> Path:
    """A new name in ``folder`` for what was there before now."""
    name = f"{ASIDE}{time.strftime('%Y-%m-%d-%H%M%S')}"
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    return folder / next(free for free in names if not os.path.lexists(folder / free))


# --- jobs -----------------------------------------------------------------------------------------


def check_no_job(run_dir: Path) -> None:
    """What can be told without SLURM: that by its timeline no job of the run is in the queue or at
    work.

    Raises:
        ConfigError: one is.
    """
    if not (run_dir / "jobs" / "run.json").exists():
        return
    told = [event for event in timeline.read(run_dir) if event["event"] in AT_WORK]
    if told and told[-1]["event"] == "ended" and told[-1].get("next") == "none":
        return
    which = f"job {str(told[-1]['attempt']).partition('.')[0]}" if told else "a job"
    raise ConfigError(
        f"run.dir: {run_dir} is in use by {which}, as its timeline says; `dnt cancel {run_dir}` "
        f"ends that, and if it is over, `dnt jobs {run_dir}` finds that out and writes it down "
        f"(where there is no SLURM to ask, delete {run_dir / 'jobs' / 'run.json'})"
    )
