"""Where a run starts: at step 0, or at its newest checkpoint once that is known to fit and to be whole."""

import json
import math
import uuid
from pathlib import Path
from typing import Any

from dnt_scale import checkpoint
from dnt_scale.checkpoint import State
from dnt_scale.checkpoint.storage import Storage
from dnt_scale.config import ConfigError, DataConfig, RunConfig, to_yaml, validate
from dnt_scale.optim import Schedule
from dnt_scale.sources import Sources, identity, manifests_of, weights_of

# what a resumed run may not change: its weights, its order of data and its momentum depend on it
FIXED = ("model", "run.seed", "train.global_batch", "optim.algorithm", "data.document_mask")


def starting_state(
    run: RunConfig, sources: Sources, total_steps: int, world_size: int
) -> tuple[State, Path | str | None]:
    """The newest checkpoint's state and path, checked against this run; or step 0 and None. For one rank to decide.

    Raises:
        ValueError: the checkpoint is damaged, of another run, or made with another tokenizer, data or fixed field; or
            the run is no longer than its warmup.
    """
    Schedule(run.optim.schedule, total_steps)
    settings = run.model_dump(mode="json")
    newest = checkpoint.newest(run.checkpoints)
    fresh = State(
        step=0,
        consumed_rows=0,
        tokens=0,
        skipped=0,
        seed=run.run.seed,
        run_id=earlier_run_id(run) or uuid.uuid4().hex,
        manifest_sha256=identity(sources),
        sets=manifests_of(sources),
        tokenizer_sha256=sources[0].manifest.tokenizer.sha256,
        world_size=world_size,
        config=settings,
        files={},
    )
    if newest is None:
        return fresh, None
    state = checkpoint.read_state(newest)
    if run.checkpoint.dir is not None and (owner := pick(state.config, "run.name")) != run.run.name:
        raise ConfigError(
            f"checkpoint.dir: {newest} is of the run {owner}, this one is {run.run.name}; give each run a place of its "
            f"own, such as checkpoint.dir='{run.checkpoint.dir.rstrip('/')}/${{run.name}}'"
        )
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
    trained = trained_run.model_dump(mode="json")  # fields newer than it too
    for field in FIXED:
        before, now = pick(trained, field), pick(settings, field)
        if before != now:
            raise ConfigError(
                f"{field}: {newest} was trained with {before}, this run asks for {now}; "
                "change it back, or take another run.name"
            )
    if state.step > total_steps:
        raise ConfigError(
            f"train.steps: this run asks for {total_steps} steps, but {newest} already has {state.step}; "
            "ask for more, or take another run.name"
        )
    return state.model_copy(update={"config": settings, "world_size": world_size, "sets": fresh.sets}), newest


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


def is_set_path(key: str) -> bool:
    """Whether a flattened configuration's key is the place of a set."""
    return key == "data.path" or (key.startswith("data.mixture.") and key.endswith(".path"))


def pick(settings: dict[str, Any], dotted: str) -> Any:
    """The value at a dotted name, None where there is none."""
    value: Any = settings
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def earlier_run_id(run: RunConfig) -> str | None:
    """The id of this very run if it was stopped before its first checkpoint, so that MLflow goes on with it."""
    try:
        if (run.run.dir / "config.yaml").read_text() == to_yaml(run):
            return str(json.loads((run.run.dir / "logs" / "tracking.json").read_text())["key"]["run_id"])
    except (OSError, ValueError, KeyError):
        pass
    return None
