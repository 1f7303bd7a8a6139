import os
import socket
import subprocess
import sys

import pytest

from dnt_scale.ranks import environment, first_host

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STEP = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "4123456"}


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
    set_all(monkeypatch, **STEP, SLURM_STEP_NODELIST="n[1-2]", RANK="3", LOCAL_RANK="1", WORLD_SIZE="4")
    assert environment() == (3, 1, 4)


def test_srun_step(monkeypatch):
    import os

    set_all(monkeypatch, **STEP, SLURM_STEP_NODELIST="gpu[11-12]")
    assert environment() == (5, 1, 8)
    assert os.environ["MASTER_ADDR"] == "gpu11"
    assert 1024 < int(os.environ["MASTER_PORT"]) < 65536


def test_srun_step_keeps_a_given_address(monkeypatch):
    import os

    set_all(monkeypatch, **STEP, SLURM_STEP_NODELIST="gpu[11-12]", MASTER_ADDR="10.0.0.1", MASTER_PORT="29500")
    assert environment() == (5, 1, 8)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "29500")


def test_a_batch_script_without_srun_is_one_process(monkeypatch):
    set_all(monkeypatch, SLURM_JOB_ID="4123456", SLURM_NTASKS="8", SLURM_PROCID="0", SLURM_LOCALID="0")
    assert environment() == (0, 0, 1)


def test_ranks_that_cannot_meet_say_where(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = subprocess.run(
            [sys.executable, "-m", "dnt_scale.train", "run.name=a", f"data.path={tmp_path}", "run.device=cpu"],
            env={**os.environ, **group},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and errors[0].startswith("error: rank 0 could not meet the other 1"), done.stderr
    assert f"127.0.0.1:{port}" in errors[0] and "Traceback" not in done.stderr
