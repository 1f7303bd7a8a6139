"""Threads of ranks: real ranks, on a machine of made-up CPUs."""

import os
import subprocess
import sys

import pytest
import torch

from dnt_scale.distributed import host, process_group, threads
from testbed.run import call

SHARED, OWN, PART = frozenset(range(100, 109)), frozenset(range(200, 205)), frozenset({200})
MASKS = (SHARED, OWN, SHARED, PART)  # of each rank


def run_shares() -> None:
    me = process_group.start("cpu")
    mask = MASKS[me.rank]
    host.cpus = lambda: mask  # type: ignore[assignment]
    threads.share_cpus(me)  # testbed's ranks have a number that is chosen
    assert torch.get_num_threads() == 1
    del os.environ[threads.OPENMP]
    threads.share_cpus(me)
    assert host.sharing == [2, 1, 2, 1][me.rank]
    assert host.cpus_of_a_rank() == torch.get_num_threads() == [4, 5, 4, 1][me.rank]
    host.host = lambda: f"node{me.rank}"  # the same numbers on another machine are other CPUs
    threads.share_cpus(me)
    assert torch.get_num_threads() == [9, 5, 9, 1][me.rank]
    os.environ[threads.MKL] = "3"
    host.cpus = lambda: PART  # type: ignore[assignment]
    threads.share_cpus(me)
    assert torch.get_num_threads() == [9, 5, 9, 1][me.rank]
    process_group.stop()


def test_ranks_share_the_cpus_that_several_may_use() -> None:
    call(run_shares, ranks=4).ok()


def test_hardware_threads_of_a_core_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = {0: "0,2\n", 1: "1,3\n", 2: "0,2\n", 3: "1,3\n"}
    monkeypatch.setattr(
        host.Path, "read_text", lambda self: siblings[int(self.parts[5].removeprefix("cpu"))]
    )
    for mask, cores in (({0, 1, 2, 3}, 2), ({0, 2}, 1), ({0, 3}, 2)):
        monkeypatch.setattr(host, "cpus", lambda mask=mask: frozenset(mask))
        assert host.cores() == cores


RANK = """
import sys
import torch
from dnt_scale.distributed import host, process_group, threads
host.cpus = lambda: frozenset(range(1000, 1006))
threads.share_cpus(process_group.start("cpu"))
sys.stdout.write(f"threads {torch.get_num_threads()}\\n")  # in one go: two ranks write
process_group.stop()
"""


@pytest.mark.parametrize(("given", "expected"), [(None, 3), ("1", 1), ("2", 2)])
def test_under_torchrun_only_a_number_that_somebody_chose_stays(tmp_path, given, expected) -> None:
    """It tells its ranks to take one thread each where it was told nothing."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    env = {name: value for name, value in os.environ.items() if name != threads.OPENMP}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    finished = subprocess.run(
        [*launcher, "--nproc-per-node=2", str(script)],
        env=env | ({threads.OPENMP: given} if given else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout.splitlines() == [f"threads {expected}"] * 2
