import errno
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dnt_scale.checkpoint import replicas
from dnt_scale.checkpoint.replicas import check_replicas, checksums
from dnt_scale.checkpoint.tensor_shards import TensorShard
from dnt_scale.distributed import process_group
from dnt_scale.distributed.agree import check_settings, highest, on_first, together
from dnt_scale.distributed.errors import AgreedError, AgreedFault, is_fault
from dnt_scale.distributed.process_group import environment, first_host
from testbed.run import call

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STEP = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "4123456",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in list(os.environ):
        if name in RANK_VARIABLES or name.startswith("SLURM_"):
            monkeypatch.delenv(name)


def set_all(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("gpu[3,07]", "gpu3"),
        ("rack[1-2]-ib", "rack1-ib"),
        ("a-1.cluster.example", "a-1.cluster.example"),
        ("cpu1,gpu[03-05]", "cpu1"),
    ],
)
def test_first_host(nodelist, first):
    assert first_host(nodelist) == first


def test_an_empty_node_list_is_an_error():
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST is ''"):
        first_host("")


def test_a_plain_process_is_a_world_of_one():
    assert environment() == (0, 0, 1)


def test_torchrun(monkeypatch):
    set_all(monkeypatch, RANK="3", LOCAL_RANK="1", WORLD_SIZE="4", MASTER_ADDR="h", MASTER_PORT="1")
    assert environment() == (3, 1, 4)


def test_torchrun_inside_a_step_counts_before_slurm(monkeypatch):
    set_all(
        monkeypatch, **STEP, SLURM_STEP_NODELIST="n[1-2]", RANK="3", LOCAL_RANK="1", WORLD_SIZE="4"
    )
    assert environment() == (3, 1, 4)


def test_srun_step(monkeypatch):
    import os

    set_all(monkeypatch, **STEP, SLURM_STEP_NODELIST="gpu[11-12]")
    assert environment() == (5, 1, 8)
    assert os.environ["MASTER_ADDR"] == "gpu11"
    assert 1024 < int(os.environ["MASTER_PORT"]) < 65536


def test_srun_step_keeps_a_given_address(monkeypatch):
    import os

    set_all(
        monkeypatch,
        **STEP,
        SLURM_STEP_NODELIST="gpu[11-12]",
        MASTER_ADDR="10.0.0.1",
        MASTER_PORT="29500",
    )
    assert environment() == (5, 1, 8)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "29500")


def test_a_batch_script_without_srun_is_one_process(monkeypatch):
    set_all(
        monkeypatch, SLURM_JOB_ID="4123456", SLURM_NTASKS="8", SLURM_PROCID="0", SLURM_LOCALID="0"
    )
    assert environment() == (0, 0, 1)


def test_ranks_that_cannot_meet_say_where(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        group = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "dnt_scale.train",
                "run.name=a",
                f"data.path={tmp_path}",
                "run.device=cpu",
            ],
            env={**os.environ, **group},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and errors[0].startswith("error: rank 0 could not meet the other 1"), (
        done.stderr
    )
    assert f"127.0.0.1:{port}" in errors[0] and "Traceback" not in done.stderr


def numbers_of_each() -> None:
    me = process_group.start("cpu")
    assert highest(me.rank, 7 - me.rank, -5) == (2, 7, -5)
    assert highest(me.rank == 1) == (1,)
    process_group.stop()


def test_the_highest_of_several_values():
    call(numbers_of_each, ranks=3).ok()


def explained(number: int) -> None:
    try:
        raise OSError(number, os.strerror(number))
    except OSError:
        raise ValueError("nothing can be written") from None


def failing_disk() -> None:
    me = process_group.start("cpu")

    def read(number: int) -> None:
        if me.rank == me.world_size - 1 or number == errno.EACCES:
            raise OSError(number, os.strerror(number), "shard-000001.tar")

    with pytest.raises(AgreedFault, match=r"^rank 1: .*Stale file handle: 'shard-000001.tar'$"):
        together(me, lambda: read(errno.ESTALE))
    with pytest.raises(AgreedFault, match=r"^nothing can be written$"):
        on_first(me, lambda: explained(errno.EIO))
    with pytest.raises(AgreedError, match="Permission denied") as refused:
        on_first(me, lambda: read(errno.EACCES))
    assert not is_fault(refused.value)
    process_group.stop()


def test_a_disk_that_fails_is_worth_another_try_and_one_that_refuses_is_not():
    call(failing_disk, ranks=2).ok()


