"""Before the queue: whatever would end a job later is refused here, in one line that names the
field."""

import ipaddress
import re
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from cluster import run_record, slurm
from cluster.cluster_config import ClusterConfig
from cluster.run_record import Submission
from cluster.slurm import Node, Partition
from cluster.submit import plan, single_run
from cluster.submit.plan import Plan
from data_prep.files import free_bytes, nearest_existing
from data_prep.words import closest, counted, duration, megabytes
from dnt_scale.config import ConfigError, RunConfig, TorchEngineConfig, check_tracking
from dnt_scale.config.engine import copies_of
from dnt_scale.config.tracking_uri import sqlite_file
from dnt_scale.costs.memory_plan import checkpoint_bytes
from dnt_scale.data.sources import Source
from dnt_scale.distributed.compute_dtype import float8_layers
from dnt_scale.record.run_lock import check_free
from dnt_scale.train.recorded import Typed
from dnt_scale.train.resume import changes, check_place, starting_state
from dnt_scale.train.run_start import begin
from dnt_scale.train.stages import check_batches, load_stages

# file systems that several machines see, and those that are one machine's memory; what is in
# neither may be a disk
NETWORK = {
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "gfs2",
    "gpfs",
    "lustre",
    "nfs",
    "nfs4",
    "ocfs2",
    "orangefs",
    "panfs",
}
NETWORK |= {"pvfs2", "smb3", "wekafs"}
MEMORY = {"devtmpfs", "ramfs", "tmpfs"}
SHOWN = 6  # so many names are shown in a message


def check_and_plan(run: RunConfig, site: ClusterConfig, *, fresh: bool = False) -> Plan:
    """Return what the run's jobs are going to do, once nothing speaks against them. Leaves nothing
    behind.

    Args:
        fresh: what is in the run folder is going to be moved aside.

    Raises:
        ConfigError: a field of the run or the cluster that does not fit SLURM, the data or the
            disks; or a process writes the run folder.
        SlurmError: there is no SLURM here, or it would refuse the job.
        ValueError: a set or a checkpoint is damaged.
        OSError: a folder cannot be read.
    """
    check_free(run.run.dir)
    check_tracking(run)
    slurm.check_here()
    check_logins(site)
    found = slurm.partitions()
    partition = choose_partition(site, found)
    check_limits(site, partition)
    check_nodes(site, partition, {node.name for one in found.values() for node in one.nodes})
    check_account(site)
    check_signal(site)
    stages = load_stages(run)
    check_ranks(run, site)
    steps = stages.total_steps
    begun = begin(run, Typed(whole=True), fresh=fresh)
    state, _ = starting_state(begun, stages, site.ranks)
    if state.step >= steps:
        raise ConfigError(
            f"train.steps: all {steps:,} steps are done; ask for more of them, or of train.tokens"
        )
    check_writable(run)
    for stage in stages:
        check_shared(stage.run, site, stage.source, partition.nodes)
    check_room(run, steps)
    start = slurm.expected_start(batch_script(run, site))
    made = plan.make_plan(run, site, partition, stages, state.step)
    notes = [f"SLURM expects the first job to start at {start}"] if start else []
    notes += [*begun.notes, *changes(begun, stages)]
    return replace(made, notes=(*notes, *find_warnings(run, site, stages.source, partition)))


def batch_script(run: RunConfig, site: ClusterConfig) -> str:
    """Return the script of the run's first job; its folder is not made. Raises SlurmError."""
    run_dir = run.run.dir.absolute()
    logs = run_record.jobs_folder(run_dir) / "slurm"
    first = Submission(name=run.run.name, cluster=site, logs=logs)
    return single_run.format_script(single_run.executor_for(run_dir, first))


# --- what SLURM has -------------------------------------------------------------------------------


def choose_partition(site: ClusterConfig, found: dict[str, Partition]) -> Partition:
    """Return the partition that is asked for, else the default one.

    Raises:
        ConfigError: there is none of that name, it is down, or none is the default.
    """
    names = first_names(sorted(found))
    if site.partition is None:
        default = next((partition for partition in found.values() if partition.default), None)
        if default is None:
            raise ConfigError(
                "cluster.partition: is null and SLURM here has no default; set it to one of "
                f"{names}"
            )
        partition = default
    elif site.partition in found:
        partition = found[site.partition]
    else:
        raise ConfigError(
            f"cluster.partition: there is no {site.partition}"
            f"{did_you_mean(site.partition, found)}; "
            f"there are {names}"
        )
    if not partition.up:
        raise ConfigError(
            f"cluster.partition: {partition.name} is not up; wait, or take another of {names}"
        )
    return partition


