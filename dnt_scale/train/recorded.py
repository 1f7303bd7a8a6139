"""A resume is the run that it was: settings that were not typed now keep the value recorded with
the checkpoint.

That holds for ``model``, ``optim`` and ``train``; the other sections follow the command. Typed is a
key=value override of a key, or a group choice (optim=, model=, preset=) other than the one
recorded: the same choice again resets nothing.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from dnt_scale import config
from dnt_scale.config import RunConfig, typed
from dnt_scale.config.stages import BEGINNINGS
from dnt_scale.optim.schedule import Schedule
from dnt_scale.optim.transfer import ratios, scaled
from dnt_scale.optim.updates.plain import Plain

KEPT = ("model", "optim", "train")
GROUPS = ("model", "optim")
# Of each, one has the other's place.
PAIRS = (
    BUDGET := {"train.steps", "train.tokens"},
    {"optim.schedule.warmup", "optim.schedule.warmup_steps"},
)
# What auto chooses at a first start and a resume keeps.
CHOSEN = ("train.dtype", "train.micro_batch")
MISSING = object()
MOST_TOLD = 6  # settings that the line on what is kept names


@dataclass(frozen=True)
class Typed:
    """What a person typed to get a configuration."""

    overrides: Sequence[str] = ()
    whole: bool = False  # or rather, all of it was given: a job's config.yaml leaves nothing out


def kept(
    run: RunConfig,
    command: Typed,
    recorded: Mapping[str, object],
    given: Sequence[str],
    newest: object,
) -> tuple[RunConfig, tuple[str, ...]]:
    """``run`` with what its checkpoint records in the place of what was not typed, and a line that
    says so, if any.

    Args:
        recorded: the checkpoint's configuration.
        given: what had been typed for it; empty where that is not known.
        newest: the checkpoint, for messages.

    Raises:
        ConfigError: what was typed does not go with what is kept.
    """
    if command.whole:
        return run, ()
    before = config.validate(dict(recorded), f"{newest}/state.json").model_dump(mode="json")
    now = run.model_dump(mode="json")
    for key in (name.removeprefix("train.") for name in CHOSEN):
        if before["train"][key] == "auto":  # not chosen yet
            before["train"][key] = now["train"][key]
    keys = typed_keys(command.overrides, given)
    if not given:  # a checkpoint of old: what was chosen for it is known by name only
        same = {"model": "name", "optim": "algorithm"}
        keys -= {group for group, name in same.items() if before[group][name] == now[group][name]}
    settings = {**now, **{name: _merged(name, before[name], now[name], keys) for name in KEPT}}
    stages = settings["train"]["stages"]  # one that was typed now may begin before those of old
    settings["train"]["stages"] = dict(sorted(stages.items(), key=lambda item: _begins(item[1])))
    made = config.validate(settings, f"what was typed, with what {newest} records for the rest")
    lines = [
        f"{key} {shown(value)} (the command alone says {shown(alone)})"
        for key, alone, value in differences(run, made)
        if not _is_auto(key, alone)  # which means: as before
    ]
    if len(lines) > MOST_TOLD:
        more = len(lines) - MOST_TOLD
        lines[MOST_TOLD:] = [f"and {more} more, which --print-config shows"]
    return made, (f"kept from the checkpoint: {', '.join(lines)}",) if lines else ()


def _begins(stage: Any) -> int:
    """After how many steps or units a stage begins, of its settings as they were typed."""
    found = [stage.get(key) for key in BEGINNINGS] if isinstance(stage, dict) else []
    return next((value for value in found if isinstance(value, int)), 0)


def _merged(prefix: str, before: Any, now: Any, keys: set[str]) -> Any:
    if any(prefix == key or prefix.startswith(f"{key}.") for key in keys):
        return now
    if not any(key.startswith(f"{prefix}.") for key in keys):
        return before
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return now
    found = {
        key: _merged(f"{prefix}.{key}", before.get(key, MISSING), now.get(key, MISSING), keys)
        for key in {**before, **now}
    }
    return {key: value for key, value in found.items() if value is not MISSING}


# --- what was typed -------------------------------------------------------------------------------


def typed_keys(overrides: Sequence[str], given: Sequence[str]) -> set[str]:
    """The dotted names that ``overrides`` give values to, or everything below them."""
    keys: set[str] = set()
    now, before = choices(overrides), choices(given) if given else {}
    if given and (preset := now.get("preset")) and preset != before.get("preset"):
        keys |= set(_leaves("", _preset(preset)[1]))
    if given:
        before = {**_default_choices(), **before}
    keys |= {group for group in GROUPS if group in now and now[group] != before.get(group)}
    for override in overrides:
        key, value = _parts(override)
        if key.partition(".")[0] in KEPT and key not in GROUPS:
            keys |= set(
                _leaves(key, _as_dict(override) if value.lstrip().startswith("{") else value)
            )
    for pair in PAIRS:
        if keys & pair:
            keys |= pair
    return keys | {whole for key in keys for whole in _with_its_stage(key)}


def _with_its_stage(key: str) -> list[str]:
    """What else is typed with a key of a stage: both beginnings, all of its data."""
    head, _, last = key.rpartition(".")
    if not key.startswith("train.stages."):
        return []
    if last in BEGINNINGS:
        return [f"{head}.{name}" for name in BEGINNINGS]
    stage = ".".join(key.split(".")[:3])
    return [f"{stage}.data"] if key.startswith(f"{stage}.data.") else []


def choices(overrides: Sequence[str]) -> dict[str, str]:
    """The file that was chosen of each group; of ``preset`` too."""
    found: dict[str, str] = {}
    parts = [_parts(override) for override in overrides]
    for key, value in parts:
        if key == "preset":
            found = {**found, **_preset(_name(value))[0], key: _name(value)}
    return {**found, **{key: _name(value) for key, value in parts if key in GROUPS}}


def together(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """All that was typed for a run, at its start and since; of one key the last word."""
    last = {_parts(override)[0]: override for override in [*before, *now]}
    return list(last.values())


def _parts(override: str) -> tuple[str, str]:
    _, key, value = typed.split(override)
    return key.partition("@")[0], (value or "").strip()


def _name(value: str) -> str:
    return value.strip("'\"").removesuffix(".yaml")


def _preset(name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The choices and the values that a file of configs/preset, or one by its path, makes."""
    try:
        file = config.choice_file("preset", name if name.endswith(".yml") else f"{name}.yaml")
        found = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):  # it was there once, and good
        return {}, {}
    if not isinstance(found, dict):
        return {}, {}
    lines = [line for line in found.pop("defaults", []) if isinstance(line, dict)]
    chosen = {str(key).split("/")[-1]: str(value) for line in lines for key, value in line.items()}
    return {key: value for key, value in chosen.items() if key in GROUPS}, found


