"""``configs/cluster/NAME.yaml``: where jobs run and how, as a pydantic model."""

import difflib
import sys
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from cluster.slurm import minutes_of
from dnt_scale.config import ConfigError, Strict, config_dir, paths, typed
from dnt_scale.config.base import Count, Place, Size, Text


def _minutes(time: object) -> object:
    return minutes_of(time) if isinstance(time, str) else time


def _program(path: object) -> object:
    return paths.expanded(path) if isinstance(path, str) else path


Minutes = Annotated[int, BeforeValidator(_minutes), Field(gt=0, le=100_000_000)]
Node = Annotated[str, Field(min_length=1)]


class ClusterConfig(Strict):
    """One site and one size of job. What is null is left to the site's defaults."""

    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    nodes: Size = 1
    gpus_per_node: int = Field(0, ge=0, le=4096, description="0: ranks run on CPUs")
    ranks_per_node: int | None = Field(None, gt=0, le=4096, description="null: one a GPU, or one where there is none")
    cpus_per_rank: int | None = Field(None, gt=0, le=65536)
    mem_gb: float | None = Field(None, ge=0, le=1e6, description="a node; 0: all of it")
    time: Minutes = Field(description="limit of one job, in minutes or SLURM's formats; the run goes on in the next")
    constraint: Text | None = None
    nodelist: Text | None = None
    exclude: list[Node] = Field([], description="nodes")
    setup: list[str] = Field([], description="shell lines before Python starts: modules, environment")
    shared: list[Place] = Field(
        [], description="folders that all nodes see, though their file system looks like a disk"
    )
    python: Annotated[Text, BeforeValidator(_program)] = Field(
        sys.executable, description="on the nodes, and inside the container where there is one"
    )
    container: list[str] = Field([], description="srun's options for it, such as --container-image=... (pyxis)")
    sbatch: dict[Text, str | int | bool] = Field(
        {}, description="more of sbatch's options by name; true: without a value"
    )
    srun: list[str] = Field([], description="more options of srun")

    signal: Literal["USR1", "USR2", "TERM"] = Field("USR1", description="what SLURM sends before the time limit")
    signal_s: int = Field(120, gt=0, le=65535, description="how many seconds before")
    requeue: bool = Field(True, description="false where jobs may not be requeued: a new job goes on with the run")
    max_crashes: Count = Field(3, gt=0, description="crashes in a row without a new checkpoint, that end the run")
    exclude_after: Count = Field(2, gt=0, description="faults of a node in a day, after which the run avoids it")
    preflight: bool = Field(True, description="check devices, arithmetic, network and disk before training")
    sweep_parallel: Count | None = Field(None, gt=0, description="runs of a sweep at a time; null: no limit")
    min_bandwidth_gb_s: float = Field(0.0, ge=0, description="preflight: of an all-reduce; slower is refused. 0: any")

    @model_validator(mode="after")
    def _ours(self) -> Self:
        ours = {
            "exclude",
            "signal",
            "requeue",
            "no-requeue",
            "job-name",
            "output",
            "error",
            "open-mode",
            "array",
            "time",
            "nodes",
        }
        if taken := sorted(ours & {name.replace("_", "-") for name in self.sbatch}):
            raise ValueError(f"sbatch holds {', '.join(taken)}, which dnt sets itself; leave it out")
        return self

    @property
    def tasks_per_node(self) -> int:
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node


def load(overrides: list[str]) -> tuple[ClusterConfig, list[str]]:
    """The cluster that ``cluster=NAME`` (or a path to a YAML file) and ``cluster.KEY=VALUE`` describe, and the rest
    of the overrides, which are the run's.

    Raises:
        ConfigError: no such cluster, an unknown key, a wrong value.
    """
    name, changes, rest = None, [], []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "cluster":
            name = value
        elif key.startswith("cluster."):
            changes.append(f"{key.removeprefix('cluster.')}={value}")
        else:
            rest.append(override)
    known = sorted(path.stem for path in (config_dir() / "cluster").glob("*.yaml"))
    if name is None:
        raise ConfigError(
            f"cluster: say which, cluster=NAME; found none of {', '.join(known)}, or a path to a YAML file"
        )
    given = Path(paths.expanded(typed.meant(name, place=True)))
    file = given if "/" in name or name.endswith((".yaml", ".yml")) else config_dir() / "cluster" / f"{name}.yaml"
    try:
        tree = typed.read_yaml(file.read_text("utf-8"), (ClusterConfig,))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) or "\0" in name:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"cluster: {str(file)!r} cannot be read ({why}); there are {', '.join(known)}, or give a path"
            ) from None
        raise ConfigError(f"cluster: {file}: not readable as YAML ({error})") from None
    if not isinstance(tree := {} if tree is None else tree, dict):
        raise ConfigError(f"cluster: {file}: found {tree!r:.60}, expected lines such as `partition: main`")
    return _merged(tree, changes, f"cluster={name}"), rest


def changed(cluster: ClusterConfig, overrides: list[str]) -> ClusterConfig:
    """``cluster`` with ``cluster.KEY=VALUE`` overrides. Raises ConfigError."""
    changes = [override.removeprefix("cluster.") for override in overrides]
    return _merged(cluster.model_dump(mode="json"), changes, "cluster", settled=True)


def _merged(tree: dict[str, Any], changes: list[str], origin: str, *, settled: bool = False) -> ClusterConfig:
    """A cluster and changes of it; a tree that is ``settled`` has no references to resolve. Raises ConfigError."""
    hidden = typed.Hidden()
    tree = hidden.hide_all(tree) if settled else hidden.carry_all(tree, ClusterConfig)
    for change in changes:
        key, _, value = change.partition("=")
        if problem := paths.unreadable(change):
            raise ConfigError(f"{f'cluster.{change}'!a}: {problem}")
        section = tree
        *sections, last = key.split(".")
        for name in sections:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[last] = hidden.carry_all(_value(key, value), ClusterConfig)
    try:
        raw = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigError(hidden.show(f"{origin}: {str(error).splitlines()[0]}")) from None
    return from_raw(hidden.show(raw), origin)


def _value(key: str, text: str) -> Any:
    """The value of an override: as it was typed where a text is expected, else as YAML has it. Raises ConfigError."""
    found = typed.at(ClusterConfig, key)
    if typed.is_text(found):
        if text == "null" and NoneType in found:
            return None
        if bool in found and text in ("true", "false"):
            return text == "true"
        return typed.meant(text, place=typed.is_place(found, key))
    try:
        return typed.read_yaml(text, found)
    except ValueError:
        raise ConfigError(
            f"cluster.{key}: {text} cannot be read; write a list as [a,b], and quote what holds a quote"
        ) from None


def from_raw(raw: Any, origin: str) -> ClusterConfig:
    """Raises ConfigError, which names every wrong field."""
    try:
        return ClusterConfig.model_validate(raw)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            field = ".".join(["cluster", *(str(part) for part in item["loc"])])
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                near = difflib.get_close_matches(str(item["loc"][0]), ClusterConfig.model_fields, n=1)
                message = "no such field; " + (
                    f"did you mean cluster.{near[0]}?" if near else f"there are {', '.join(ClusterConfig.model_fields)}"
                )
            found = "" if isinstance(item["input"], dict) else f" (found {item['input']!r:.300})"
            lines.append(f"{field}: {message}{found}")
        raise ConfigError(f"{origin}: " + "; ".join(lines)) from None
