"""``configs/cluster/NAME.yaml``: where jobs run and how, as a pydantic model."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from cluster.slurm import minutes_of
from data_prep.words import Problem, closest, problems_of
from dnt_scale.config import ConfigError, Strict, config_dir, paths, typed
from dnt_scale.config.base import Count, Place, Size, Text


def _minutes(time: object) -> object:
    return minutes_of(time) if isinstance(time, str) else time


def _program(path: object) -> object:
    return paths.expanded(path) if isinstance(path, str) else path


Minutes = Annotated[int, BeforeValidator(_minutes), Field(gt=0, le=100_000_000)]
NodeName = Annotated[str, Field(min_length=1)]


class ClusterConfig(Strict):
    """One site and one size of job. What is null is left to the site's defaults."""

    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    nodes: Size = 1
    gpus_per_node: int = Field(0, ge=0, le=4096, description="0: ranks run on CPUs")
    ranks_per_node: int | None = Field(
        None, gt=0, le=4096, description="null: one a GPU, or one where there is none"
    )
    cpus_per_rank: int | None = Field(None, gt=0, le=65536)
    mem_gb: float | None = Field(None, ge=0, le=1e6, description="a node; 0: all of it")
    time: Minutes = Field(
        description="limit of one job, in minutes or SLURM's formats; the run goes on in the next"
    )
    constraint: Text | None = None
    nodelist: Text | None = None
    exclude: list[NodeName] = Field([], description="nodes")
    setup: list[str] = Field(
        [], description="shell lines before Python starts: modules, environment"
    )
    shared: list[Place] = Field(
        [], description="folders that all nodes see, though their file system looks like a disk"
    )
    python: Annotated[Text, BeforeValidator(_program)] = Field(
        sys.executable, description="on the nodes, and inside the container where there is one"
    )
    container: list[str] = Field(
        [], description="srun's options for it, such as --container-image=... (pyxis)"
    )
    sbatch: dict[Text, str | int | bool] = Field(
        {}, description="more of sbatch's options by name; true: without a value"
    )
    srun: list[str] = Field([], description="more options of srun")

    signal: Literal["USR1", "USR2", "TERM"] = Field(
        "USR1", description="what SLURM sends before the time limit"
    )
    signal_s: int = Field(120, gt=0, le=65535, description="how many seconds before")
    requeue: bool = Field(
        True, description="false where jobs may not be requeued: a new job goes on with the run"
    )
    max_crashes: Count = Field(
        3, gt=0, description="crashes in a row without a new checkpoint, that end the run"
    )
    exclude_after: Count = Field(
        2, gt=0, description="faults of a node in a day, after which the run avoids it"
    )
    preflight: bool = Field(
        True, description="check devices, arithmetic, network and disk before training"
    )
    sweep_parallel: Count | None = Field(
        None, gt=0, description="runs of a sweep at a time; null: no limit"
    )
    min_bandwidth_gb_s: float = Field(
        0.0, ge=0, description="preflight: of an all-reduce; slower is refused. 0: any"
    )

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
            raise ValueError(
                f"sbatch holds {', '.join(taken)}, which dnt sets itself; leave it out"
            )
        return self

    @property
    def tasks_per_node(self) -> int:
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node


def read_cluster(overrides: list[str]) -> tuple[ClusterConfig, list[str]]:
    """Read the cluster that ``cluster=NAME`` (or a path to a YAML file) and ``cluster.KEY=VALUE``
    describe.

    Returns:
        The cluster, and the rest of the overrides, which are the run's.

    Raises:
        ConfigError: no such cluster, an unknown key, a wrong value.
    """
    ours, rest = split_overrides(overrides)
    names = [value for _, key, value in map(typed.split, ours) if key == "cluster" and value]
    changes = [override for override in ours if "." in typed.split(override)[1]]
    known = sorted(path.stem for path in (config_dir() / "cluster").glob("*.yaml"))
    if not names:
        raise ConfigError(
            f"cluster: say which, cluster=NAME; found none of {', '.join(known)}, or a path to a "
            "YAML file"
        )
    name = names[-1]
    given = Path(paths.expanded(typed.meant(name, place=True)))
    is_path = "/" in name or given.suffix in (".yaml", ".yml")
    file = given if is_path else config_dir() / "cluster" / f"{name}.yaml"
    try:
        tree = typed.read_yaml(file.read_text("utf-8"), (ClusterConfig,))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) or "\0" in name:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"cluster: {str(file)!r} cannot be read ({why}); there are {', '.join(known)}, or "
                "give a path"
            ) from None
        raise ConfigError(f"cluster: {file}: not readable as YAML ({error})") from None
    if not isinstance(tree := {} if tree is None else tree, dict):
        raise ConfigError(
            f"cluster: {file}: found {tree!r:.60}, expected lines such as `partition: main`"
        )
    hidden = typed.Hidden()
    return _merged(hidden.carry_all(tree, ClusterConfig), changes, hidden, f"cluster={name}"), rest


