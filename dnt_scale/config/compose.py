"""The whole run, composed by Hydra from ``configs/`` and command-line overrides, as the models of
the other files.

``load(overrides)`` is the one way in. Every mistake raises ``ConfigError`` (a ValueError) that
names the field, what was found, what was expected, and for a misspelt key its nearest neighbour.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from dnt_scale.config import paths, quoting, tracking_uri, typed
from dnt_scale.config.base import ConfigError, nearest
from dnt_scale.config.run import RunConfig

# pydantic names the chosen member of a union in an error's place, after the union's field
UNIONS = ("engine",)
EXPERIMENT_CHARS = 256  # the databases that MLflow uses take no more
TAGS = ("ddp", "fsdp", "hsdp", "zero0", "zero1", "zero2", "zero3")

SWEEP = "several values are a sweep, `dnt sweep`; give one value"


def config_dir() -> Path:
    """The Hydra groups: packed into an installed package, beside it in a checkout."""
    packed = Path(__file__).parents[1] / "configs"
    return packed if packed.is_dir() else Path(__file__).parents[2] / "configs"


def load(overrides: list[str]) -> RunConfig:
    """Compose ``configs/train.yaml`` with Hydra overrides and validate it.

    Names and paths are the text that was typed (:mod:`dnt_scale.config.typed`); ``group=PATH``
    takes a YAML file.

    Raises:
        ConfigError: an unknown key or choice, a value of the wrong type, or fields that contradict.
    """
    hidden, files = typed.Hidden(), dict[str, Path]()
    try:
        lines = [_for_hydra(line, hidden, files) for line in overrides]
        lines += budget(typed_keys(overrides))
        with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
            _read_as_typed(files, hidden)
            tree = compose("train", overrides=lines)
        raw = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except ConfigError:
        raise
    except (
        HydraException,
        OmegaConfBaseException,
        ValueError,
        TypeError,
        RecursionError,
    ) as error:  # Hydra raises bare ones too
        raise ConfigError(hidden.show(_explain(error, overrides))) from None
    run = validate(hidden.show(raw))
    check_tracking(run)
    return run


def typed_keys(overrides: Iterable[str]) -> list[str]:
    """The keys and groups that overrides give a value, in their order."""
    return [typed.split(line)[1] for line in overrides]


def _for_hydra(line: str, hidden: typed.Hidden, files: dict[str, Path]) -> str:
    """An override as Hydra is to read it: text hidden, files by path among its choices, new keys
    permitted.

    Raises:
        ConfigError: it cannot be read.
    """
    prefix, key, value = typed.split(line)
    _check_key(line, key, value)
    if "~" in prefix or "@" in key:
        return line
    if value is None:
        raise ConfigError(refusal(line))
    if key in _groups():
        return _choice_for_hydra(line, files)
    return _value_for_hydra(line, key, value, hidden)


def _check_key(line: str, key: str, value: str | None) -> None:
    """Raise ConfigError for a key that no override may have."""
    if problem := paths.unreadable(line):
        raise ConfigError(
            f"{key.encode(errors='backslashreplace').decode()}: found {line!a}; {problem}"
        )
    if (not key or key.partition(".")[0].partition("/")[0] == "hydra") and (
        key or value is not None
    ):
        raise ConfigError(f"{line}: no such key; `dnt train --print-config` shows every key")
    if key.partition(".")[0] == "cluster":
        raise ConfigError(
            f"{line}: no such key; of a run that `dnt submit` queues, with a cluster=NAME"
        )


def _choice_for_hydra(line: str, files: dict[str, Path]) -> str:
    """``group=NAME`` or ``group=PATH``; a path goes into ``files``, under the name that stands
    for it.
    """
    prefix, key, value = typed.split(line)
    parsed = typed.parse(line)
    if parsed and parsed.is_sweep_override():
        raise ConfigError(f"{line}: {SWEEP}")
    assert value is not None
    if (path := _file_of(key, value)) is None:
        return line
    files[f"{key}/dnt_file_{len(files)}"] = path
    return f"{prefix}{key}=dnt_file_{len(files) - 1}"


def _value_for_hydra(line: str, key: str, value: str, hidden: typed.Hidden) -> str:
    """``key=value``, with text hidden and what is no number quoted."""
    found = typed.at(RunConfig, key)
    # "++" lets through any key; pydantic then names the unknown ones better than Hydra does
    start = f"++{typed.key_for_hydra(RunConfig, key, hidden)}="
    if typed.parse(f"{start}1") is None:
        raise ConfigError(refusal(line))
    try:
        read = typed.value_for_hydra(RunConfig, key, value, hidden)
    except typed.SeveralValuesError:
        raise ConfigError(f"{line}: {SWEEP}") from None
    if read is None:
        if typed.is_container(found) and found:
            raise ConfigError(refusal(line))
        read = typed.quoted(hidden.hide(value))  # what is no number is named as such
    return start + read


def refusal(line: str) -> str:
    """What is wrong with an override that Hydra's grammar has not, and how to write it."""
    prefix, key, value = typed.split(line)
    if value is None and key in _groups():
        return f"{line}: expected {key}=NAME. There are: {', '.join(_choices(key))}"
    if value is None:
        return f"{line or repr(line)}: expected key=value; `dnt train --help` shows examples"
    if typed.parse(f"{prefix}{typed.key_for_hydra(RunConfig, key, typed.Hidden())}=1") is None:
        return f"{line}: no such key{_nearest(key, _known_keys(RunConfig))}"
    if shown := quoting.advice(prefix + key, value, typed.at(RunConfig, key)):
        return (
            f"{line}: has to be quoted inside too, where there are other signs than letters, "
            f"digits and /-.+_: {shown}"
        )
    return f"{line}: expected a list [a, b] or a mapping {{key: value}}; check its brackets"