def longest_wait(hang_s: float, expected: float) -> None:
    process_group.start("cpu", hang_s)
    options = dist.group.WORLD._get_backend(torch.device("cpu")).options
    assert options._timeout.total_seconds() == expected
    highest(1)
    process_group.stop()


@pytest.mark.parametrize(("hang_s", "expected"), [(600.0, 1800), (4000.0, 8000), (1e9, 2e9)])
def test_collectives_wait_for_longer_than_the_watchdog(hang_s: float, expected: float) -> None:
    call(longest_wait, hang_s, expected, ranks=2).ok()


def unequal_settings() -> None:
    me = process_group.start("cpu")
    mine = {"optim.lr": 0.1, "train.steps": 10}
    check_settings(me, mine)
    with pytest.raises(
        AgreedError, match=r"^optim.lr is 0.2 on rank 2, but 0.1 on rank 0; start every rank with"
    ):
        check_settings(me, {**mine, "optim.lr": 0.2} if me.rank == 2 else mine)
    with pytest.raises(AgreedError, match=r"^optim.nesterov is True on rank 1, but None on rank 0"):
        check_settings(me, {**mine, "optim.nesterov": True} if me.rank == 1 else mine)
    if me.rank == 1:
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    with pytest.raises(
        AgreedError,
        match=r"^the variable NVIDIA_TF32_OVERRIDE is 0 on rank 1, but not set on rank 0",
    ):
        check_settings(me, mine)
    process_group.stop()


def test_unequal_settings_are_refused_on_every_rank():
    call(unequal_settings, ranks=3).ok()


def shards_of(me: process_group.Ranks) -> list[TensorShard]:
    """A weight that ranks 0 and 2 hold the first half of and 1 and 3 the other, and a buffer of
    all.
    """
    half = me.rank % 2
    weight = torch.arange(6.0).view(2, 3) + half
    buffer = torch.full((4,), 0.5, dtype=torch.bfloat16)
    return [
        TensorShard("model.w", (4, 3), (2 * half, 0), weight),
        TensorShard("momentum_buffer.b", (4,), (0,), buffer),
    ]


def parted_replicas() -> None:
    me = process_group.start("cpu")
    counts = {"step": 5.0, "previous_norm": float("nan")}
    check_replicas(me, shards_of(me), counts)

    shards = shards_of(me)
    if me.rank == 3:
        shards[0].data[1, 2] = -shards[0].data[1, 2]
        shards[1].data[0] = 0
    with pytest.raises(
        AgreedFault, match=r"^rank [13] has other bits in model.w than rank [13], which should hold"
    ):
        check_replicas(me, shards, counts)

    everyone = shards_of(me)[1:]
    check_replicas(me, everyone, counts)
    if me.rank == 1:
        everyone[0].data[3] = 0.50390625  # the next bf16 number
    with pytest.raises(
        AgreedFault,
        match=r"^rank 1 has other bits in momentum_buffer.b than ranks 0, 2 and 3, which",
    ):
        check_replicas(me, everyone, counts)

    with pytest.raises(
        AgreedFault, match=r"^rank 2 counts \{'previous_norm': nan, 'step': 6.0\}, but rank 0 "
    ):
        check_replicas(me, shards_of(me), {**counts, "step": 6.0} if me.rank == 2 else counts)
    process_group.stop()


def test_ranks_that_hold_the_same_must_agree_to_the_bit():
    call(parted_replicas, ranks=4).ok()


@given(st.lists(st.floats(width=32), min_size=2, max_size=20), st.data())
def test_a_checksum_sees_any_change_and_any_exchange(values, data):
    one = torch.tensor(values)
    bits = one.view(torch.int32)
    place, other = data.draw(st.permutations(range(len(values))))[:2]
    changed, swapped = bits.clone(), bits.clone()
    changed[place] ^= 1 << data.draw(st.integers(0, 30))
    swapped[[place, other]] = swapped[[other, place]]
    (before,), (after,) = checksums([one]), checksums([changed.view(torch.float32)])
    assert before != after
    assert (checksums([swapped.view(torch.float32)]) == [before]) == (
        bits[place].item() == bits[other].item()
    )


def test_a_checksum_does_not_depend_on_its_chunks(monkeypatch):
    tensors = [
        torch.randn(5, 7, generator=torch.Generator().manual_seed(1)),
        torch.zeros(0),
        torch.ones(3)[1:2],
    ]
    whole = checksums(tensors)
    monkeypatch.setattr(replicas, "CHUNK", 4)
    assert checksums(tensors) == whole
    assert checksums([]) == []
