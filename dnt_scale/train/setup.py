"""What a run is made of: its parts, made in this order on every rank, and where it stands."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dnt_scale import checkpoint, engine
from dnt_scale.checkpoint import State
from dnt_scale.config import RunConfig, Unit
from dnt_scale.data.sources import Source
from dnt_scale.distributed.agree import on_first, together
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.engine import fp8
from dnt_scale.engine.averaging import begun_from
from dnt_scale.engine.base import Engine, StepStats
from dnt_scale.model.task import Task, build_task
from dnt_scale.optim.groups import parameter_groups
from dnt_scale.optim.transfer import Ratios, rates, ratios, told
from dnt_scale.record.files import warn
from dnt_scale.record.metrics_file import last_metrics
from dnt_scale.record.speed import Metrics
from dnt_scale.record.timeline import Clock
from dnt_scale.record.tracker import Status, Tracker
from dnt_scale.train.progress import TrainProgress, opening_line
from dnt_scale.train.resume import changes, check_place, starting_state
from dnt_scale.train.run_facts import start_tracking
from dnt_scale.train.run_start import Begun, make_room
from dnt_scale.train.spike_guard import Guard
from dnt_scale.train.stages import (
    Batches,
    Stage,
    Stages,
    check_batches,
    check_sets,
    load_stages,
)


@dataclass
class Training:
    """A run at work on this rank: its parts, and how far it is."""

    config: RunConfig
    ranks: Ranks
    stages: Stages  # one, unless `train.stages` has more
    batches: Batches  # of all stages, read ahead
    engine: Engine
    guard: Guard  # judges each step
    saver: checkpoint.Saver
    clock: Clock  # tells the timeline where the seconds go
    tracker: Tracker | None  # rank 0's
    progress: TrainProgress  # what a person sees
    newest: Path | str | None  # the checkpoint that it goes on from
    restored_s: float  # seconds that reading it took

    state: State  # after the last step
    signals: list[int] = field(default_factory=list)  # that this rank got and that end a run
    stopped_by: int = 0  # the signal that ends the run on all ranks; 0: none
    unwritten: OSError | None = None  # why the last line of metrics.jsonl could not be written
    unread: "Step | None" = None  # the last step, while its numbers are on their way to the host
    read_at: float = 0.0  # when the host had a step's numbers last, of time.perf_counter
    outcome: Status = "FAILED"  # until it is known to be better

    @property
    def source(self) -> Source:
        """The run's own data, which validation reads in all stages."""
        return self.stages.source

    @property
    def unit(self) -> Unit:
        """What rows count towards the budget and speed."""
        return self.source.unit

    @property
    def stage(self) -> Stage:
        """The stage of the next step."""
        return self.stages.at(self.state.step)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.stages.total_steps

    @property
    def complete(self) -> bool:
        """Whether the last step is done."""
        return self.state.step == self.total_steps

    @property
    def halted(self) -> bool:
        """Whether the step is done after which this start is to end (``run.stop_at``)."""
        stop_at = self.config.run.stop_at
        return stop_at is not None and self.state.step >= stop_at

    def report(self, metrics: Metrics) -> None:
        """Write a line of metrics.jsonl and show it. An error waits for ``hooks.agreement``."""
        state = self.state
        done = {"step": state.step, self.unit.name: self.stages.units_at(state.step)}
        line = {**done, "time": time.time(), **metrics}
        if self.tracker:
            try:
                self.tracker.log(line)
            except OSError as error:
                self.unwritten = self.unwritten or error
        self.progress.update(self.state.step, line)


@dataclass
class Step:
    """A step that was just done, for the hooks that follow it."""

    number: int  # from 1
    stage: Stage
    first_row: int  # of its global batch, in the training sequence
    last: bool  # the run's last one
    stats: StepStats
    started: float  # of time.perf_counter
    # its line of metrics.jsonl, to which a hook before ``records`` may add; loss and the like come
    # with the numbers of the step
    metrics: Metrics
    writing: bool = False  # whether any rank still writes an earlier checkpoint
    saved: bool = False  # whether a checkpoint of this step was begun


