"""``configs/cluster/NAME.yaml``: where jobs run and how, as a pydantic model."""

import difflib
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from cluster.slurm import minutes_of
from dnt_scale.config import ConfigError, Strict, config_dir


def _minutes(time: object) -> object:
    return minutes_of(time) if isinstance(time, str) else time


class ClusterConfig(Strict):
    """One site and one size of job. What is null is left to the site's defaults."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: int = Field(1, gt=0)
    gpus_per_node: int = Field(0, ge=0, description="0: ranks run on CPUs")
    ranks_per_node: int | None = Field(None, gt=0, description="null: one a GPU, or one where there is none")
    cpus_per_rank: int | None = Field(None, gt=0)
    mem_gb: float | None = Field(None, ge=0, description="a node; 0: all of it")
    time: Annotated[int, BeforeValidator(_minutes)] = Field(
        gt=0, description="limit of one job, in minutes or SLURM's formats; the run goes on in the next"
    )
    constraint: str | None = None
    nodelist: str | None = None
    exclude: list[str] = Field([], description="nodes")
    setup: list[str] = Field([], description="shell lines before Python starts: modules, environment")
    shared: list[Path] = Field([], description="folders that all nodes see, though their file system looks like a disk")
    python: str = Field(sys.executable, description="on the nodes, and inside the container where there is one")
    container: list[str] = Field([], description="srun's options for it, such as --container-image=... (pyxis)")
    sbatch: dict[str, str | int | bool] = Field({}, description="more options of sbatch, without their dashes")
    srun: list[str] = Field([], description="more options of srun")

    signal: Literal["USR1", "USR2", "TERM"] = Field("USR1", description="what SLURM sends before the time limit")
    signal_s: int = Field(120, gt=0, description="how many seconds before")
    requeue: bool = Field(True, description="false where jobs may not be requeued: a new job goes on with the run")
    max_crashes: int = Field(3, gt=0, description="crashes in a row without a new checkpoint, that end the run")
    exclude_after: int = Field(2, gt=0, description="faults of a node in a day, after which the run avoids it")
    preflight: bool = Field(True, description="check devices, arithmetic, network and disk before training")
    sweep_parallel: int | None = Field(None, gt=0, description="runs of a sweep at a time; null: no limit")
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
    file = Path(name) if "/" in name or name.endswith(".yaml") else config_dir() / "cluster" / f"{name}.yaml"
    try:
        text = file.read_text()
    except OSError as error:
        raise ConfigError(
            f"cluster: {file} cannot be read ({error.strerror}); there are {', '.join(known)}, or give a path"
        ) from None
    return from_raw(_merged(file, text, changes), f"cluster={name}"), rest


def changed(cluster: ClusterConfig, overrides: list[str]) -> ClusterConfig:
    """``cluster`` with ``cluster.KEY=VALUE`` overrides. Raises ConfigError."""
    changes = [override.removeprefix("cluster.") for override in overrides]
    return from_raw(_merged(Path("overrides"), yaml.safe_dump(cluster.model_dump(mode="json")), changes), "cluster")


def _merged(file: Path, text: str, changes: list[str]) -> Any:
    try:
        tree = OmegaConf.create(yaml.load(text, _Yaml) or {})
        for change in changes:
            key, _, value = change.partition("=")
            OmegaConf.update(tree, key, _value(f"cluster.{key}", value), force_add=True)
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except ConfigError:
        raise
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"cluster: {file}: {str(error).splitlines()[0]}") from None


def _value(field: str, text: str) -> Any:
    try:
        return yaml.load(text, _Yaml)
    except yaml.YAMLError:
        raise ConfigError(
            f"{field}: {text} cannot be read; write a list as [a,b], and quote what holds a quote"
        ) from None


class _Yaml(yaml.SafeLoader):
    """YAML in which 1:00:00 is a time, not the number 3600."""

    def number(self, node: yaml.ScalarNode) -> object:
        return node.value if ":" in node.value else self.construct_yaml_int(node)


_Yaml.add_constructor("tag:yaml.org,2002:int", _Yaml.number)


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
            found = "" if isinstance(item["input"], dict) else f" (found {item['input']!r})"
            lines.append(f"{field}: {message}{found}")
        raise ConfigError(f"{origin}: " + "; ".join(lines)) from None
