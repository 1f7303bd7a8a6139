"""The whole run, composed by Hydra from ``configs/`` and command-line overrides, as the models of ``sections.py``.

``load(overrides)`` is the one way in. Every mistake raises ``ConfigError`` (a ValueError) that names
the field, what was found, what was expected, and for a misspelt key its nearest neighbour.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from dnt_scale import tracking_uri
from dnt_scale.sections import (
    AdamWConfig,
    ConfigError,
    DataConfig,
    DeepSpeedEngineConfig,
    GroupConfig,
    HealthSection,
    ModelConfig,
    MSGDWConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    Setting,
    Strict,
    TorchEngineConfig,
)

__all__ = [
    "AdamWConfig",
    "ConfigError",
    "DataConfig",
    "DeepSpeedEngineConfig",
    "GroupConfig",
    "HealthSection",
    "MSGDWConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "ScheduleConfig",
    "Setting",
    "Strict",
    "TorchEngineConfig",
    "changed",
    "config_dir",
    "flat",
    "from_yaml",
    "load",
    "to_yaml",
    "validate",
]

# pydantic names the chosen member of a union in an error's place, after the union's field
UNIONS = ("optim", "engine")
EXPERIMENT_CHARS = 256  # the databases that MLflow uses take no more
TAGS = ("msgdw", "adamw", "ddp", "fsdp", "hsdp", "zero0", "zero1", "zero2", "zero3")


def config_dir() -> Path:
    """The Hydra groups: packed into an installed package, beside it in a checkout."""
    packed = Path(__file__).parent / "configs"
    return packed if packed.is_dir() else Path(__file__).parent.parent / "configs"


def load(overrides: list[str]) -> RunConfig:
    """Compose ``configs/train.yaml`` with Hydra overrides and validate it.

    Raises:
        ConfigError: an unknown key or choice, a value of the wrong type, or fields that contradict.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        for override in parsed:
            if override.key_or_group.partition(".")[0].partition("/")[0] in ("", "hydra"):
                raise ConfigError(f"{override.input_line}: no such key; `dnt train --print-config` shows every key")
            if override.is_sweep_override():
                raise ConfigError(
                    f"{override.input_line}: several values are a sweep, `dnt submit --multirun`; give one value"
                )
        # "++" lets through any key; pydantic then names the unknown ones better than Hydra does
        forced = [
            line if override.type is not OverrideType.CHANGE or _is_group(override.key_or_group) else f"++{line}"
            for line, override in zip(overrides, parsed, strict=True)
        ]
        forced += budget(override.key_or_group for override in parsed)
        with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
            tree = compose("train", overrides=forced)
        raw = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra raises bare ValueErrors too
        raise ConfigError(_explain(error, overrides)) from None
    run = validate(raw)
    check_tracking(run)
    return run


def check_tracking(run: RunConfig) -> None:
    """Raise ConfigError where a run's records would be sent to what can never take them."""
    try:
        if run.tracking.enabled and run.tracking.uri:
            tracking_uri.check(run.tracking.uri)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if run.tracking.enabled and not 0 < len(run.tracking.experiment.strip()) <= EXPERIMENT_CHARS:
        found = len(run.tracking.experiment)
        raise ConfigError(f"tracking.experiment: has {found} characters, expected a name of 1 to {EXPERIMENT_CHARS}")


def budget(given: Iterable[str]) -> list[str]:
    """The override that lets a given train.tokens take the place of a train.steps that nobody gave, and the reverse."""
    asked = {"train.steps", "train.tokens"} & {key.lstrip("+") for key in given}
    if len(asked) != 1:
        return []
    return ["train.steps=null" if "train.tokens" in asked else "train.tokens=null"]


def changed(run: RunConfig, overrides: list[str]) -> RunConfig:
    """``run`` with other values: KEY=VALUE, and engine=NAME of ``configs/engine``.

    Raises:
        ConfigError: an unknown key, a wrong value, or another name or folder, which would be another run.
    """
    tree = OmegaConf.create(run.model_dump(mode="json"))
    for override in [*overrides, *budget(override.partition("=")[0] for override in overrides)]:
        key, _, value = override.partition("=")
        file = config_dir() / key / f"{value}.yaml"
        if key == "engine" and file.exists():
            tree[key] = OmegaConf.load(file)
        elif key == "engine":
            known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
            raise ConfigError(f"{override}: no such engine; there are {known}")
        elif "." in key and key not in ("run.name", "run.dir"):
            tree.merge_with_dotlist([override])
        else:
            raise ConfigError(f"{override}: a run that goes on keeps its {key}; it takes engine=NAME and KEY.KEY=VALUE")
    return validate(OmegaConf.to_container(tree, resolve=True))


