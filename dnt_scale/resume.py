"""Where a run starts: at step 0, or at its newest checkpoint once that is known to fit and to be whole."""

import json
import uuid
from pathlib import Path
from typing import Any

from dnt_scale import checkpoint
from dnt_scale.checkpoint import State
from dnt_scale.config import ConfigError, RunConfig, to_yaml, validate
from dnt_scale.sources import Sources, identity

# what a resumed run may not change: its weights, its order of data and its momentum depend on it
FIXED = ("model", "run.seed", "train.global_batch", "optim.algorithm", "data.document_mask")


def starting_state(run: RunConfig, sources: Sources, total_steps: int, world_size: int) -> tuple[State, Path | None]:
    """The newest checkpoint's state and path, checked against this run; or step 0 and None. For one rank to decide.

    Raises:
        ValueError: the checkpoint is damaged, or was made with another tokenizer, data or fixed field.
    """
    settings = run.model_dump(mode="json")
    newest = checkpoint.newest(run.run.dir / "checkpoints")
    fresh = State(
        step=0,
        consumed_rows=0,
        tokens=0,
        skipped=0,
        seed=run.run.seed,
        run_id=earlier_run_id(run) or uuid.uuid4().hex,
        manifest_sha256=identity(sources),
        tokenizer_sha256=sources[0].manifest.tokenizer.sha256,
        world_size=world_size,
        config=settings,
        files={},
    )
    if newest is None:
        return fresh, None
    state = checkpoint.read_state(newest)
    if state.tokenizer_sha256 != fresh.tokenizer_sha256:
        raise ConfigError(
            f"{sources[0].field}: {sources[0].folder} was made with another tokenizer (sha256 "
            f"{fresh.tokenizer_sha256[:12]}) than {newest} (sha256 {state.tokenizer_sha256[:12]}); "
            "prepare it with --tokenizer, or take another run.name"
        )
    if state.manifest_sha256 != fresh.manifest_sha256:
        if run.data.mixture:
            raise ConfigError(
                f"data.mixture: its names, weights or manifests are not those that {newest} was trained on, so the "
                "order of rows would change; give those sets and weights, or take another run.name"
            )
        raise ConfigError(
            f"data.path: the manifest of {run.data.path} is not the one that {newest} was trained on, so its order of "
            "rows would change; give that set, or take another run.name"
        )
    trained = validate(state.config, str(newest / "state.json")).model_dump(mode="json")  # fields newer than it too
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
    return state.model_copy(update={"config": settings, "world_size": world_size}), newest


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