def check_limits(site: ClusterConfig, partition: Partition) -> None:
    """Raise ConfigError when a job is longer or larger than the partition permits."""
    if partition.max_minutes is not None and site.time > partition.max_minutes:
        raise ConfigError(
            f"cluster.time is {site.time} minutes, but partition {partition.name} permits "
            f"{partition.max_minutes}; ask for no more (a run that needs longer goes on in its "
            "next job)"
        )
    most = min(len(partition.nodes), partition.max_nodes or len(partition.nodes))
    if site.nodes > most:
        has = f"permits {most} a job" if most == partition.max_nodes else f"has {most}"
        raise ConfigError(
            f"cluster.nodes is {site.nodes}, but partition {partition.name} {has}; ask for no more"
        )


def check_nodes(site: ClusterConfig, partition: Partition, everywhere: set[str]) -> None:
    """Raise ConfigError when no choice of nodes that work has what a job asks for.

    Args:
        everywhere: the names of all nodes that SLURM has.
    """
    wanted = expand_nodes("cluster.nodelist", site.nodelist or "")
    excluded = expand_nodes("cluster.exclude", ",".join(site.exclude))
    inside = {node.name for node in partition.nodes}
    for field, names, known, where in (
        ("cluster.nodelist", wanted, inside, f"partition {partition.name}"),
        ("cluster.exclude", excluded, everywhere, "SLURM here"),
    ):
        if strangers := sorted(set(names) - known):
            raise ConfigError(
                f"{field}: {where} has no {first_names(strangers)}; it has "
                f"{first_names(sorted(known))}"
            )
    if both := sorted(set(wanted) & set(excluded)):
        raise ConfigError(
            f"cluster.exclude holds {first_names(both)}, which cluster.nodelist asks for; take it "
            "out of one"
        )

    left = [node for node in partition.nodes if node.name not in excluded]
    if len(left) < site.nodes:
        raise ConfigError(
            f"cluster.nodes is {site.nodes}, but partition {partition.name} has {len(left)} "
            "without those of cluster.exclude; ask for no more"
        )
    cpus, memory_mb = (
        (site.cpus_per_rank or 1) * site.tasks_per_node,
        round((site.mem_gb or 0) * 1024),
    )
    needs: list[tuple[str, str, int, Callable[[Node], int]]] = [
        ("cluster.gpus_per_node", "GPUs", site.gpus_per_node, lambda node: node.gpus),
        (
            "cluster.cpus_per_rank",
            f"CPUs for {counted(site.tasks_per_node, 'rank')}",
            cpus,
            lambda node: node.cpus,
        ),
        ("cluster.mem_gb", "MB of memory", memory_mb, lambda node: node.memory_mb),
    ]
    fit = left
    for field, what, count, of in needs:
        fit = [node for node in fit if of(node) >= count]
        if len(fit) < site.nodes:
            most = max(of(node) for node in left)
            raise ConfigError(
                f"{field}: a job needs {counted(site.nodes, 'node')} with {count} {what}, but "
                f"partition {partition.name} has {len(fit)} (the most in a node is {most}); ask "
                "for less, or another partition"
            )
    able = [node for node in fit if node.able]
    unable = [node for node in fit if not node.able and (not wanted or node.name in wanted)]
    if len(able) < site.nodes or (wanted and unable):
        down = ", ".join(f"{node.name} is {node.state}" for node in unable[:SHOWN])
        raise ConfigError(
            f"{'cluster.nodelist' if wanted else 'cluster.nodes'}: a job needs "
            f"{counted(site.nodes, 'node')}, and partition {partition.name} has {len(able)} that "
            f"fit and can be used ({down}); ask for others, or wait"
        )


def expand_nodes(field: str, nodes: str) -> list[str]:
    """Return the names behind ``node[1-3,7]``. Raises ConfigError."""
    try:
        names = slurm.hostnames(nodes)
    except slurm.SlurmError:
        names = []
    if nodes and not names:  # scontrol may complain and end with status 0
        raise ConfigError(
            f"{field}: {nodes} is no list of nodes; expected names such as node1 or node[1-3,7]"
        )
    return names


def check_account(site: ClusterConfig) -> None:
    """Raise ConfigError for an account or a QOS that accounting does not know this user by; it may
    not say."""
    if site.account is None and site.qos is None:
        return
    for field, asked, yours in zip(
        ("account", "qos"), (site.account, site.qos), slurm.accounts(), strict=True
    ):
        if asked is not None and yours and asked.lower() not in yours:
            raise ConfigError(
                f"cluster.{field}: {asked} is none of yours{did_you_mean(asked, yours)}; you have "
                f"{first_names(sorted(yours))}"
            )


