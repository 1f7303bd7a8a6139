"""Where a run starts: at step 0, or at its newest checkpoint once that is known to fit and to be
whole.
"""

import json
import uuid
from pathlib import Path

from dnt_scale.checkpoint import State
from dnt_scale.checkpoint.storage import Storage
from dnt_scale.config import ConfigError, RunConfig, from_yaml, validate
from dnt_scale.config.hooks import check_tasks, check_window
from dnt_scale.optim.schedule import Schedule
from dnt_scale.train import recorded
from dnt_scale.train.run_start import Begun
from dnt_scale.train.stages import Stages

# what a resumed run may not change: its weights, its order of data and its momentum depend on it
# and data's own `fixed`
FIXED = ("model", "run.seed", "train.global_batch", "optim.algorithm", "data.kind")


def starting_state(
    begun: Begun, stages: Stages, world_size: int
) -> tuple[State, Path | str | None]:
    """The newest checkpoint's state and path, checked against this run; or step 0 and None. For one
    rank to decide.

    Raises:
        ConfigError: the checkpoint was made with other data, other stages that it has seen, or
            another fixed field; or the run is no longer than its warmup, or ends before the window
            of ``profile.steps``, or wants tasks of ``eval.tasks`` that are not here.
    """
    run, newest = begun.run, begun.start.newest
    source, total_steps = stages.source, stages.total_steps
    Schedule(run.optim.schedule, total_steps)
    check_window(run.profile, total_steps)
    check_tasks(run.eval.tasks)
    settings = run.model_dump(mode="json")
    parts, (sets, *of_stages) = source.parts(), stages.sets()
    fresh = State(
        step=0,
        consumed_rows=0,
        skipped=0,
        seed=run.run.seed,
        run_id=(None if begun.start.aside else earlier_run_id(run)) or uuid.uuid4().hex,
        manifest_sha256=source.identity(),
        sets=sets,
        stages=dict(zip(run.train.stages, of_stages, strict=True)),
        world_size=world_size,
        config=settings,
        given=begun.given,
        files={},
        **source.facts(),
        **{source.unit.name: 0},
    )
    if (state := begun.start.state) is None or newest is None:
        return fresh, None
    trained_run = validate(state.config, f"{newest}/state.json")
    if trained_run.data.kind != run.data.kind:
        check_fixed(trained_run, run, newest)
    if problem := source.foreign(state.of_source, newest):
        raise ConfigError(
            f"{parts[0].field}: {parts[0].place} was {problem}, or take another run.name"
        )
    if state.manifest_sha256 != fresh.manifest_sha256:
        raise ConfigError(
            f"{source.difference(trained_run.data, state.sets, newest)}, so the order of rows "
            "would change; change it back, or take another run.name"
        )
    check_fixed(trained_run, run, newest)
    check_begun(trained_run, state, stages, newest)
    check_not_past(run, total_steps, state.step, newest)
    now = {
        "config": settings,
        "given": begun.given,
        "world_size": world_size,
        "sets": fresh.sets,
        "stages": fresh.stages,
        # its trackers have the steps that it does otherwise now
        **({"run_id": uuid.uuid4().hex} if begun.start.rewound else {}),
    }
    return state.model_copy(update=now), newest


def check_not_past(run: RunConfig, total_steps: int, step: int, newest: Path | str) -> None:
    """Raise ConfigError where a run is to end before the step that its checkpoint has."""
    if step > total_steps:
        raise ConfigError(
            f"train.steps: this run asks for {total_steps} steps, but {newest} already has "
            f"{step}; ask for more, or take another run.name"
        )
    if run.run.stop_at is not None and step > run.run.stop_at:
        raise ConfigError(
            f"run.stop_at: this start is to end after step {run.run.stop_at}, but {newest} already "
            f"has {step}; leave it out, or give a later one"
        )


