"""Where a run starts: at step 0, or at its newest checkpoint once that is known to fit and to be whole."""

import json
import math
import uuid
from pathlib import Path

from dnt_scale.checkpoint import State
from dnt_scale.checkpoint.storage import Storage
from dnt_scale.config import ConfigError, DataConfig, RunConfig, to_yaml, validate
from dnt_scale.config.hooks import check_window
from dnt_scale.data.sources import Sources, identity, manifests_of, weights_of
from dnt_scale.optim.schedule import Schedule
from dnt_scale.train import recorded
from dnt_scale.train.run_start import Begun

# what a resumed run may not change: its weights, its order of data and its momentum depend on it
FIXED = ("model", "run.seed", "train.global_batch", "optim.algorithm", "data.document_mask")


def starting_state(
    begun: Begun, sources: Sources, total_steps: int, world_size: int
) -> tuple[State, Path | str | None]:
    """The newest checkpoint's state and path, checked against this run; or step 0 and None. For one rank to decide.

    Raises:
        ValueError: the checkpoint was made with another tokenizer, data or fixed field; or the run is no longer than
            its warmup, or ends before the window of ``profile.steps``.
    """
    run, newest = begun.run, begun.start.newest
    Schedule(run.optim.schedule, total_steps)
    check_window(run.profile, total_steps)
    settings = run.model_dump(mode="json")
    fresh = State(
        step=0,
        consumed_rows=0,
        tokens=0,
        skipped=0,
        seed=run.run.seed,
        run_id=(None if begun.start.aside else earlier_run_id(run)) or uuid.uuid4().hex,
        manifest_sha256=identity(sources),
        sets=manifests_of(sources),
        tokenizer_sha256=sources[0].manifest.tokenizer.sha256,
        world_size=world_size,
        config=settings,
        given=begun.given,
        files={},
    )
    if (state := begun.start.state) is None or newest is None:
        return fresh, None
    if state.tokenizer_sha256 != fresh.tokenizer_sha256:
        raise ConfigError(
            f"{sources[0].field}: {sources[0].folder} was made with another tokenizer (sha256 "
            f"{fresh.tokenizer_sha256[:12]}) than {newest} (sha256 {state.tokenizer_sha256[:12]}); "
            "prepare it with --tokenizer, or take another run.name"
        )
    trained_run = validate(state.config, f"{newest}/state.json")
    if state.manifest_sha256 != fresh.manifest_sha256:
        raise ConfigError(
            f"{difference(state, trained_run.data, run.data, sources, newest)}, so the order of rows would change; "
            "change it back, or take another run.name"
        )
    check_fixed(trained_run, run, newest)
    if state.step > total_steps:
        raise ConfigError(
            f"train.steps: this run asks for {total_steps} steps, but {newest} already has {state.step}; "
            "ask for more, or take another run.name"
        )
    now = {"config": settings, "given": begun.given, "world_size": world_size, "sets": fresh.sets}
    return state.model_copy(update=now), newest


def check_fixed(trained: RunConfig, run: RunConfig, newest: Path | str) -> None:
    """Raises ConfigError, which names the very setting, when a resume asks for what it may not change."""
    changed = recorded.differences(trained, run)
    for field in FIXED:
        found = [item for item in changed if f"{item[0]}.".startswith(f"{field}.")]
        for key, before, now in found[:1]:
            others = ", ".join(f"{name} {recorded.shown(a)} -> {recorded.shown(b)}" for name, a, b in found[1:])
            back = f"{key}={recorded.shown(before)} goes on with it"
            back = "change it back" if others or field.startswith("optim") else back
            raise ConfigError(
                f"{key}: {newest} was trained with {before}, this run asks for {now}"
                f"{others and f' (also {others})'}; {back}, or take another run.name"
            )


def changes(begun: Begun, seq_len: int) -> list[str]:
    """Lines on what a resume does otherwise than its checkpoint; none at step 0."""
    if (state := begun.start.state) is None:
        return []
    trained = validate(state.config, f"{begun.start.newest}/state.json")
    return list(recorded.told(trained, begun.run, state.step, seq_len))


def check_place(run: RunConfig) -> None:
    """That checkpoints can be written where they are to lie, found now rather than at the first save. For one rank.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        Storage(run.checkpoints).probe()
    except OSError as error:
        field = "run.dir" if run.checkpoint.dir is None else "checkpoint.dir"
        raise ConfigError(
            f"{field}: nothing can be written to {run.checkpoints} ({error.strerror or error}); give another"
        ) from None


def difference(state: State, trained: DataConfig, data: DataConfig, sources: Sources, newest: Path | str) -> str:
    """What of a run's data is not as its checkpoint has it: names or weights, else a set's manifest."""
    before, now = weights_of(trained), weights_of(data)
    if before.keys() != now.keys() or not all(math.isclose(before[name], now[name], rel_tol=1e-6) for name in now):
        return f"data.mixture: {newest} was trained on {in_words(trained)}, this run asks for {in_words(data)}"
    found = manifests_of(sources)
    changed = [s for s in sources if state.sets.get(s.name, found[s.name]) != found[s.name]] or sources
    return " or ".join(
        f"{source.field}: the manifest of {source.folder} is not the one that {newest} was trained on"
        for source in changed
    )


def in_words(data: DataConfig) -> str:
    weights = weights_of(data)
    return ", ".join(f"{name} {weights[name]:.6g}" for name in sorted(weights)) or "data.path, one set"


def check_sets(sources: Sources, state: State) -> None:
    """For every rank: that the sets it sees are those that rank 0 decided on, wherever they lie.

    Raises:
        ConfigError: another manifest than on rank 0.
    """
    for source, found in zip(sources, manifests_of(sources).values(), strict=True):
        if found != (wanted := state.sets.get(source.name, found)):
            raise ConfigError(
                f"{source.field}: {source.folder} has another manifest here (sha256 {found[:12]}) than on rank 0 "
                f"(sha256 {wanted[:12]}); copy the set to every node again"
            )


def earlier_run_id(run: RunConfig) -> str | None:
    """The id of this very run if it was stopped before its first checkpoint, so that MLflow goes on with it."""
    try:
        if (run.run.dir / "config.yaml").read_text() == to_yaml(run):
            return str(json.loads((run.run.dir / "logs" / "tracking.json").read_text())["key"]["run_id"])
    except (OSError, ValueError, KeyError):
        pass
    return None
