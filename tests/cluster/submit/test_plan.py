"""The plan of a submission: its numbers against real runs and files, and how it reads."""

import json
import os
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cluster_config import ClusterConfig, read_cluster
from cluster.slurm import Node, Partition
from cluster.submit import checks, plan
from cluster.submit.plan import PastPace
from data_prep.words import duration, megabytes
from dnt_scale import config
from dnt_scale.checkpoint import Saver
from dnt_scale.config import ConfigError, RunConfig, Unit
from dnt_scale.config.hardware import hardware_of, load_hardware
from dnt_scale.costs.memory_plan import checkpoint_bytes
from dnt_scale.data.sources import load_source
from dnt_scale.distributed import process_group
from dnt_scale.model.flops import flops_per_token
from dnt_scale.train.stages import load_stages
from testbed.run import synthetic_set, tiny, train
from tests.helpers.tensor_shards import copies, some_state, some_tensors

H100 = Node("gpu1", "idle", 64, 500_000, 8, gpu="nvidia_h100_80gb_hbm3")
TOKENS = Unit("tokens", 64)
PLAIN = Node("cpu1", "idle", 64, 500_000, 0)


def partition(*nodes: Node) -> Partition:
    return Partition("long", True, True, None, None, nodes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_set(tmp_path_factory.mktemp("plan") / "set")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real run of 20 steps on one rank. To be read only."""
    run_dir = tmp_path_factory.mktemp("trained") / "tiny"
    train(tiny(data, run_dir)).ok()
    return run_dir


def asked(data: Path, run_dir: Path, *overrides: str) -> tuple[RunConfig, ClusterConfig]:
    site, rest = read_cluster(["cluster=sandbox", *overrides])
    return config.load(tiny(data, run_dir, *rest)), site


def planned(
    data: Path, run_dir: Path, *overrides: str, nodes: tuple[Node, ...] = (PLAIN,)
) -> plan.Plan:
    run, site = asked(data, run_dir, *overrides)
    return plan.make_plan(run, site, partition(*nodes), load_stages(run))


def line(text: str, name: str) -> str:
    """What is said under a name, in one line."""
    found = re.search(rf"^{name} +(.*(?:\n  .*)*)", text, re.MULTILINE)
    assert found, text
    return " ".join(found[1].split())


# --- what it says ---------------------------------------------------------------------------------


def test_a_new_run(data: Path, tmp_path: Path) -> None:
    text = plan.format_plan(planned(data, tmp_path / "one"))
    assert max(map(len, text.splitlines())) <= max(100, len(str(tmp_path)) + 40)
    assert line(text, "run") == f"tiny in {tmp_path}/one"
    assert line(text, "cluster") == (
        "partition long: 2 nodes x 1 rank = 2 ranks; a node: no GPUs, 1 CPU, 2 GB memory; jobs of "
        "1 h"
    )
    assert line(text, "model") == "dnt_nano, 0.1M parameters; engine fsdp, optimizer msgdw, fp32"
    assert line(text, "data") == f"{data}: 60,000 tokens"
    assert line(text, "batch") == "8 rows of 64 tokens = 2 ranks x 1 micro-batch x 4 rows"
    assert line(text, "steps") == "20 of 512 tokens = 10,240 tokens, 0.17 epochs"
    assert line(text, "checkpoints").startswith(
        "1.09 MB each, every 6 steps, at most 3 at a time (3.26 MB), in /"
    )
    assert line(text, "memory") == (
        "0.82 MB a rank: weights 0.27 MB + gradients 0.27 MB + momentum 0.27 MB; activations come "
        "on top"
    )
    assert line(text, "expected") == "not known before the first steps; `dnt jobs` will tell"


def test_stages(data: Path, tmp_path: Path) -> None:
    """Of 20 steps the last 5 have twice the rows."""
    stages = ["train.stages.large.after_step=15", "train.stages.large.global_batch=16"]
    made = planned(data, tmp_path / "one", *stages)
    text = plan.format_plan(made)
    assert line(text, "steps") == "20 in 2 stages = 12,800 tokens"
    assert line(text, "stage") == (
        "large, steps 16 to 20: 16 rows of 64 tokens = 2 ranks x 2 micro-batches x 4 rows"
    )
    assert replace(made, units_per_s=100.0).seconds == 128
    assert replace(made, units_per_s=1.0, done=15).seconds == 5 * 16 * 64


def test_auto_says_which_micro_batch_is_expected(data: Path, tmp_path: Path) -> None:
    """Eight rows, or what `dnt plan` takes on a GPU that is known; a stage's own is no guess."""
    stages = ["train.stages.late.after_step=15", "train.stages.late.micro_batch=2"]
    given = ["train.micro_batch=auto", "train.global_batch=32", *stages]
    text = plan.format_plan(planned(data, tmp_path / "one", *given))
    whole = "32 rows of 64 tokens = 2 ranks x "
    assert line(text, "batch") == f"{whole}2 micro-batches x 8 rows (expected)"
    assert line(text, "stage") == f"late, steps 16 to 20: {whole}8 micro-batches x 2 rows"


@pytest.mark.parametrize("batch", [2, 4, 6, 10, 14, 22])
@pytest.mark.parametrize("micro", [1, 2, 3, 8])
def test_the_split_of_the_batch_adds_up(batch: int, micro: int, data: Path, tmp_path: Path) -> None:
    made = planned(
        data, tmp_path / "one", f"train.global_batch={batch}", f"train.micro_batch={micro}"
    )
    found = line(plan.format_plan(made), "batch").partition(" = ")[2]
    product = (
        re.sub(r" ?(ranks?|micro-batch(es)?|rows?)", "", found)
        .replace("of", "x")
        .replace("and one x", "+")
    )
    assert eval(product.replace("x", "*")) == batch


def test_gpus_offload_and_notes(data: Path, tmp_path: Path) -> None:
    overrides = [
        "engine=zero2",
        "engine.offload_optimizer=true",
        "train.dtype=bf16",
        "optim=adamw",
        "run.device=auto",
    ]
    shape = [
        "cluster.gpus_per_node=8",
        "cluster.ranks_per_node=8",
        "cluster.mem_gb=0",
        "train.global_batch=64",
        "cluster.cpus_per_rank=4",
    ]
    made = replace(
        planned(data, tmp_path / "one", *overrides, *shape, nodes=(H100,)),
        notes=("one thing", "another"),
    )
    text = plan.format_plan(made)
    assert (
        "2 nodes x 8 ranks = 16 ranks; a node: 8 nvidia_h100_80gb_hbm3 GPUs, 32 CPUs, all memory"
        in line(text, "cluster")
    )
    said = line(text, "memory")
    assert re.match(
        r"\S+ MB a rank: weights \S+ MB \+ bf16 weights \S+ MB \+ gradients \S+ MB \+ moments", said
    )
    assert "in the host's memory" in said
    assert re.findall(r"^note +(.*)$", text, re.MULTILINE) == ["one thing", "another"]


def test_a_mixture_names_its_sets(data: Path, tmp_path: Path) -> None:
    mixture = [
        f"data.mixture.{name}={{path: {data}, weight: {weight}}}"
        for name, weight in (("a", 3), ("b", 1))
    ]
    text = plan.format_plan(
        planned(data, tmp_path / "one", "data=mixture", "data.path=null", *mixture)
    )
    assert re.search(r"^data +a \(75\.0% of the tokens\)", text, re.MULTILINE)
    assert re.search(r"^data +b \(25\.0% of the tokens\)", text, re.MULTILINE)
    assert "0.13 epochs of a, 0.04 epochs of b" in line(text, "steps")


# --- its numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optim", [["optim=msgdw"], ["optim=msgdw", "optim.momentum_dtype=bf16"], ["optim=adamw"]]
)
def test_bytes_of_a_checkpoint(optim: list[str], data: Path, tmp_path: Path) -> None:
    expected = {"optim=adamw": 12, "optim.momentum_dtype=bf16": 6}.get(optim[-1], 8)
    run, _ = asked(data, tmp_path / "one", *optim)
    assert checkpoint_bytes(run) == expected * plan.parameters_of(run.model)