def check_fixed(trained: RunConfig, run: RunConfig, newest: Path | str) -> None:
    """Raises ConfigError, which names the very setting, when a resume asks for what it may not
    change.
    """
    changed = recorded.differences(trained, run)
    for field in (*FIXED, *(f"data.{name}" for name in run.data.fixed)):
        found = [item for item in changed if f"{item[0]}.".startswith(f"{field}.")]
        for key, before, now in found[:1]:
            others = ", ".join(
                f"{name} {recorded.shown(a)} -> {recorded.shown(b)}" for name, a, b in found[1:]
            )
            had, asks = recorded.shown(before), recorded.shown(now)
            back = f"{key}={had} goes on with it"
            back = "change it back" if others or field.startswith("optim") else back
            raise ConfigError(
                f"{key}: {newest} was trained with {had}, this run asks for {asks}"
                f"{others and f' (also {others})'}; {back}, or take another run.name"
            )


def check_begun(trained: RunConfig, state: State, stages: Stages, newest: Path | str) -> None:
    """Raise ConfigError, which names the stage, when a resume asks for other steps before its
    checkpoint than were trained: a stage that has begun is gone or not as it was, or one begins
    there that was not.
    """
    had = trained.spans(*stages.a_rows)
    before = {span.name: span for span in had if span.begin < state.step and span.name}
    now = {stage.span.name: stage for stage in stages[1:] if stage.span.begin < state.step}
    for name, stage in now.items():
        if name not in before:
            raise ConfigError(
                f"train.stages.{name}: begins after step {stage.span.begin:,}, but {newest} has "
                f"trained to step {state.step:,} without it; let it begin there or later, or take "
                "another run.name"
            )
    changed = recorded.differences(trained, stages[0].run)
    for name, span in before.items():
        key = f"train.stages.{name}"
        for setting, old, new in changed:
            if setting.startswith(f"{key}.") and not _may_change(setting.removeprefix(f"{key}.")):
                raise ConfigError(
                    f"{setting}: {newest} was trained with {recorded.shown(old)}, this run asks "
                    f"for {recorded.shown(new)}, but the stage has begun, after step "
                    f"{span.begin:,}; change it back, or take another run.name"
                )
        sets = {part.name: part for part in now[name].source.parts()}
        for set_name, sha256 in state.stages.get(name, {}).items():
            if sets[set_name].sha256 != sha256:
                raise ConfigError(
                    f"{key}.data: the manifest of {sets[set_name].place} is not the one that "
                    f"{newest} was trained on; change it back, or take another run.name"
                )


def _may_change(setting: str) -> bool:
    """Whether a stage that has begun may go on with another value of this setting."""
    return setting == "micro_batch" or (setting.startswith("data.") and setting.endswith(".path"))


def changes(begun: Begun, stages: Stages) -> list[str]:
    """Lines on what a resume does otherwise than its checkpoint; none at step 0."""
    if (state := begun.start.state) is None:
        return []
    trained = validate(state.config, f"{begun.start.newest}/state.json")
    return list(recorded.told(trained, begun.run, state.step, *stages.a_rows))


def check_place(run: RunConfig) -> None:
    """That checkpoints can be written where they are to lie, found now rather than at the first
    save. For one rank.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        Storage(run.checkpoints).probe()
    except OSError as error:
        field = "run.dir" if run.checkpoint.dir is None else "checkpoint.dir"
        raise ConfigError(
            f"{field}: nothing can be written to {run.checkpoints} ({error.strerror or error}); "
            "give another"
        ) from None


def earlier_run_id(run: RunConfig) -> str | None:
    """The id of this very run if it was stopped before its first checkpoint, so that MLflow goes
    on with it.
    """
    try:
        if from_yaml(run.run.dir / "config.yaml") == run:
            return str(
                json.loads((run.run.dir / "logs" / "tracking.json").read_text())["key"]["run_id"]
            )
    except (OSError, ValueError, KeyError):
        pass
    return None
