"""How ranks meet: processes with torchrun's variables, with srun's, and with wrong ones."""

import os
import signal
import socket
import time
from datetime import timedelta

import pytest

from dnt_scale.cli.main import main
from dnt_scale.distributed import process_group, rendezvous
from dnt_scale.distributed.agree import highest
from dnt_scale.distributed.process_group import environment
from testbed.ports import free_port
from testbed.run import Ranks, tiny

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STEP = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_ID": "77",
}
HOST = socket.gethostname()


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in list(os.environ):
        if name in VARIABLES or name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


def meet(absent: tuple[str, ...] = ()) -> None:
    """Meet, or say why not and go."""
    for name in absent:
        del os.environ[name]
    rendezvous.SAY_S = 0.5
    try:
        me = process_group.start("cpu")
        print("met", me.rank, me.world_size, highest(me.rank)[0])
        process_group.stop()
    except (ValueError, KeyboardInterrupt) as error:
        print(type(error).__name__, error)


class Process(Ranks):
    """One process with these variables."""

    def __init__(self, **env: object) -> None:
        absent = tuple(name for name in VARIABLES if name not in env and name != "LOCAL_RANK")
        super().__init__(meet, (absent,), 1, {name: str(value) for name, value in env.items()})

    def says(self, text: str) -> bool:
        """Wait until it has said something; whether it is that."""
        while not (said := self.read(0, "err")).endswith("\n") and self.running:
            time.sleep(0.02)
        assert said.startswith(text), said
        return True

    def end(self) -> str:
        return self.wait(60).ok().out.strip()


def test_who_waits_says_for_whom_and_is_joined_or_interrupted():
    port = free_port()
    world = {"WORLD_SIZE": 3, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    one = Process(RANK=1, **world)
    assert one.says(
        f"rank 1: waiting for rank 0 of 3 at localhost:{port} (connection refused), up to 30 "
        "minutes; to run alone, `unset RANK WORLD_SIZE`\n"
    )
    zero = Process(RANK=0, **world)
    assert zero.says(
        f"waiting for rank 2 of 3 at localhost:{port}, up to 30 minutes; to run alone, `unset RANK "
        "WORLD_S"
    )
    assert Process(RANK=2, **{**world, "WORLD_SIZE": 4}).end() == (
        f"ValueError WORLD_SIZE is 4 on rank 2, but 3 on rank 0 ({HOST}); start every rank with "
        "the same one"
    )
    assert Process(RANK=1, **world).end() == (
        f"ValueError rank 1 is here already, as process {one.processes[0].pid} on {HOST}; give "
        "every process a RANK of its own, or end them all and start them again"
    )
    one.kill(signal.SIGINT)  # as a person does who sees a mistake in its command
    assert one.end() == "KeyboardInterrupt"
    killed = Process(RANK=1, **world)
    time.sleep(1.0)
    killed.kill()
    assert killed.wait().code == -signal.SIGKILL
    others = [Process(RANK=1, **world), Process(RANK=2, **world)]
    assert [rank.end() for rank in (zero, *others)] == ["met 0 3 2", "met 1 3 2", "met 2 3 2"]


@pytest.mark.parametrize(
    ("env", "world"),
    [
        (
            STEP,
            ", up to 30 minutes; started in a shell of srun? to run alone, `unset "
            "SLURM_STEP_NUM_TASKS`\n",
        ),
        (
            {**STEP, "RANK": 0, "WORLD_SIZE": 4, "MASTER_ADDR": "localhost", "MASTER_PORT": 20077},
            ", up to 30 minutes; to run alone, `unset RANK WORLD_SIZE SLURM_STEP_NUM_TASKS`\n",
        ),
    ],
)
def test_the_advice_to_run_alone_helps(env, world):
    waiting = Process(**env)
    assert waiting.says("waiting for ranks 1, 2 and 3 of 4 at localhost:20077" + world)
    waiting.kill(signal.SIGINT)
    assert waiting.end() == "KeyboardInterrupt"
    unset = world.partition("`unset ")[2].removesuffix("`\n").split()
    assert (
        Process(**{name: value for name, value in env.items() if name not in unset}).end()
        == "met 0 1 0"
    )


def test_nobody_comes(monkeypatch):
    """A port without a rank 0, one of another program, a name that is none."""
    monkeypatch.setattr(rendezvous, "CONNECT_S", 0.2)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        for host, port, seconds, why in (
            ("127.0.0.1", free_port(), 0.3, "Connection refused"),
            (
                "no-such-host.invalid",
                1234,
                0.3,
                "MASTER_ADDR no-such-host.invalid is no name that is known here",
            ),
            ("127.0.0.1", taken, 5.0, "what answers there is another program"),
        ):
            monkeypatch.setenv("MASTER_ADDR", host)
            monkeypatch.setenv("MASTER_PORT", str(port))
            with pytest.raises(rendezvous.NotMet, match=f"(?i){why}"):
                rendezvous.meet(1, 2, timedelta(seconds=seconds))


@pytest.mark.parametrize(
    ("env", "complaint"),
    [
        (
            {"RANK": "one", "WORLD_SIZE": "2"},
            "RANK is 'one', expected a whole number, 0 or more; to run alone, `unset",
        ),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1', expected"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK is '', expected"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is '0', expected a whole number, 1 or more"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, expected 0 to 1, for WORLD_SIZE is 2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        (
            {"RANK": "1"},
            "RANK is '1', but WORLD_SIZE is not set; set both, or to run alone, `unset RANK`",
        ),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is '2', but RANK is not set"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS is 'many'"),
        (
            {"SLURM_STEP_NUM_TASKS": "4"},
            "SLURM_PROCID is not set, as it is in every task that srun starts; to run al",
        ),
        (
            {**STEP, "SLURM_PROCID": "4"},
            "SLURM_PROCID is 4, expected 0 to 3, for SLURM_STEP_NUM_TASKS is 4",
        ),
    ],
)
def test_wrong_variables_are_named(monkeypatch, env, complaint):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:
        environment()
    assert str(error.value).startswith(complaint), error.value


@pytest.mark.parametrize(
    "env", [{}, {"RANK": "0"}, {"WORLD_SIZE": "1"}, {"SLURM_STEP_NUM_TASKS": "1"}]
)
def test_what_says_alone_is_alone(monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert environment() == (0, 0, 1)


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        (
            {},
            "MASTER_ADDR is not set: it takes the address and a free port of rank 0's machine; to "
            "run alone, `unset",
        ),
        ({"MASTER_ADDR": "localhost"}, "MASTER_PORT is not set"),
        (
            {"MASTER_ADDR": "localhost", "MASTER_PORT": "70000"},
            "MASTER_PORT is '70000', expected a number from 1 to",
        ),
    ],
)
def test_a_place_to_meet_is_needed(monkeypatch, variables, complaint):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:
        rendezvous.address()
    assert str(error.value).startswith(complaint), error.value


@pytest.mark.parametrize(
    "env", [STEP, {"RANK": "3", "WORLD_SIZE": "4"}, {"RANK": "x", "MASTER_PORT": "y"}]
)
def test_one_process_joins_no_ranks(monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with process_group.alone() as me:
        assert (me.rank, me.world_size) == (0, 1)


def test_training_with_wrong_variables_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "no")
    monkeypatch.setenv("RANK", "0")
    assert main(["train", *tiny(tmp_path, tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("error: WORLD_SIZE is 'no', expected a whole number")
    assert not (tmp_path / "run").exists()