def set_up(begun: Begun, ranks: Ranks) -> Training:
    """Make the parts of a run; one that is refused leaves no folder. A collective.

    Raises:
        ValueError: the configuration, the data and the checkpoint do not fit together, or a file is
            damaged.
        OSError: the run folder cannot be written.
    """
    config = begun.run
    stages = together(ranks, lambda: load_stages(config))
    size, units = ranks.world_size, stages.a_rows
    state, newest = on_first(ranks, lambda: starting_state(begun, stages, size))
    together(ranks, lambda: check_sets(stages, [state.sets, *state.stages.values()]))
    together(ranks, lambda: check_batches(config, size))
    if newest:
        checkpoint.check_files(newest, state, ranks)
    batches = together(ranks, lambda: Batches(stages, state.step, state.consumed_rows, ranks))
    lr_ratios = together(ranks, lambda: ratios(config, *units))
    steps, spans = stages.total_steps, stages.spans
    built = engine.build(
        config, lambda: build_task(config.model, stages.source.rows), ranks, steps, lr_ratios, spans
    )
    on_first(ranks, lambda: make_room(begun))
    on_first(ranks, lambda: check_place(config))  # makes the folder: all refusals are above
    clock = Clock(config.run.dir, silent=not ranks.first)
    clock.start(ranks.world_size, last_metrics(config.run.dir)[-1:])
    guard = Guard(config.health, config.optim.judged_clip_norm, config.train.max_skipped)
    restored_s = restore(begun, built, guard, state, ranks) if newest else 0.0
    guard.keep(state.step, built, at_checkpoint=True)
    saver = together(ranks, lambda: open_saver(config, ranks, clock))
    scaled = scaled_rates(config, stages.source, lr_ratios) if ranks.first else {}
    tracker = together(
        ranks, lambda: start_tracking(config, state, ranks, scaled) if ranks.first else None
    )
    for line in changes(begun, stages) if ranks.first else []:
        warn(line)
    progress = TrainProgress(
        steps, state.step, stages.source, stages.work_at, silent=not ranks.first
    )
    progress.say(opening_line(config, stages, newest, ranks))
    if scaled:
        progress.say(told(scaled))
    if config.train.dtype == "fp8":
        progress.say(fp8.told(blank_task(config, stages.source), compiled=config.engine.compile))
    for note in stages.source.notes(config):
        progress.say(note)
    return Training(
        config=config,
        ranks=ranks,
        stages=stages,
        batches=batches,
        engine=built,
        guard=guard,
        saver=saver,
        clock=clock,
        tracker=tracker,
        progress=progress,
        newest=newest,
        restored_s=restored_s,
        state=state,
    )


def scaled_rates(
    config: RunConfig, source: Source, lr_ratios: Ratios | None
) -> dict[str, tuple[float, float]]:
    """Return the learning rates given and scaled, by group; empty without ``optim.scale``."""
    if lr_ratios is None:
        return {}
    named = blank_task(config, source).named_parameters()
    return rates(parameter_groups(named, config.optim, lr_ratios))


def blank_task(config: RunConfig, source: Source) -> Task:
    """Return the run's model without memory for its weights: names and shapes."""
    with torch.device("meta"):
        return build_task(config.model, source.rows)


def restore(begun: Begun, built: Engine, guard: Guard, state: State, ranks: Ranks) -> float:
    """Read a checkpoint into the engine and the guard, and return the seconds that it took."""
    started = time.perf_counter()
    recorded, newest = begun.start.state, begun.start.newest
    assert recorded and newest
    shards = built.shards()
    checkpoint.read_tensors(newest, shards if recorded.averaged else begun_from(shards), ranks)
    built.refresh(state.scalars)
    guard.restore(state.health)
    return time.perf_counter() - started


def open_saver(config: RunConfig, ranks: Ranks, clock: Clock) -> checkpoint.Saver:
    """Return the saver of the run's checkpoints, which tells the timeline of each."""
    return checkpoint.Saver(
        config.checkpoints,
        ranks,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        background=config.checkpoint.background,
        in_place=lambda step: clock.tell("saved", step=step),
    )