def _groups() -> set[str]:
    return {path.name for path in config_dir().iterdir() if path.is_dir()} & {
        *RunConfig.model_fields,
        "preset",
    }


def choice_file(group: str, value: str) -> Path:
    """Return the file that ``group=VALUE`` means: one of ours by its name, or any by its path."""
    return _file_of(group, value) or config_dir() / group / f"{value.removesuffix('.yaml')}.yaml"


def _file_of(group: str, value: str) -> Path | None:
    """The file that ``group=PATH`` means; None where it is the name of a choice.

    Raises:
        ConfigError: there is no such file.
    """
    path = Path(paths.expanded(typed.meant(value, place=True)))
    if value.removesuffix(".yaml") in _choices(group) or not (
        "/" in value or path.suffix in (".yaml", ".yml")
    ):
        return None
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise ConfigError(
            f"{group}={value}: {found}; expected a YAML file, or one of "
            f"{', '.join(_choices(group))}"
        )
    return path


def _read_as_typed(files: Mapping[str, Path], hidden: typed.Hidden) -> None:
    """Let Hydra's source of ``configs/`` read text as it is written, and ``files`` too, by their
    names in a group.
    """
    [ours] = [
        each
        for each in GlobalHydra.instance().config_loader().get_sources()
        if each.provider == "main"
    ]
    is_config = ours.is_config

    def load_config(config_path: str) -> ConfigResult:
        name = config_path.removesuffix(".yaml")
        path = files.get(name, config_dir() / f"{name}.yaml")
        text = _text_of(path)
        header = ConfigSource._get_header_dict(text)
        group = name.partition("/")[0] if "/" in name else ""
        whole = group in ("", "preset") or header["package"] == "_global_"
        header["package"] = header["package"] or ("_global_" if whole and group else None)
        try:
            raw = typed.read_yaml(text, (RunConfig,) if whole else typed.at(RunConfig, group)) or {}
            tree = OmegaConf.create(hidden.carry_all(raw, RunConfig))
        except ValueError as error:
            raise ConfigError(f"{path}: not readable as YAML ({error})") from None
        return ConfigResult(
            provider=ours.provider, path=ours.full_path(), config=tree, header=header
        )

    ours.load_config = load_config  # type: ignore[method-assign]
    ours.is_config = lambda config_path: config_path in files or is_config(config_path)  # type: ignore[method-assign]


def _text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not readable as YAML ({error})") from None


def check_tracking(run: RunConfig) -> None:
    """Raise ConfigError where a run's records would be sent to what can never take them."""
    tracking, known = run.tracking, _choices("tracking")
    if not tracking.enabled:
        return
    for name in tracking.backends:
        if name not in known:
            hint = _nearest(name, set(known)) or "."
            raise ConfigError(
                f"tracking.backends: no such backend as {name}{hint} There are: {', '.join(known)}"
            )
    if "mlflow" not in tracking.backends:
        return
    try:
        if tracking.uri:
            tracking_uri.check(tracking.uri)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not 0 < len(tracking.experiment.strip()) <= EXPERIMENT_CHARS:
        found = len(tracking.experiment)
        raise ConfigError(
            f"tracking.experiment: has {found} characters, expected a name of 1 to "
            f"{EXPERIMENT_CHARS}"
        )


def budget(given: Iterable[str]) -> list[str]:
    """The override that lets a given train.tokens take the place of a train.steps that nobody
    gave, and the reverse.
    """
    asked = {"train.steps", "train.tokens"} & {key.lstrip("+") for key in given}
    if len(asked) != 1:
        return []
    return ["train.steps=null" if "train.tokens" in asked else "train.tokens=null"]