def test_bytes_of_a_real_checkpoint(trained: Path) -> None:
    run = config.from_yaml(trained / "config.yaml")
    for folder in (trained / "checkpoints").glob("step-*"):
        found = sum(file.stat().st_size for file in folder.iterdir())
        assert checkpoint_bytes(run) <= found <= checkpoint_bytes(run) + 40_000  # heads, state.json


@pytest.mark.parametrize(
    ("every", "keep", "keep_every"), [(1, 2, None), (1, 2, 4), (2, 1, 3), (3, 9, None), (0, 2, 4)]
)
def test_no_more_checkpoints_than_planned(
    every: int, keep: int, keep_every: int | None, data: Path, tmp_path: Path
) -> None:
    """What the saver leaves on disk, and the one that it writes before it takes an old one away."""
    steps = 13
    run, _ = asked(data, tmp_path / "one", f"checkpoint.every={every}", f"checkpoint.keep={keep}")
    run = run.model_copy(
        update={"checkpoint": run.checkpoint.model_copy(update={"keep_every": keep_every})}
    )
    most, tensors = 0, some_tensors()
    with process_group.alone() as me:
        saver = Saver(run.checkpoints, me, keep=keep, keep_every=keep_every)
        for step in range(1, steps + 1):
            if step == steps or (every and step % every == 0):
                most = max(most, len(list((tmp_path / "one" / "checkpoints").glob("step-*"))) + 1)
                saver.save(some_state(step), copies(tensors, 0, 1))
                saver.commit(wait=True)
        saver.close()
    planned_for = plan.most_checkpoints(run, steps)
    assert most <= planned_for <= most + (1 if keep_every else 0)


