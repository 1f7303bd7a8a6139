"""What `dnt submit` refuses before the queue: on the real SLURM what depends on it, the rest on
plain data."""

import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import run_record, slurm
from cluster.cluster_config import ClusterConfig, read_cluster
from cluster.run_record import RecordError
from cluster.slurm import Node, Partition, SlurmError
from cluster.submit import checks, single_run, sweep_run
from cluster.watch.find_runs import runs_under
from dnt_scale import config
from dnt_scale.cli.main import main
from dnt_scale.config import ConfigError, RunConfig
from dnt_scale.data.sources import load_source
from dnt_scale.record import run_lock
from dnt_scale.record.run_lock import HeldError
from testbed.run import synthetic_set, tiny
from tests.helpers.folders import submitted_run

on_slurm = pytest.mark.usefixtures("slurm")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_set(tmp_path_factory.mktemp("checks") / "set")


def site_of(*overrides: str) -> ClusterConfig:
    return read_cluster(["cluster=sandbox", *overrides])[0]


def asked(data: Path, run_dir: Path, *overrides: str) -> tuple[RunConfig, ClusterConfig]:
    site, rest = read_cluster(["cluster=sandbox", *overrides])
    return config.load(tiny(data, run_dir, *rest)), site


@pytest.fixture(scope="module")
def small(slurm: object) -> Iterator[str]:
    """A partition for jobs of two nodes and an hour at most, as long as the tests need it."""
    name = f"small-{uuid.uuid4().hex[:6]}"
    subprocess.run(
        [
            "scontrol",
            "create",
            f"PartitionName={name}",
            "MaxTime=60",
            "MaxNodes=2",
            "Nodes=node[1-3]",
        ],
        check=True,
    )
    yield name
    subprocess.run(["scontrol", "delete", f"PartitionName={name}"], check=True)


@on_slurm
def test_a_run_that_fits_is_planned_and_leaves_nothing_behind(data: Path, tmp_path: Path) -> None:
    made = checks.check_and_plan(*asked(data, tmp_path / "runs" / "one"))
    assert (made.partition, made.steps, made.done) == ("main", 20, 0)
    assert re.match(
        r"SLURM expects the first job to start at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d on node\S+",
        made.notes[0],
    )
    assert not list(tmp_path.iterdir())


@on_slurm
def test_the_default_partition_is_taken(data: Path, tmp_path: Path) -> None:
    assert (
        checks.check_and_plan(*asked(data, tmp_path / "one", "cluster.partition=null")).partition
        == "main"
    )


REFUSED = {
    "cluster.partition=mian": r"cluster\.partition: there is no mian \(did you mean main\?\); "
    r"there are .*main",
    "cluster.nodes=9": r"cluster\.nodes is 9, but partition main has 3; ask for no more",
    "cluster.nodelist=node[1-2,9]": r"cluster\.nodelist: partition main has no node9; it has "
    r"node1, node2, node3",
    "cluster.exclude=[node1,elsewhere]": r"cluster\.exclude: SLURM here has no elsewhere; it has "
    r"node1, node2, node3",
    "cluster.nodelist=node[1-x]": r"cluster\.nodelist: node\[1-x\] is no list of nodes; expected "
    r"names such as",
    "cluster.exclude=[node1,node2]": r"cluster\.nodes is 2, but partition main has 1 without those "
    r"of cluster\.exclude",
    "cluster.gpus_per_node=9": r"cluster\.gpus_per_node: a job needs 2 nodes with 9 GPUs, but .* "
    r"has 0 \(.* is 8\)",
    "cluster.cpus_per_rank=9": r"cluster\.cpus_per_rank: a job needs 2 nodes with 9 CPUs for 1 "
    r"rank, .* is 8\)",
    "cluster.mem_gb=100": r"cluster\.mem_gb: a job needs 2 nodes with 102400 MB of memory, .* is "
    r"8000\)",
}