def changed(run: RunConfig, overrides: list[str]) -> RunConfig:
    """``run`` with other values: KEY=VALUE, and engine=NAME of ``configs/engine``.

    Raises:
        ConfigError: an unknown key, a wrong value, or another name or folder, which would be
            another run.
    """
    hidden = typed.Hidden()
    tree = OmegaConf.create(hidden.hide_all(run.model_dump(mode="json")))
    try:
        for override in [*overrides, *budget(typed_keys(overrides))]:
            prefix, key, value = typed.split(override)
            file = config_dir() / "engine" / f"{value}.yaml"
            if key == "engine" and value in _choices("engine"):
                tree[key] = OmegaConf.load(file)
            elif key == "engine":
                raise ConfigError(
                    f"{override}: no such engine; there are {', '.join(_choices('engine'))}"
                )
            elif value is None or "." not in key or "~" in prefix or key in ("run.name", "run.dir"):
                raise ConfigError(
                    f"{override}: a run that goes on keeps its {key}; it takes engine=NAME and "
                    "KEY.KEY=VALUE"
                )
            else:
                parsed = typed.parse(_for_hydra(f"{key}={value}", hidden, {}))
                assert parsed
                OmegaConf.update(tree, parsed.key_or_group, parsed.value(), force_add=True)
        raw = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(hidden.show(_explain(error, overrides))) from None
    return validate(hidden.show(raw))


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
            if parts and item["type"] in ("model_type", "dict_type"):
                message = f"is a section, not a value; set its keys, as {'.'.join(parts)}.KEY=VALUE"
            found = "" if isinstance(item["input"], dict) else f" (found {item['input']!r:.300})"
            # what the whole run's validators say names its fields itself
            lines.append(f"{'.'.join(parts)}: {message}{found}" if parts else message)
        raise ConfigError(f"{origin}: " + "; ".join(lines)) from None


def from_yaml(path: Path) -> RunConfig:
    """Read a run folder's ``config.yaml``.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not describe a run.
    """
    try:
        raw = typed.read_yaml(path.read_text("utf-8"), (RunConfig,))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{path}: no such file; give the folder of a run that `dnt train` made"
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{path}: not readable as YAML ({error}); restore it from the MLflow run"
        ) from None
    return validate(raw, str(path))


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, in the order of the fields above."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=typed.Dumper, sort_keys=False)


def flat(config: BaseModel) -> dict[str, str | int | float | bool | None]:
    """Dotted names to scalar values, of a configuration or a section, as MLflow parameters want
    them.
    """

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            return {
                k: v
                for key, inner in value.items()
                for k, v in walk(f"{prefix}{key}.", inner).items()
            }
        return {prefix[:-1]: str(value) if isinstance(value, list) else value}

    return walk("", config.model_dump(mode="json"))


def _known_keys(
    model: type[BaseModel], prefix: str = "", above: tuple[object, ...] = ()
) -> set[str]:
    registry = getattr(model, "registry", None)
    if registry and registry in above:  # an optimizer of a group of an optimizer
        return {prefix + name for name in model.model_fields}
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        keys.add(prefix + name)
        nested = field.annotation
        inner_prefix = f"{prefix}{name}.*." if get_origin(nested) is dict else f"{prefix}{name}."
        kinds = typed.kinds(nested)
        inside = (inner for kind in kinds for inner in get_args(kind) or (kind,))
        for choice in (each for inner in inside for each in typed.kinds(inner)):
            if isinstance(choice, type) and issubclass(choice, BaseModel):
                # of those imported: what was typed has been looked for already
                several = vars(choice).get("registry")
                for section in [choice, *(several.loaded() if several else [])]:
                    keys |= _known_keys(section, inner_prefix, (*above, registry))
    return keys


def _nearest(key: str, known: set[str]) -> str:
    if key in known:
        return "; other choices of this group have it, this one does not"
    close = nearest(key, known, 0.5)
    return f"; did you mean {close}?" if close else ""


def _is_key(key: str, known: set[str]) -> bool:
    """Whether a key is one of the known or a section of one; their ``*`` is any name."""
    parts = key.split(".")
    return any(
        len(parts) <= len(other) and all(b in ("*", a) for a, b in zip(parts, other, strict=False))
        for other in (name.split(".") for name in known)
    )


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def _explain(error: Exception, overrides: list[str]) -> str:
    """One line out of Hydra's several: which override, and the choices there are."""
    text = str(error).strip() or str(error.__cause__ or type(error).__name__)
    if "Missing mandatory value" in text:
        known = _known_keys(RunConfig)
        for key in (override.partition("=")[0].lstrip("+~") for override in overrides):
            if not _is_key(key, known) and key not in _groups():
                return (
                    f"{key}: no such key{_nearest(key, known)} `dnt train --print-config` shows "
                    "every key"
                )
        missing = getattr(error, "full_key", "a mandatory key")
        if missing == "data.path" and any(
            override.lstrip("+").startswith("data.mixture") for override in overrides
        ):
            return (
                "data.path: is not set, and data.mixture is read instead of it with data=mixture "
                "only; add data=mixture"
            )
        return f"{missing}: is not set; add {missing}=VALUE (`dnt train --help` shows an example)"
    if text.startswith("Error merging override"):
        override = text.split()[-1].lstrip("+")
        key = override.partition("=")[0]
        return f"{override}: {key} is a section, not a list; set its keys, as {key}.KEY=VALUE"
    for override in overrides:
        key, _, value = override.partition("=")
        choices = _choices(key) if key in _groups() else []
        if choices and value.removesuffix(".yaml") not in choices:
            hint = _nearest(value, set(choices)) or "."
            return f"{override}: no such choice{hint} There are: {', '.join(choices)}"
    field = getattr(error, "full_key", None)  # where an interpolation failed
    return (f"{field}: " if field else "") + text.splitlines()[0]