def test_the_pace_of_a_real_run(trained: Path) -> None:
    run = config.from_yaml(trained / "config.yaml")
    before = plan.read_past_pace(run, TOKENS)
    speeds = [
        row["tokens_per_s"]
        for row in map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
        if "tokens_per_s" in row
    ]
    assert before is not None
    assert (before.steps, before.ranks) == (20, 1)
    assert before.units_per_s == statistics.median(speeds)
    assert before.step_s == pytest.approx(8 * 64 / before.units_per_s)
    assert before.save_s is not None


@pytest.mark.usefixtures("slurm")
def test_a_run_goes_on_from_its_checkpoint_or_is_refused(data: Path, trained: Path) -> None:
    made = checks.check_and_plan(*asked(data, trained, "train.steps=50", "cluster.nodes=1"))
    assert made.done == 20
    assert "goes on from step 20" in line(plan.format_plan(made), "steps")
    with pytest.raises(
        ConfigError, match=r"model\.layers: .* was trained with 2, this run asks for 3"
    ):
        checks.check_and_plan(*asked(data, trained, "model.layers=3"))


def made_up_past(run_dir: Path, steps: int = 200) -> None:
    rows = [
        {
            "step": step,
            "time": 1e9 + step,
            "tokens": 512 * step,
            "tokens_per_s": 1000.0 if step <= 100 else 500.0,
        }
        for step in range(steps)
    ]
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 200, "tok'
    )


def test_the_pace_is_of_the_last_steps_and_their_newest_checkpoint(
    data: Path, tmp_path: Path
) -> None:
    run, _ = asked(data, tmp_path / "one")
    assert plan.read_past_pace(run, TOKENS) is None
    made_up_past(tmp_path / "one")
    assert plan.read_past_pace(run, TOKENS) == PastPace(
        units_per_s=500.0, steps=50, ranks=1, step_s=512 / 500, save_s=None
    )
    state = tmp_path / "one" / "checkpoints" / "step-00000150" / "state.json"
    state.parent.mkdir(parents=True)
    state.touch()
    os.utime(state, (1e9 + 157, 1e9 + 157))
    found = plan.read_past_pace(run, TOKENS)
    assert found and found.save_s == pytest.approx(7.0)
    nodes = partition(replace(PLAIN, address="127.0.0.1"))
    sites = {
        seconds: asked(data, tmp_path / "one", f"cluster.signal_s={seconds}")[1]
        for seconds in (16, 17)
    }
    warned = {
        seconds: list(checks.find_warnings(run, site, load_source(run), nodes))
        for seconds, site in sites.items()
    }
    assert warned[17] == []  # twice a step of 1.024 s and a checkpoint of 7 s is 16.05 s
    assert warned[16] == [
        "cluster.signal_s is 16, less than twice what a step and a checkpoint took in this run "
        "(1.02 s and 7 s): "
        "a job may end before it has saved"
    ]