def check_signal(site: ClusterConfig) -> None:
    """Raise ConfigError when a job would be told to stop before it is half over."""
    if 2 * site.signal_s > 60 * site.time:
        raise ConfigError(
            f"cluster.signal_s is {site.signal_s}, more than half of a job of {60 * site.time} s "
            f"(cluster.time is {site.time} min), which would hardly train; ask for less, or for "
            "longer jobs"
        )


# --- the run on its ranks -------------------------------------------------------------------------


def check_ranks(run: RunConfig, site: ClusterConfig) -> None:
    """Raise ValueError, in training's words, when the batch, the engine or the device does not go
    with the ranks."""
    check_batches(run, site.ranks)
    if isinstance(run.engine, TorchEngineConfig):
        copies_of(run.engine, site.ranks, site.nodes)
    gpus = site.gpus_per_node
    wants, without = "", ""
    if run.run.device == "cuda":
        wants, without = "run.device is cuda", "run.device=cpu"
    elif run.train.dtype == "fp8":
        wants, without = "train.dtype is fp8", "train.dtype=bf16"
    asked = gpus or any(name.startswith(("gpus", "gres")) for name in site.sbatch)
    if wants and not asked:
        raise ConfigError(
            f"{wants}, but cluster.gpus_per_node is 0; ask for GPUs, or use {without}"
        )
    if run.train.dtype == "fp8":
        if run.run.device == "cpu":
            raise ConfigError("train.dtype is fp8, but run.device is cpu; use train.dtype=bf16")
        float8_layers()
    if run.run.device != "cpu" and gpus and site.tasks_per_node > gpus:
        raise ConfigError(
            f"cluster.ranks_per_node is {site.tasks_per_node}, but cluster.gpus_per_node is "
            f"{gpus}; start one rank a GPU, or use run.device=cpu"
        )


# --- folders --------------------------------------------------------------------------------------


def check_writable(run: RunConfig) -> None:
    """Check that the run folder and the checkpoints' can be made and written; no folder is made.

    Raises:
        ConfigError: they cannot.
    """
    for field, path in written_folders(run):
        try:
            with tempfile.TemporaryDirectory(prefix=".dnt-", dir=nearest_existing(path)):
                pass
        except OSError as error:
            raise ConfigError(
                f"{field}: nothing can be written to {path} ({error.strerror or error}); give "
                "another"
            ) from None
    if not isinstance(run.checkpoints, Path):
        check_place(run)


def written_folders(run: RunConfig) -> list[tuple[str, Path]]:
    """Return the local folders that a run writes, with their fields."""
    found = [("run.dir", run.run.dir.absolute())]
    if run.checkpoint.dir is not None and isinstance(run.checkpoints, Path):
        found.append(("checkpoint.dir", run.checkpoints.absolute()))
    return found


def check_shared(
    run: RunConfig, site: ClusterConfig, source: Source, nodes: Sequence[Node]
) -> None:
    """Check that all nodes see what the run reads and writes, as far as one machine can tell by the
    kind of file system.

    Raises:
        ConfigError: a folder is in this machine's memory, or on what looks like its disk while
            nodes are others; unless it is below one of ``cluster.shared``.
    """
    places = [
        *written_folders(run),
        *(
            (part.field, Path(part.place).absolute())
            for part in source.parts()
            if "://" not in str(part.place)
        ),
    ]
    if run.tracking.enabled and run.tracking.uri and (database := sqlite_file(run.tracking.uri)):
        places.append(("tracking.uri", database.absolute()))
    check_places_shared(places, site, nodes)


def check_places_shared(
    places: list[tuple[str, Path]], site: ClusterConfig, nodes: Sequence[Node]
) -> None:
    """Do what :func:`check_shared` does for fields and the local paths they hold. Raises
    ConfigError."""
    other = first_other_machine(nodes)
    for field, path in places:
        if any(path.is_relative_to(folder.absolute()) for folder in site.shared):
            continue
        kind, mount = mount_of(path)
        if kind in MEMORY:
            raise ConfigError(
                f"{field}: {path} lies in the memory of this machine ({kind} on {mount}), which no "
                "other sees and a restart empties; give a folder on a file system that the nodes "
                "share"
            )
        if other and not is_network_kind(kind):
            raise ConfigError(
                f"{field}: {path} lies on {kind} ({mount}), by its kind a disk of this machine, "
                f"which {other} does not see; give a folder that the nodes share, or, if they do "
                f"see it, cluster.shared=[{path}]"
            )


def is_network_kind(kind: str) -> bool:
    return kind in NETWORK or kind.startswith("fuse.")