def validate(raw: Any, origin: str = "configuration") -> RunConfig:
    """A RunConfig from plain dicts, for example a run folder's ``config.yaml``.

    Raises:
        ConfigError: naming ``origin`` and every wrong field.
    """
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            parts = [str(part) for part in item["loc"]]
            if len(parts) > 1 and parts[0] in UNIONS and parts[1] in TAGS:
                del parts[1]
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                message = "no such field" + _nearest(".".join(parts), _known_keys(RunConfig))
            found = "" if isinstance(item["input"], dict) else f" (found {item['input']!r})"
            # what the whole run's validators say names its fields itself
            lines.append(f"{'.'.join(parts)}: {message}{found}" if parts else message)
        raise ConfigError(f"{origin}: " + "; ".join(lines)) from None


def from_yaml(path: Path) -> RunConfig:
    """Read a run folder's ``config.yaml``.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not describe a run.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the folder of a run that `dnt train` made") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML ({error}); restore it from the MLflow run") from None
    return validate(raw, str(path))


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, in the order of the fields above."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flat(config: RunConfig) -> dict[str, str | int | float | bool | None]:
    """Dotted names to scalar values, as MLflow parameters want them."""

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for key, inner in value.items() for k, v in walk(f"{prefix}{key}.", inner).items()}
        return {prefix[:-1]: str(value) if isinstance(value, list) else value}

    return walk("", config.model_dump(mode="json"))


def _known_keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        keys.add(prefix + name)
        nested = field.annotation
        inner_prefix = f"{prefix}{name}.*." if get_origin(nested) is dict else f"{prefix}{name}."
        for choice in get_args(nested) or (nested,):
            if isinstance(choice, type) and issubclass(choice, BaseModel):
                keys |= _known_keys(choice, inner_prefix)
    return keys


def _nearest(key: str, known: set[str]) -> str:
    if key in known:
        return "; other choices of this group have it, this one does not"
    close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _is_key(key: str, known: set[str]) -> bool:
    """Whether a key is one of the known or a section of one; their ``*`` is any name."""
    parts = key.split(".")
    return any(
        len(parts) <= len(other) and all(b in ("*", a) for a, b in zip(parts, other, strict=False))
        for other in (name.split(".") for name in known)
    )


def _is_group(key: str) -> bool:
    return bool(key) and (config_dir() / key).is_dir()


def _explain(error: Exception, overrides: list[str]) -> str:
    """One line out of Hydra's several: which override, and the choices there are."""
    text = str(error).strip()
    if "Missing mandatory value" in text:
        known = _known_keys(RunConfig)
        for key in (override.partition("=")[0].lstrip("+~") for override in overrides):
            if not _is_key(key, known) and not _is_group(key):
                return f"{key}: no such key{_nearest(key, known)} `dnt train --print-config` shows every key"
        missing = getattr(error, "full_key", "a mandatory key")
        if missing == "data.path" and any(override.lstrip("+").startswith("data.mixture") for override in overrides):
            return (
                "data.path: is not set, and data.mixture is read instead of it with data=mixture only; add data=mixture"
            )
        return f"{missing}: is not set; add {missing}=VALUE (`dnt train --help` shows an example)"
    for override in overrides:
        key, _, value = override.partition("=")
        choices = sorted(path.stem for path in (config_dir() / key).glob("*.yaml")) if _is_group(key) else []
        if choices and value.removesuffix(".yaml") not in choices:
            nearest = _nearest(value, set(choices)) or "."
            return f"{override}: no such choice{nearest} There are: {', '.join(choices)}"
    field = getattr(error, "full_key", None)  # where an interpolation failed
    return (
        (f"{field}: " if field else "")
        + text.splitlines()[0]
        + " (write overrides as key=value; `dnt train --help` shows examples)"
    )