def split_overrides(overrides: list[str]) -> tuple[list[str], list[str]]:
    """Return the overrides that are the cluster's, then those that are the run's."""
    ours: list[str] = []
    runs: list[str] = []
    for override in overrides:
        is_ours = typed.split(override)[1].partition(".")[0] == "cluster"
        (ours if is_ours else runs).append(override)
    return ours, runs


def change_cluster(cluster: ClusterConfig, overrides: list[str]) -> ClusterConfig:
    """Return ``cluster`` with ``cluster.KEY=VALUE`` overrides, or another one with ``cluster=NAME``
    among them.

    Raises:
        ConfigError: as :func:`read_cluster`.
    """
    if any("." not in typed.split(override)[1] for override in overrides):
        return read_cluster(overrides)[0]
    hidden = typed.Hidden()
    # What was resolved once holds no references any more, whatever it looks like.
    tree = hidden.hide_all(cluster.model_dump(mode="json"))
    return _merged(tree, overrides, hidden, "cluster")


def _merged(
    tree: dict[str, Any], overrides: list[str], hidden: typed.Hidden, origin: str
) -> ClusterConfig:
    """Return the cluster that a tree and overrides of it describe. Raises ConfigError."""
    for override in overrides:
        _override(tree, override, hidden)
    try:
        raw = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigError(hidden.show(f"{origin}: {str(error).splitlines()[0]}")) from None
    return from_raw(hidden.show(raw), origin)


def _override(tree: dict[str, Any], override: str, hidden: typed.Hidden) -> None:
    """Set, or with a leading ~ remove, what one override of the cluster names. Raises
    ConfigError."""
    if problem := paths.unreadable(override):
        raise ConfigError(f"{override!a}: {problem}")
    prefix, key, value = typed.split(override)
    if value is None and "~" not in prefix:
        raise ConfigError(f"{override}: expected cluster.KEY=VALUE")
    section, (*sections, last) = tree, key.split(".")[1:]
    for name in sections:
        if not isinstance(section.get(name), dict):
            section[name] = {}
        section = section[name]
    if "~" not in prefix:
        section[last] = _read_value(key, value or "", hidden)
    elif section.pop(last, None) is None:
        raise ConfigError(f"{override}: there is no {key} to remove; leave it out")


def _read_value(key: str, text: str, hidden: typed.Hidden) -> Any:
    """Return the value of an override, as Hydra's grammar has it or, where that has none, YAML.

    Raises:
        ConfigError: neither can read it, or it lists several values.
    """
    field = key.partition(".")[2]
    found = typed.at(ClusterConfig, field)
    try:
        read = typed.value_for_hydra(ClusterConfig, field, text, hidden)
        parsed = typed.parse(f"x={read}") if read else None
        # YAML has what Hydra has not: nothing for null, and lists and mappings without brackets.
        is_bare = typed.is_container(found) and not text.lstrip().startswith(("[", "{"))
        if parsed is None or (is_bare and found):
            return hidden.carry_all(typed.read_yaml(text, found), ClusterConfig)
        return parsed.value()
    except typed.SeveralValuesError:
        raise ConfigError(
            f"{key}={text}: several values are a sweep, which can be of the run's settings only; "
            "give one value"
        ) from None
    except ValueError:
        raise ConfigError(
            f"{key}: {text} cannot be read; write a list as [a,b], and quote what holds a quote"
        ) from None


def from_raw(raw: Any, origin: str) -> ClusterConfig:
    """Return the cluster of plain values. Raises ConfigError, which names every wrong field."""
    try:
        return ClusterConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(
            f"{origin}: " + "; ".join(map(_format_problem, problems_of(error)))
        ) from None


def _format_problem(problem: Problem) -> str:
    """Return a wrong field of the cluster in one line."""
    message, found = problem.message, ""
    if problem.kind == "extra_forbidden":
        near = closest(problem.field[0], ClusterConfig.model_fields)
        known = (
            f"did you mean cluster.{near}?"
            if near
            else f"there are {', '.join(ClusterConfig.model_fields)}"
        )
        message = f"no such field; {known}"
    if not isinstance(problem.found, dict):
        found = f" (found {problem.found!r:.300})"
    return f"{'.'.join(['cluster', *problem.field])}: {message}{found}"