def test_expected_from_the_past_on_more_ranks(data: Path, tmp_path: Path) -> None:
    made_up_past(tmp_path / "one")
    overrides = [
        "cluster.nodes=4",
        "train.steps=100000",
        "cluster.time=1:00:00",
        "cluster.signal_s=600",
    ]
    made = planned(data, tmp_path / "one", *overrides)
    assert made.units_per_s == 500.0 * 4
    made = replace(made, done=200)
    assert made.seconds == 99_800 * 512 / 2000
    assert line(plan.format_plan(made), "expected") == (
        "7.1 h of training in 9 jobs, at 2,000 tokens/s: the median of the run's last 50 steps on "
        "1 rank, times 4/1"
    )


def test_expected_on_a_gpu_that_is_known_is_an_assumption_and_says_so(
    data: Path, tmp_path: Path
) -> None:
    shape = [
        "cluster.gpus_per_node=8",
        "cluster.ranks_per_node=null",
        "train.global_batch=64",
        "run.device=auto",
        "train.dtype=bf16",
    ]
    made = planned(data, tmp_path / "one", *shape, nodes=(H100,))
    most = 16 * 1e12 * load_hardware("h100").bf16_tflops / flops_per_token(made.run.model, 64)
    assert made.units_per_s is not None and 0 < made.units_per_s < most
    assert re.search(
        r"assumes a roofline and \d+% MFU of NVIDIA H100, which is not measured; see `dnt plan`$",
        line(plan.format_plan(made), "expected"),
    )
    assert re.search(
        r"; \S+ MB of 78.00 GB at a step's peak \(derived\)$",
        line(plan.format_plan(made), "memory"),
    )
    for change, nodes in (
        ("run.device=cpu", (H100,)),
        ("train.dtype=fp32", (H100,)),
        ("train.steps=20", (PLAIN,)),
    ):
        assert planned(data, tmp_path / "one", *shape, change, nodes=nodes).units_per_s is None


def test_a_run_that_does_not_fit_its_gpus_is_told_of(data: Path, tmp_path: Path) -> None:
    shape = ["cluster.gpus_per_node=1", "train.global_batch=64", "run.device=auto"]
    large = ["model.width=12288", "model.heads=96", "model.layers=6", "engine=ddp"]
    made = planned(
        data, tmp_path / "one", *shape, *large, "train.dtype=bf16", "optim=adamw", nodes=(H100,)
    )
    said = line(plan.format_plan(made), "memory")
    assert re.search(r"peak \(derived\), which does not fit; nearest that does: \S+", said)


def test_devices_by_slurms_types() -> None:
    names = {
        "h100": "NVIDIA H100",
        "nvidia_h100_80gb_hbm3": "NVIDIA H100",
        "h100_pcie": "NVIDIA H100 PCIe",
        "A100-SXM4-80GB": "NVIDIA A100",
        "l40s": "NVIDIA L40S",
        "gh100": None,
        "": None,
    }
    found = {name: hardware_of(name) for name in names}
    assert {name: known and known.name for name, known in found.items()} == names
    assert plan.type_of_gpu([H100, PLAIN]) == H100.gpu
    assert plan.type_of_gpu([H100, replace(H100, gpu="a100")]) == plan.type_of_gpu([PLAIN]) == ""


def test_jobs_and_words_for_numbers() -> None:
    site = read_cluster(["cluster=sandbox", "cluster.time=1:00:00", "cluster.signal_s=600"])[0]
    assert [plan.jobs_needed(seconds, site) for seconds in (1, 3000, 3001, 30_000)] == [1, 1, 2, 10]
    assert [duration(s) for s in (40, 600, 3600, 86400, 5 * 86400)] == [
        "40 s",
        "10 min",
        "1 h",
        "24 h",
        "5 days",
    ]
    assert [megabytes(n) for n in (10_000, 1_500_000, 2 * 10**9, 3 * 10**12)] == [
        "0.01 MB",
        "1.50 MB",
        "2.00 GB",
        "3.00 TB",
    ]