def mount_of(path: Path) -> tuple[str, Path]:
    """Return the kind of file system that holds a path, or is going to, and where it is mounted."""
    place = path.resolve()
    # Of several file systems that are mounted at one place the last one counts.
    mounts = {Path(disk.mountpoint): disk.fstype for disk in psutil.disk_partitions(all=True)}
    mount = next(above for above in (place, *place.parents) if above in mounts)
    return mounts[mount], mount


def first_other_machine(nodes: Sequence[Node]) -> str | None:
    """Return the first node that is another machine than this one, if any."""
    return next((node.name for node in nodes if not is_this_machine(node.address)), None)


def is_this_machine(address: str) -> bool:
    """Whether a node's address, by number or name, is this machine's."""
    mine = {item.address for addresses in psutil.net_if_addrs().values() for item in addresses}
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(address, None)}
    except OSError:
        return False
    return all(
        number in mine or ipaddress.ip_address(number.partition("%")[0]).is_loopback
        for number in found
    )


def check_room(run: RunConfig, steps: int, runs: int = 1) -> None:
    """Raise ConfigError when the disk has no room for the checkpoints that so many runs keep;
    quotas are not seen."""
    place = run.checkpoints
    if not isinstance(place, Path):
        return
    each, count = checkpoint_bytes(run), plan.most_checkpoints(run, steps) * runs
    there = sum(file.stat().st_size for file in place.glob("step-*/*"))
    free = free_bytes(place)
    if each * count > there + free:
        forever = (
            ""
            if run.checkpoint.keep_every is None
            else f" and checkpoint.keep_every {run.checkpoint.keep_every}"
        )
        raise ConfigError(
            f"{'run.dir' if run.checkpoint.dir is None else 'checkpoint.dir'}: {count} checkpoints "
            f"of {megabytes(each)} (checkpoint.keep {run.checkpoint.keep}{forever}, one being "
            f"written) take {megabytes(each * count)}, but {place} has room for "
            f"{megabytes(there + free)}; free some, keep fewer, or give another folder"
        )


# --- logins ---------------------------------------------------------------------------------------

# Find NAME=VALUE with a value that stands there, rather than $VARIABLE or $(command), and a login
# in a URL.
_SECRET = re.compile(
    r"""(?ix) \b (?P<name> \w*(?:token|passw(?:or)?d|secret|api_?key) | (?:\w*_)?key)
      = ["']? [^\s"'$`]
    | (?P<url> ://[^/\s:@"']*:[^/\s@"'$][^/\s@"']*@)"""
)


def check_logins(site: ClusterConfig) -> None:
    """Raise ConfigError, which does not repeat it, when an option or a line for the batch script
    holds a login."""
    for field, text in script_texts(site):
        if match := _SECRET.search(text):
            what = (
                f"gives {match['name']} a value" if match["name"] else "has a URL with a password"
            )
            raise ConfigError(
                f"{field} {what}, which would be kept in the run folder and shown by --dry-run and "
                "scontrol; put it into a file that only you can read, and `source` that in "
                "cluster.setup"
            )


def script_texts(site: ClusterConfig) -> Iterator[tuple[str, str]]:
    """Return all that a cluster's settings add to the batch script, with where it is from."""
    for field in ("setup", "container", "srun"):
        for number, line in enumerate(getattr(site, field), 1):
            yield f"cluster.{field}: item {number}", line
    for name, value in site.sbatch.items():
        yield f"cluster.sbatch.{name}", f"{name}={value}"


# --- no error, but worth a line -------------------------------------------------------------------


def find_warnings(
    run: RunConfig, site: ClusterConfig, source: Source, partition: Partition
) -> Iterator[str]:
    before = plan.read_past_pace(run, source.unit)
    if before and before.save_s is not None and site.signal_s < 2 * (before.step_s + before.save_s):
        yield (
            f"cluster.signal_s is {site.signal_s}, less than twice what a step and a checkpoint "
            f"took in this run ({duration(before.step_s)} and {duration(before.save_s)}): a job "
            "may end before it has saved"
        )
    if run.run.device == "cpu" and site.gpus_per_node:
        yield (
            f"run.device is cpu, so the {site.gpus_per_node} GPUs a node that the jobs ask for "
            f"have nothing to do"
        )
    python = Path(site.python)
    vouched = site.container or any(
        python.is_relative_to(place.absolute()) for place in site.shared
    )
    if (
        python.is_absolute()
        and not vouched
        and not is_network_kind(mount_of(python.parent)[0])
        and first_other_machine(partition.nodes)
    ):
        yield (
            f"cluster.python: {site.python} looks like a file of this machine only; the nodes need "
            f"it too"
        )
    unable = [node.name for node in partition.nodes if not node.able]
    if unable:
        yield f"of partition {partition.name}, {first_names(unable)} cannot be used now"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    near = closest(word, known)
    return f" (did you mean {near}?)" if near else ""


def first_names(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