@on_slurm
@pytest.mark.parametrize("override", REFUSED)
def test_slurm_does_not_have_it(override: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=REFUSED[override]):
        checks.check_and_plan(*asked(data, tmp_path / "one", override))
    assert not list(tmp_path.iterdir())


@on_slurm
def test_limits_of_the_partition(small: str, data: Path, tmp_path: Path) -> None:
    ask = [data, tmp_path / "one", f"cluster.partition={small}"]
    with pytest.raises(
        ConfigError,
        match=rf"cluster\.time is 61 minutes, but partition {small} permits 60; ask for no",
    ):
        checks.check_and_plan(*asked(*ask, "cluster.time=61"))
    with pytest.raises(
        ConfigError, match=rf"cluster\.nodes is 3, but partition {small} permits 2 a job"
    ):
        checks.check_and_plan(*asked(*ask, "cluster.nodes=3", "train.global_batch=9"))
    assert checks.check_and_plan(*asked(*ask, "cluster.time=60")).partition == small
    subprocess.run(["scontrol", "update", f"PartitionName={small}", "State=DOWN"], check=True)
    with pytest.raises(
        ConfigError, match=rf"cluster\.partition: {small} is not up; wait, or take another of"
    ):
        checks.check_and_plan(*asked(*ask))


@on_slurm
def test_accounts_and_qos_are_those_that_accounting_knows(data: Path, tmp_path: Path) -> None:
    accounts, qos = slurm.accounts()
    if not accounts:
        pytest.skip("this SLURM has no accounting")
    for field, known in (("account", accounts), ("qos", qos)):
        made = checks.check_and_plan(
            *asked(data, tmp_path / "one", f"cluster.{field}={min(known)}")
        )
        assert made.partition == "main"
        with pytest.raises(
            ConfigError,
            match=rf"cluster\.{field}: nobody-s is none of yours.*; you have .*{min(known)}",
        ):
            checks.check_and_plan(*asked(data, tmp_path / "one", f"cluster.{field}=nobody-s"))


@on_slurm
def test_what_only_slurm_knows_is_refused_in_its_words(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SlurmError, match=r"SLURM would refuse the job: .*Invalid feature specification"
    ):
        checks.check_and_plan(*asked(data, tmp_path / "one", "cluster.constraint=h100"))
    assert not list(tmp_path.iterdir())


def test_no_slurm_here(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        SlurmError,
        match=r"no SLURM here: there is no `sbatch` on PATH; run this on a login node, or",
    ):
        checks.check_and_plan(*asked(data, tmp_path / "one"))


