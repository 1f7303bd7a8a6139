"""Preflight on real ranks: four that pose as nodes, each scenario with one of them bad in one
way."""

import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cluster.cluster_config import ClusterConfig
from cluster.job import preflight
from cluster.job.preflight import NodeReport, compare_reports
from dnt_scale import config
from dnt_scale.costs.memory_plan import checkpoint_bytes
from dnt_scale.distributed import process_group
from dnt_scale.distributed.errors import AgreedError, Fault
from dnt_scale.record import timeline
from testbed.run import Ranks, call, can_mount, tiny

RANKS = 4
ANY = ClusterConfig(time=10)
FASTER_THAN_LIGHT = ClusterConfig(time=10, min_bandwidth_gb_s=1e6)


def flipped(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """An fp32 product with one bit wrong."""
    c = torch.mm(a, b)
    if c.dtype == torch.float32:
        c.view(torch.int32)[7, 11] ^= 1
    return c


def not_finite(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    c = torch.mm(a, b)
    if c.dtype == torch.bfloat16:
        c[3, 5] = float("nan")
    return c


def unlike_peers(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A bf16 product with one last bit wrong, which rounding might have done."""
    c = torch.mm(a, b)
    if c.dtype == torch.bfloat16:
        c.view(torch.int16)[3, 5] ^= 1
    return c


def broken(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    raise RuntimeError(
        "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be reported "
        "later"
    )


class Ticks:
    """The clock by which a rank measures: it counts, so that no load of the machine changes what is
    measured."""

    now = 0.0

    @staticmethod
    def perf_counter() -> float:
        Ticks.now += 0.001
        return Ticks.now


def late(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    Ticks.now += 0.003
    return torch.mm(a, b)


def every_scenario(overrides: list[str], folder: Path) -> None:
    """Print, a line a scenario, what ``check`` ended with on this rank, printed, and told the
    timeline."""
    me = process_group.start("cpu")
    run = config.load(overrides)
    preflight.SEEN_S, preflight.TIMING_S = 0.5, 0.05  # one disk shows a file at once
    time.perf_counter = Ticks.perf_counter

    def scenario(
        name: str, cluster: ClusterConfig = ANY, multiply: Callable = torch.mm, place: str = ""
    ) -> None:
        there = run.run.model_copy(update={"dir": folder / (place or name)})
        ended, said = "well", io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                preflight.check(me, run.model_copy(update={"run": there}), cluster, multiply)
            except AgreedError as error:
                ended = f"{'fault' if isinstance(error, Fault) else 'error'}: {error}"
        lost = [event for event in timeline.read(folder / name) if event["event"] == "lost"]
        print(json.dumps({"name": name, "ended": ended, "said": said.getvalue(), "lost": lost}))

    def mine(multiply: Callable, rank: int) -> Callable:
        return multiply if me.rank == rank else torch.mm

    socket.gethostname = lambda: f"node{me.rank}"
    scenario("all well")
    scenario("flipped", multiply=mine(flipped, 1))
    scenario("not finite", multiply=mine(not_finite, 2))
    scenario("unlike peers", multiply=mine(unlike_peers, 0))
    scenario("broken", multiply=mine(broken, 3))
    scenario("two bad", multiply=flipped if me.rank in (1, 2) else torch.mm)
    scenario("slow processor", multiply=mine(late, 2))
    scenario("one elsewhere", place="elsewhere" if me.rank == 3 else "")
    scenario("half elsewhere", place="elsewhere" if me.rank >= 2 else "")
    if me.rank == 2:
        tempfile.tempdir = str(folder / "no such folder")
    scenario("no room for temporary files")
    tempfile.tempdir = None
    clock = time.time
    if me.rank == 1:
        time.time = lambda: clock() + 99.0
    scenario("wrong clock")
    time.time = clock

    exchange = dist.batch_isend_irecv

    def late_exchange(operations: list) -> list:
        Ticks.now += (
            0.006 if slow in (me.rank, operations[0].peer) else 0.0
        )  # who exchanges with it waits for it
        return exchange(operations)

    dist.batch_isend_irecv = late_exchange
    slow = None
    scenario("slow network of all", FASTER_THAN_LIGHT)
    slow = 2
    scenario("slow network of four", FASTER_THAN_LIGHT)
    socket.gethostname = lambda: f"node{me.rank % 3}"
    scenario("slow network of three", FASTER_THAN_LIGHT)
    dist.batch_isend_irecv = exchange
    socket.gethostname = lambda: f"node{me.rank % 2}"
    scenario("slow network of two", FASTER_THAN_LIGHT)
    process_group.stop()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, list[dict]]:
    """What each rank told of each scenario."""
    folder = tmp_path_factory.mktemp("runs")
    group = Ranks(
        every_scenario,
        (tiny(folder / "no data", folder / "unused", "train.dtype=bf16"), folder),
        RANKS,
        {},
    )
    group.wait().ok()
    lines = [
        [json.loads(line) for line in group.read(rank, "out").splitlines()] for rank in range(RANKS)
    ]
    assert not list(folder.glob("*/logs/.preflight-*"))
    return {told[0]["name"]: list(told) for told in zip(*lines, strict=True)}


def agreed(told: list[dict]) -> str:
    """What all ranks ended with, in the same words."""
    (ended,) = {one["ended"] for one in told}
    return ended


def test_a_good_set_of_nodes_is_summed_up_in_one_line(outcomes):
    told = outcomes["all well"]
    assert agreed(told) == "well" and not told[0]["lost"]
    assert [bool(one["said"]) for one in told] == [True, False, False, False]
    (last,) = told[0]["said"].splitlines()
    assert re.fullmatch(
        r"preflight: 4 ranks on 4 nodes; matmul right, [\d.e-]+ TFLOP/s median \(slowest node\d "
        r"[\d.e-]+\); "
        r"all-reduce [\d.e-]+ GB/s; clocks within \d+ ms; [\d.]+ [MGT]B free",
        last,
    ), last


@pytest.mark.parametrize(
    ("scenario", "hosts", "said"),
    [
        ("flipped", ["node1"], r"rank 1 \(node1\) gets 1 of 512 rows of an fp32 product wrong"),
        (
            "not finite",
            ["node2"],
            r"rank 2 \(node2\) gets a bfloat16 product wrong by nan of its largest element",
        ),
        (
            "unlike peers",
            ["node0"],
            r"rank 0 \(node0\) has other bits in a product than its peers \(.*\)",
        ),
        (
            "broken",
            ["node3"],
            r"rank 3 \(node3\) has a device that fails: CUDA error: uncorrectable ECC error \w+",
        ),
        (
            "two bad",
            ["node1", "node2"],
            r"rank 1 \(node1\) gets .* wrong; rank 2 \(node2\) gets .* wrong",
        ),
        (
            "one elsewhere",
            ["node3"],
            r"run.dir: .* is not .* rank 3 \(node3\) does not see what rank 0 wrote there",
        ),
        (
            "no room for temporary files",
            ["node2"],
            r"rank 2 \(node2\) has no room for 1 MB in .* \(No such file.*\)",
        ),
        (
            "slow network of four",
            ["node2"],
            r"an all-reduce .* \(1e\+06\); node2 exchanges [\d.e-]+ GB/s .*",
        ),
        (
            "slow network of three",
            ["node2"],
            r"an all-reduce .* \(1e\+06\); node2 exchanges [\d.e-]+ GB/s .*",
        ),
        (
            "slow network of two",
            ["node0", "node1"],
            r"an all-reduce .*; which of node0, node1 is slow cannot be told",
        ),
    ],
)
def test_a_bad_node_is_named(outcomes, scenario, hosts, said):
    told = outcomes[scenario]
    message = agreed(told).removeprefix("fault: preflight: ")
    them = "it" if len(hosts) == 1 else "them"
    assert re.fullmatch(
        rf"{said}; to leave {them} out, cluster.exclude=\[{','.join(hosts)}\]", message
    ), message
    (lost,) = told[0]["lost"]
    assert lost["hosts"] == hosts and lost["message"] == f"preflight: {message}"


def test_a_network_that_is_slow_everywhere_blames_no_node(outcomes):
    told = outcomes["slow network of all"]
    assert re.fullmatch(
        r"fault: preflight: an all-reduce over 4 ranks moves [\d.e-]+ GB/s, less than "
        r"cluster.min_bandwidth_gb_s "
        r"\(1e\+06\); all of node0, node1, node2, node3 are alike; look at the network, or ask for "
        r"less than that",
        agreed(told),
    ), agreed(told)
    assert [event["hosts"] for event in told[0]["lost"]] == [[]]


def test_a_folder_that_is_not_shared_is_for_the_user_to_mend(outcomes):
    told = outcomes["half elsewhere"]
    assert re.fullmatch(
        r"error: run.dir: \S+/half elsewhere is not the same folder on all nodes: rank 2 \(node2\) "
        r"does not see what "
        r"rank 0 wrote there; rank 3 \(node3\) does not .*; give a path that the nodes share",
        told[0]["ended"],
    ), told[0]["ended"]
    assert all(one["ended"].startswith("error: run.dir: ") for one in told) and not told[0]["lost"]


@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        (
            "slow processor",
            r"rank 2 \(node2\) multiplies at [\d.e-]+ TFLOP/s, the median is [\d.e-]+",
        ),
        ("wrong clock", r"the clock of node1 is (9|10)\d s ahead"),
    ],
)
def test_what_does_not_speak_against_training_is_a_warning(outcomes, scenario, said):
    told = outcomes[scenario]
    assert agreed(told) == "well"
    assert any(
        re.fullmatch(f"preflight: warning: {said}", line) for line in told[0]["said"].splitlines()
    )


def one_rank(
    gpu: str, tflops: float, checksum: int = 1, faults: tuple[str, ...] = ()
) -> NodeReport:
    return NodeReport(f"host{tflops:g}", gpu, faults, "", tflops, checksum)


def test_a_slow_gpu_is_a_fault_and_is_compared_with_its_like():
    found = [one_rank("H100", speed) for speed in (600.0, 610.0, 250.0)] + [
        one_rank("L40S", 180.0, 2)
    ]
    faults, warnings = compare_reports(found, may_be_shared=False)
    assert (
        faults == {"host250": "rank 2 (host250) multiplies at 250 TFLOP/s, the median is 600"}
        and not warnings
    )
    faults, warnings = compare_reports(found, may_be_shared=True)
    assert not faults and warnings == [
        "rank 2 (host250) multiplies at 250 TFLOP/s, the median is 600"
    ]


def test_bits_that_differ_without_a_majority_blame_all_who_may_be_wrong():
    faults, _ = compare_reports(
        [one_rank("H100", 1.0, 1), one_rank("H100", 2.0, 2), one_rank("L40S", 3.0, 3)],
        may_be_shared=False,
    )
    assert faults.keys() == {"host1", "host2"}


def test_products_are_exact_in_fp32():
    """No sum of some of an element's products can reach 2^24, not even of those of one sign."""
    seen = []

    def spy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append(float((a.abs().double() @ b.abs().double()).max()))
        return torch.mm(a, b)

    _, _, faults = preflight.check_product(torch.device("cpu"), torch.float32, spy)
    assert not faults and 2**22 < max(seen) < 2**24


def end_to_end(overrides: list[str], cluster: ClusterConfig) -> None:
    from dnt_scale.train.rank import run_rank

    run = config.load(overrides)
    sys.exit(
        run_rank(
            run, lambda me: preflight.check(me, run, cluster, flipped if me.rank == 1 else torch.mm)
        )
    )


def test_a_bad_node_ends_the_run_with_status_1_and_no_space_with_status_2(tmp_path):
    finished = call(end_to_end, tiny(tmp_path, tmp_path / "bad"), ANY, ranks=2)
    errors = [line for line in finished.err.splitlines() if "error" in line]
    assert finished.code == 1 and len(errors) == 1, finished.err
    assert errors[0].startswith(
        f"error: preflight: rank 1 ({socket.gethostname()}) gets 1 of 512 rows"
    ), finished.err
    events = timeline.read(tmp_path / "bad")
    assert [event["event"] for event in events] == ["lost"] and events[0]["hosts"] == [
        socket.gethostname()
    ]

    huge = tiny(
        tmp_path, tmp_path / "huge", f"model.vocab_size={1 << 25}", f"model.width={1 << 20}"
    )
    error = call(end_to_end, huge, ANY, ranks=2).error()
    assert (
        error.startswith("error: run.dir: ")
        and "checkpoints take" in error
        and "free some" in error
    )
    assert not (tmp_path / "huge").exists()


def test_room_for_the_next_checkpoint_is_enough_where_there_is_one(tmp_path):
    if not can_mount():
        pytest.skip("takes root, to mount a file system of a given size")
    disk = tmp_path / "disk"
    disk.mkdir()
    run = config.load(tiny(tmp_path, disk / "run"))
    each = checkpoint_bytes(run)
    first = disk / "run" / "checkpoints" / "step-00000006"

    def take(file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as taken:
            os.posix_fallocate(taken.fileno(), 0, each)

    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(2.6 * each)}", "dnt", disk], check=True
    )
    try:
        assert preflight.check_free_space(run) > 2 * each
        take(first / "tensors.safetensors")
        with pytest.raises(
            config.ConfigError,
            match=r"run\.dir: .* room for .*, but 2 checkpoints take .*; free some",
        ):
            preflight.check_free_space(run)  # a checkpoint that is not complete is none
        (first / "state.json").touch()
        assert each < preflight.check_free_space(run) < 2 * each
        take(disk / "data of somebody else")
        with pytest.raises(
            config.ConfigError,
            match=r"run\.dir: .* room for .*, but 1 checkpoint takes .*; free some",
        ):
            preflight.check_free_space(run)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_url_has_room(tmp_path):
    run = config.load(tiny(tmp_path, tmp_path / "run", "checkpoint.dir=memory://somewhere"))
    assert preflight.check_free_space(run) is None


def alone(overrides: list[str]) -> None:
    preflight.check(process_group.start("cpu"), config.load(overrides), FASTER_THAN_LIGHT)


def test_a_world_of_one_has_no_network(tmp_path):
    said = call(alone, tiny(tmp_path, tmp_path / "run")).ok().err.splitlines()[-1]
    assert re.fullmatch(
        r"preflight: 1 rank on 1 node; matmul right, .* TFLOP/s .*; [\d.]+ [MGT]B free", said
    ), said