def _default_choices() -> dict[str, str]:
    found = yaml.safe_load((config.config_dir() / "train.yaml").read_text())["defaults"]
    return {
        key: value
        for line in found
        if isinstance(line, dict)
        for key, value in line.items()
        if key in GROUPS
    }


def _as_dict(override: str) -> Any:
    parsed = typed.parse(override)
    return parsed.value() if parsed else None


def _leaves(prefix: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix


# --- what differs ---------------------------------------------------------------------------------


def differences(before: RunConfig, now: RunConfig) -> list[tuple[str, Any, Any]]:
    """Each dotted name whose value differs, with both; MISSING where one has no such key. Of a
    group or a stage that one has and one has not, those are told that it gives.
    """
    old, new = config.flat(before), config.flat(now)
    every = {**old, **new}
    pairs = ((key, old.get(key, MISSING), new.get(key, MISSING)) for key in every)
    return [
        (key, a, b)
        for key, a, b in pairs
        if a is not b and a != b and not {a, b} <= {None, MISSING}
    ]


def _is_auto(key: str, value: Any) -> bool:
    return key in CHOSEN and value == "auto"


def shown(value: Any) -> str:
    """A value as a line tells it."""
    if value is MISSING:
        return "not there"
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def told(
    before: RunConfig,
    now: RunConfig,
    step: int,
    units_a_row: int,
    of_stages: Mapping[str, int] = {},
) -> Iterator[str]:
    """Lines on what a resume at ``step`` does otherwise than its checkpoint, ``before``:
    settings, learning rate. Units a row as ``RunConfig.spans`` has them.
    """
    changed = [
        item
        for item in differences(before, now)
        if not _same_place(*item) and not _is_auto(item[0], item[2])  # which keeps what is recorded
    ]
    if changed:
        yield "other than in the checkpoint: " + ", ".join(
            f"{key} {shown(a)} -> {shown(b)}" for key, a, b in changed
        )
    if step >= now.total_steps(units_a_row, of_stages):
        return
    total = before.total_steps(units_a_row, of_stages)
    decay = before.optim.schedule.steps_before_decay(total)
    if decay is not None and decay < step and total < now.total_steps(units_a_row, of_stages):
        yield (
            f"the learning rate has decayed since step {decay}; --from-step {decay} goes on from "
            "before that"
        )
    old, new = (rates(run, step, units_a_row, of_stages) for run in (before, now))
    jumps = [
        f"{f'of {name} ' if name else ''}{old[name]:.4g} -> {rate:.4g}"
        for name, rate in new.items()
        if name in old and f"{old[name]:.4g}" != f"{rate:.4g}"
    ]
    if jumps:
        why = [
            key
            for key, *_ in changed
            if key in BUDGET
            or key.endswith((".lr", ".lr_factor", ".decay_to", ".after_step", ".after_tokens"))
            or re.search(r"\.(schedule|scale)\b", key)
        ]
        yield f"learning rate of the next step: {', '.join(jumps)}" + (
            f" (by {', '.join(why)})" if why else ""
        )


def _same_place(key: str, before: Any, now: Any) -> bool:
    """Whether it is a folder that is only written in another way."""
    return key in ("run.dir", "checkpoint.dir") and os.path.realpath(
        str(before)
    ) == os.path.realpath(str(now))


def rates(
    run: RunConfig, step: int, units_a_row: int, of_stages: Mapping[str, int] = {}
) -> dict[str, float]:
    """The learning rate of the step after ``step``, and those of groups that have their own."""
    spans = run.spans(units_a_row, of_stages)
    factor = Schedule(run.optim.schedule, spans[-1].end, spans).factor(step)
    scale = ratios(run, units_a_row, of_stages)
    own = {
        name: scaled(group.lr, group, group.optimizer or run.optim, scale)
        for name, group in run.optim.groups.items()
        if group.lr is not None
    }
    default = scaled(run.optim.lr, Plain(pattern=None), run.optim, scale)
    return {name: rate * factor for name, rate in {"": default, **own}.items()}


def pick(settings: Any, dotted: str) -> Any:
    """The value at a dotted name, None where there is none."""
    value: Any = settings
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