@on_slurm
def test_the_controller_is_down(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "slurm.conf"
    other.write_text(Path("/etc/slurm/slurm.conf").read_text() + "\nSlurmctldPort=1\n")
    monkeypatch.setenv("SLURM_CONF", str(other))
    with pytest.raises(
        SlurmError, match=r"SLURM's controller does not answer: .* is DOWN .*; try again"
    ):
        checks.check_and_plan(*asked(data, tmp_path / "one"))


@pytest.fixture
def same_umask() -> Iterator[None]:
    """`dnt submit` makes its files private."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


@on_slurm
@pytest.mark.usefixtures("same_umask")
def test_a_run_is_submitted_once_and_not_again_while_its_job_lives(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "runs" / "once"
    submit = [
        "submit",
        "cluster=sandbox",
        "cluster.sbatch.hold=true",
        *tiny(data, run_dir, "run.name=once"),
    ]

    def refused(*arguments: str) -> str:
        assert main([*arguments]) == 2
        return capsys.readouterr().err

    assert main([*submit, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert " ".join(shown.split()).startswith(f"run once in {run_dir} cluster ")
    assert (
        "\n#SBATCH --partition=main\n" in shown
        and f"\n#SBATCH --output={run_dir}/jobs/slurm/%j_0_log.out\n" in shown
    )
    assert refused(*submit, "cluster.time=1") == (
        "error: cluster.signal_s is 120, more than half of a job of 60 s (cluster.time is 1 min), "
        "which would hardly "
        "train; ask for less, or for longer jobs\n"
    )
    assert refused(*submit, "optim.schedule.warmup_steps=9000").startswith(
        "error: optim.schedule.warmup_steps is 9000, but the run has "
    )
    assert not list(tmp_path.iterdir())
    assert main(submit) == 0
    capsys.readouterr()
    job = run_record.read_submission(run_dir).job
    try:
        assert refused(*submit) == (
            f"error: run.name: once was submitted before (job {job}); `dnt resubmit {run_dir}` "
            "goes on with it, "
            "--fresh begins anew, or take another run.name\n"
        )
        assert refused("resubmit", str(run_dir)) == (
            f"error: {run_dir}: job {job} of it is pending; `dnt cancel {run_dir}` ends it first\n"
        )
    finally:
        slurm.cancel(job)


# --- nodes that work: SLURM's answer as data ------------------------------------------------------


def partition(*states: str) -> Partition:
    nodes = tuple(
        Node(f"n{number}", state, 8, 8000, 8, address="127.0.0.1")
        for number, state in enumerate(states, 1)
    )
    return Partition("long", up=True, default=True, max_minutes=None, max_nodes=None, nodes=nodes)


def test_nodes_that_are_down_are_named() -> None:
    known = {"n1", "n2", "n3"}
    checks.check_nodes(site_of(), partition("idle", "down", "mixed"), known)
    with pytest.raises(
        ConfigError,
        match=r"cluster\.nodes: .* needs 2 nodes, .* has 1 .* \(n2 is down, n3 is drained\)",
    ):
        checks.check_nodes(site_of(), partition("idle", "down", "drained"), known)


@on_slurm
def test_nodes_that_are_asked_for_by_name_and_down_or_excluded() -> None:
    known = {"n1", "n2", "n3"}
    ask = ["cluster.nodelist=n[2-3]", "cluster.nodes=1"]
    checks.check_nodes(site_of(*ask), partition("down", "idle", "idle"), known)
    with pytest.raises(
        ConfigError, match=r"cluster\.nodelist: a job needs 1 node, .* \(n2 is down\)"
    ):
        checks.check_nodes(site_of(*ask), partition("idle", "down", "idle"), known)
    with pytest.raises(
        ConfigError, match=r"cluster\.exclude holds n3, which cluster\.nodelist asks for"
    ):
        checks.check_nodes(
            site_of(*ask, "cluster.exclude=[n3]"), partition("idle", "idle", "idle"), known
        )


def test_a_site_without_a_default_partition() -> None:
    other = {
        "b": Partition("b", True, False, None, None, ()),
        "a": Partition("a", True, False, None, None, ()),
    }
    with pytest.raises(
        ConfigError, match=r"cluster\.partition: is null and .* no default; set it to one of a, b"
    ):
        checks.choose_partition(site_of("cluster.partition=null"), other)


# --- folders --------------------------------------------------------------------------------------


@pytest.fixture
def in_memory(data: Path) -> Iterator[Path]:
    """A folder in /dev/shm with a copy of the set."""
    folder = Path("/dev/shm", f"dnt-test-{uuid.uuid4().hex[:8]}")
    shutil.copytree(data, folder / "set")
    yield folder
    shutil.rmtree(folder)


@on_slurm
def test_what_lies_in_memory_is_not_shared(data: Path, in_memory: Path, tmp_path: Path) -> None:
    said = (
        r"lies in the memory of this machine \(tmpfs on /dev/shm\), .* give a folder on a file "
        r"system that the nodes"
    )
    with pytest.raises(ConfigError, match=rf"data\.path: {in_memory}/set {said}"):
        checks.check_and_plan(*asked(in_memory / "set", tmp_path / "one"))
    with pytest.raises(ConfigError, match=rf"run\.dir: {in_memory}/one {said}"):
        checks.check_and_plan(*asked(data, in_memory / "one"))
    with pytest.raises(ConfigError, match=rf"checkpoint\.dir: {in_memory}/two {said}"):
        checks.check_and_plan(*asked(data, tmp_path / "one", f"checkpoint.dir={in_memory}/two"))
    assert [path.name for path in in_memory.iterdir()] == ["set"]
    assert not list(tmp_path.iterdir())


def test_a_disk_is_not_shared_with_other_machines_unless_the_user_says_so(
    data: Path, tmp_path: Path
) -> None:
    run, site = asked(
        data, tmp_path / "one", "tracking.enabled=true", "tracking.uri=sqlite:////tmp/dnt-mlflow.db"
    )
    kind, _ = checks.mount_of(tmp_path)
    if kind in checks.MEMORY or checks.is_network_kind(kind):
        pytest.skip(f"needs a temporary folder on a disk; this one is {kind}")
    source = load_source(run)
    here = Node("node1", "idle", 8, 8000, 0, address="127.0.0.1")
    away = Node("gpu7", "idle", 8, 8000, 0, address="192.0.2.1")  # RFC 5737: nobody's
    checks.check_shared(run, site, source, [here])
    with pytest.raises(
        ConfigError, match=rf"run\.dir: {tmp_path}/one lies on {kind} .* gpu7 .*cluster\.shared=\["
    ):
        checks.check_shared(run, site, source, [here, away])
    for path, next_field in ((tmp_path, "data.path"), (data, "tracking.uri")):
        site = site.model_copy(update={"shared": [*site.shared, path]})
        with pytest.raises(ConfigError, match=re.escape(next_field)):
            checks.check_shared(run, site, source, [away])
    checks.check_shared(
        run, site.model_copy(update={"shared": [*site.shared, Path("/tmp")]}), source, [away]
    )


def test_kinds_of_file_systems() -> None:
    assert checks.mount_of(Path("/proc/self/status")) == ("proc", Path("/proc"))
    assert checks.mount_of(Path("/dev/shm/not/there/yet")) == ("tmpfs", Path("/dev/shm"))
    assert all(
        map(
            checks.is_network_kind,
            ("nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.glusterfs", "wekafs"),
        )
    )
    assert not any(
        map(checks.is_network_kind, ("ext4", "xfs", "btrfs", "overlay", "tmpfs", "fuseblk", "zfs"))
    )


def test_addresses_of_this_machine() -> None:
    assert (
        checks.is_this_machine("127.0.0.1")
        and checks.is_this_machine("localhost")
        and checks.is_this_machine("127.0.1.1")
    )
    assert not checks.is_this_machine("192.0.2.1") and not checks.is_this_machine(
        "no-such-host.invalid"
    )


def test_a_folder_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for field, overrides in (
        ("run.dir", []),
        ("checkpoint.dir", [f"checkpoint.dir={tmp_path}/file/below"]),
    ):
        run, _ = asked(
            data, Path("/proc/dnt/run") if field == "run.dir" else tmp_path / "one", *overrides
        )
        with pytest.raises(
            ConfigError, match=rf"{field}: nothing can be written to \S+ \(.+\); give another"
        ):
            checks.check_writable(run)
    run, _ = asked(data, tmp_path / "a" / "b")
    checks.check_writable(run)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_room_for_the_checkpoints(data: Path, tmp_path: Path) -> None:
    run, _ = asked(data, tmp_path / "one", "checkpoint.every=1", "checkpoint.keep=100000000")
    checks.check_room(run, 20)  # there will be 20
    with pytest.raises(
        ConfigError,
        match=r"run\.dir: 100000001 checkpoints of 1\.09 MB .* take 10\d\.\d\d TB, but .* has room "
        r"for .*free",
    ):
        checks.check_room(run, 10**9)


@on_slurm
def test_a_shard_that_is_cut_short(data: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(data, tmp_path / "set"))
    with (broken / "train-000001.tar").open("r+b") as shard:
        shard.truncate(1000)
    with pytest.raises(
        ValueError, match=r"train-000001\.tar: truncated, 1000 bytes where the manifest says"
    ):
        checks.check_and_plan(*asked(broken, tmp_path / "one"))
    assert not (tmp_path / "one").exists()


@on_slurm
def test_a_tokenizer_of_another_size_and_sets_that_do_not_match(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 500, .* 512 token ids"):
        checks.check_and_plan(*asked(data, tmp_path / "one", "model.vocab_size=500"))
    other = synthetic_set(tmp_path / "other", vocab_size=400)
    mixture = [
        f"data.mixture.{name}={{path: {path}, weight: 1}}"
        for name, path in (("a", data), ("b", other))
    ]
    with pytest.raises(
        ConfigError, match=r"data\.mixture\.b\.path: .* tokenizer \(sha256\) \w+, but .* has \w+"
    ):
        checks.check_and_plan(
            *asked(data, tmp_path / "one", "data=mixture", "data.path=null", *mixture)
        )


# --- the run on its ranks, the signal, logins -----------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.global_batch=9"],
            r"train\.global_batch is 9, not divisible by 2 ranks; use a multiple of 2",
        ),
        (
            ["engine=hsdp", "engine.replicas=3"],
            r"engine\.replicas is 3, but copies do not share 2 ranks equally",
        ),
        (
            ["engine=hsdp", "cluster.ranks_per_node=2", "cluster.nodes=1", "engine.replicas=4"],
            r"engine\.replicas is 4",
        ),
        (["run.device=cuda"], r"run\.device is cuda, but cluster\.gpus_per_node is 0"),
        (
            ["train.dtype=fp8", "run.device=auto"],
            r"train\.dtype is fp8, but cluster\.gpus_per_node is 0; .* use train\.dtype=bf16",
        ),
        (
            ["train.dtype=fp8", "cluster.gpus_per_node=2"],
            r"train\.dtype is fp8, but run\.device is cpu; use train\.dtype=bf16",
        ),
        (
            ["run.device=auto", "cluster.gpus_per_node=1", "cluster.ranks_per_node=2"],
            r"cluster\.ranks_per_node is 2, but cluster\.gpus_per_node is 1; start one rank a GPU",
        ),
    ],
)
def test_a_run_that_does_not_go_with_its_ranks(
    overrides: list[str], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        checks.check_ranks(*asked(data, tmp_path / "one", *overrides))


def test_a_run_in_fp8_without_torchao(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    overrides = ["train.dtype=fp8", "run.device=cuda", "cluster.gpus_per_node=2"]
    with pytest.raises(ConfigError, match=r"pip install 'dnt-scale\[fp8\]'"):
        checks.check_ranks(*asked(data, tmp_path / "one", *overrides))


def test_runs_that_go_with_their_ranks(data: Path, tmp_path: Path) -> None:
    for overrides in (
        ["engine=hsdp"],
        ["cluster.nodes=3", "cluster.ranks_per_node=2", "train.global_batch=12", "engine=hsdp"],
        ["run.device=cuda", "cluster.gpus_per_node=2", "train.global_batch=8"],
        ["run.device=cuda", "cluster.sbatch.gres=gpu:1"],
        ["cluster.gpus_per_node=1", "cluster.ranks_per_node=2"],  # run.device is cpu
    ):
        checks.check_ranks(*asked(data, tmp_path / "one", *overrides))


def test_the_signal_leaves_half_of_the_job_to_train() -> None:
    checks.check_signal(site_of("cluster.time=4", "cluster.signal_s=120"))
    with pytest.raises(
        ConfigError, match=r"cluster\.signal_s is 121, more than half of a job of 240 s"
    ):
        checks.check_signal(site_of("cluster.time=4", "cluster.signal_s=121"))


SECRET = "v3rys3cret"


@pytest.mark.parametrize(
    ("field", "line", "said"),
    [
        ("setup", f"export HF_TOKEN={SECRET}", "HF_TOKEN"),
        ("setup", f'MLFLOW_TRACKING_PASSWORD="{SECRET}" true', "MLFLOW_TRACKING_PASSWORD"),
        ("setup", f"export AWS_SECRET_ACCESS_KEY='{SECRET}'", "AWS_SECRET_ACCESS_KEY"),
        ("setup", f"export WANDB_APIKEY={SECRET}", "WANDB_APIKEY"),
        ("setup", f"export http_proxy=http://me:{SECRET}@proxy:3128", "URL"),
        ("container", f"--container-env=NGC_API_KEY={SECRET}", "NGC_API_KEY"),
        ("srun", f"--export=ALL,HF_TOKEN={SECRET}", "HF_TOKEN"),
    ],
)
def test_a_login_in_the_batch_script_is_refused_and_not_repeated(
    field: str, line: str, said: str
) -> None:
    site = site_of().model_copy(update={field: ["umask 077", line]})
    with pytest.raises(
        ConfigError, match=rf"cluster\.{field}: item 2 .*{said}.* put it into a file"
    ) as refused:
        checks.check_logins(site)
    assert SECRET not in str(refused.value)


def test_a_login_among_the_options_of_sbatch() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.sbatch\.export gives HF_TOKEN a value"):
        checks.check_logins(
            site_of().model_copy(update={"sbatch": {"export": f"ALL,HF_TOKEN={SECRET}"}})
        )


def test_lines_without_a_login_pass() -> None:
    lines = [
        "module load cuda/12.4",
        "export TOKENIZERS_PARALLELISM=false MONKEY=1 KEYBOARD=us",
        'export HF_TOKEN="$(cat ~/.hf-token)" WANDB_API_KEY=$KEY PGPASSWORD=`pass pg`',
        "source ~/secrets.sh",
        "export http_proxy=http://proxy:3128 MLFLOW_TRACKING_URI=https://mlflow.site:5000/a@b",
        "export HF_TOKEN=",
    ]
    checks.check_logins(site_of().model_copy(update={"setup": lines}))


# --- warnings -------------------------------------------------------------------------------------


def test_gpus_for_nothing_and_nodes_that_are_down(data: Path, tmp_path: Path) -> None:
    run, site = asked(data, tmp_path / "one", "cluster.gpus_per_node=8")
    found = list(checks.find_warnings(run, site, load_source(run), partition("idle", "down")))
    assert found == [
        "run.device is cpu, so the 8 GPUs a node that the jobs ask for have nothing to do",
        "of partition long, n2 cannot be used now",
    ]


def test_a_run_that_trains_here_is_not_submitted(data: Path, tmp_path: Path) -> None:
    run, site = asked(data, tmp_path / "one")
    (tmp_path / "one").mkdir()
    with run_lock.take(tmp_path / "one", run_lock.this_process("training")):
        for refused in (
            lambda: checks.check_and_plan(run, site),
            lambda: single_run.submit(run, site),
            lambda: single_run.submit(run, site, fresh=True),
            lambda: sweep_run.check_new(tmp_path / "one"),
        ):
            with pytest.raises(
                HeldError,
                match=rf"run\.dir: {tmp_path / 'one'} is being trained by pid {os.getpid()}",
            ):
                refused()
    assert not run_record.is_submitted(tmp_path / "one")
    (tmp_path / "one" / "config.yaml").write_text(config.to_yaml(run))
    with pytest.raises(
        RecordError, match=r"is the folder of a run; take another run\.name for the sweep"
    ):
        sweep_run.check_new(tmp_path / "one")


def test_a_run_that_began_anew_leaves_one_to_be_shown(tmp_path: Path) -> None:
    submitted_run(tmp_path / "big", [], "8")
    submitted_run(tmp_path / "big" / "before-2026-11-29-081500", [], "7")
    assert list(runs_under(tmp_path)) == [tmp_path / "big"]
