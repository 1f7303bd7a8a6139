"""`dnt sandbox`: what it starts, what it leaves alone, and nodes that are lost. All of it on the
real SLURM."""

import os
import shutil
import sys
from pathlib import Path

import psutil
import pytest

from testbed.run import Finished, python
from tests.helpers.slurm import (
    BASE,
    LEFT_OUT,
    command,
    free,
    kill_node,
    no_accounting,
    start_node,
    state,
    submit,
    wait_for,
    wait_state,
)

pytestmark = pytest.mark.slow

DNT = [sys.executable, "-m", "dnt_scale.cli", "sandbox"]
# a machine of its own for a command: no SLURM's files, ports or processes, and a network card in
# name
ALONE = """
import fcntl, os, socket, struct, subprocess, sys
for folder in ("/run", "/var/lib", "/etc/slurm"):
    subprocess.run(["mount", "-t", "tmpfs", "dnt", folder], check=True)
open("/run/hosts", "w").write("127.0.0.1 localhost\\n127.0.1.1 laptop\\n")
subprocess.run(["mount", "--bind", "/run/hosts", "/etc/hosts"], check=True)
socket.sethostname("laptop")
card = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
# without a card "localhost" is not looked up
for name, address in ((b"lo", "127.0.0.1"), (b"lo:1", "198.51.100.1")):
    ip = socket.inet_aton(address)
    fcntl.ioctl(card, 0x8916, struct.pack("16sH2x4s8x", name, socket.AF_INET, ip))  # SIOCSIFADDR
    fcntl.ioctl(card, 0x8914, struct.pack("16sH22x", name, 1))  # SIOCSIFFLAGS: up
sys.exit(subprocess.run(["bash", "-ec", sys.argv[1]]).returncode)
"""
pytest_plugins = ["pytester"]
on_slurm = pytest.mark.usefixtures("slurm")
COMMANDS = [["up"], ["down", "--wipe"], ["status"], ["kill-node", "node1"], ["start-node", "node1"]]


def dnt_sandbox(*arguments: str, env: dict[str, str] | None = None) -> Finished:
    return python("-m", "dnt_scale.cli", "sandbox", *arguments, env=env)


def runs(pid: int) -> bool:
    """Whether there is such a process, and not only its zombie, which a container may keep."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def daemons() -> dict[str, int]:
    return {file.stem: int(file.read_text()) for file in (BASE / "run").glob("*.pid")}


@on_slurm
def test_status_says_what_runs() -> None:
    shown = dnt_sandbox("status").ok().out
    for words in (
        "accounting: on",
        "node3",
        "gpu:8",
        "short",
        "2:00:00",
        "srun --nodes=2 hostname",
    ):
        assert words in shown


@on_slurm
def test_up_again_changes_nothing() -> None:
    before = daemons()
    assert {"slurmctld", "slurmdbd", "mariadbd", "node1", "node2", "node3"} <= set(before)
    dnt_sandbox("up").ok()
    assert daemons() == before


@on_slurm
def test_it_listens_on_this_machine_only() -> None:
    ports = [
        end.laddr
        for pid in daemons().values()
        for end in psutil.Process(pid).net_connections("inet")
        if end.status == psutil.CONN_LISTEN
    ]
    assert len(ports) >= 5  # slurmctld, slurmdbd and three slurmd
    assert {end.ip for end in ports} == {"127.0.0.1"}


@on_slurm
def test_a_job_has_two_nodes_with_their_names_and_gpus() -> None:
    line = 'echo "$(hostname) $CUDA_VISIBLE_DEVICES"'
    done = command(
        "srun", "--nodes=2", "--nodelist=node[1-2]", "--gpus-per-node=2", "bash", "-c", line
    ).ok()
    hosts = dict(row.split() for row in done.out.splitlines())
    assert set(hosts) == {"node1", "node2"}
    assert all(len(gpus.split(",")) == 2 for gpus in hosts.values())


@on_slurm
def test_a_node_is_lost_and_comes_back(tmp_path: Path) -> None:
    script = (
        f"srun bash -c 'echo $$ > {tmp_path}/$(hostname).part; mv {tmp_path}/$(hostname).part "
        f"{tmp_path}/$(hostname)"
    )
    job = submit(
        f"{script}; sleep 600'",
        "--partition=low",
        "--nodes=2",
        "--nodelist=node[2-3]",
        "--no-requeue",
    )
    try:
        files = wait_for(
            lambda: len(files := sorted(tmp_path.glob("node?"))) == 2 and files,
            "both ranks to start",
        )
        on_node2, on_node3 = (int(file.read_text()) for file in files)
        others = {name: pid for name, pid in daemons().items() if name != "node3"}
        kill_node("node3")
        assert not runs(daemons()["node3"])
        assert not runs(on_node3) and runs(on_node2)
        assert {name: pid for name, pid in daemons().items() if name != "node3"} == others
        assert all(runs(pid) for pid in others.values())
    finally:
        start_node("node3")
        free(job)
    assert command("srun", "--nodelist=node3", "hostname").ok().out.split() == ["node3"]


@on_slurm
def test_accounting_is_switched_off_and_on_under_a_running_job() -> None:
    job = submit("sleep 600")
    try:
        wait_state(job, "RUNNING")
        with no_accounting():
            assert (
                "accounting storage is disabled"
                in (sacct := command("sacct", "-j", job)).out + sacct.err
            )
            assert state(job) == "RUNNING"
        wait_for(
            lambda: "RUNNING" in command("sacct", "-n", "-X", "-j", job, "-o", "State").out,
            "sacct to know the job",
        )
        assert state(job) == "RUNNING"
    finally:
        free(job)


@on_slurm
@pytest.mark.parametrize("node", ["node4", "localhost"])
def test_no_such_node(node: str) -> None:
    assert (
        f"{node}: no such node; there are node1 node2 node3"
        in dnt_sandbox("kill-node", node).error()
    )


def test_numbers_out_of_range() -> None:
    error = dnt_sandbox("up", "--nodes", "0").error()
    assert error.startswith("error: --nodes: found 0, expected a whole number from 1 to 64; ")


@on_slurm
@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda words: words[0])
def test_another_slurm_is_left_alone(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").write_text("ClusterName=production\nSlurmctldHost=head\n")
    before = daemons()
    bind = f'mount --bind {tmp_path} /etc/slurm && exec "$@"'
    error = command("unshare", "--mount", "sh", "-c", bind, "sh", *DNT, *arguments).error()
    assert error.startswith(
        "error: /etc/slurm/slurm.conf is of another SLURM; dnt sandbox only touches its own"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["slurm.conf"]
    assert (tmp_path / "slurm.conf").read_text() == "ClusterName=production\nSlurmctldHost=head\n"
    assert daemons() == before
    assert all(runs(pid) for pid in before.values())


@on_slurm
def test_a_slurm_that_the_environment_names_is_left_alone() -> None:
    error = dnt_sandbox("up", env={"SLURM_CONF": "/srv/slurm/slurm.conf"}).error()
    assert error.startswith("error: SLURM_CONF=/srv/slurm/slurm.conf is of another SLURM")


@on_slurm
def test_daemons_of_another_slurm_are_left_alone(tmp_path: Path) -> None:
    shutil.copy(shutil.which("sleep") or "", tmp_path / "slurmd")
    other = psutil.Popen([tmp_path / "slurmd", "600"], cwd=tmp_path)
    try:
        assert (
            f"error: slurmd (process {other.pid}) is of another SLURM"
            in dnt_sandbox("down").error()
        )
    finally:
        other.kill()
        other.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to become another user")
@pytest.mark.parametrize(
    "arguments", [words for words in COMMANDS if words != ["status"]], ids=lambda words: words[0]
)
def test_only_root_may(arguments: list[str]) -> None:
    # imported while it may read the files
    imports = "import os, sys; from cluster import sandbox; from dnt_scale.cli import main as cli"
    code = (
        f"{imports}; cli.parser(); os.setuid(65534); sys.exit(cli.main({['sandbox', *arguments]}))"
    )
    error = python("-c", code).error()
    assert f"dnt sandbox {arguments[0]} starts and stops daemons: run it as root, sudo " in error


@on_slurm
def test_on_a_machine_of_its_own_it_comes_goes_and_leaves_nothing() -> None:
    dnt = " ".join(DNT)
    script = f"""
        if {dnt} status; then exit 3; fi
        {dnt} up --nodes 2 --cpus 4 --gpus 0 --no-accounting
        srun --nodes=2 hostname | sort | tr '\\n' ' '
        {dnt} up --nodes 1 --cpus 4 --gpus 1 --no-accounting --no-preempt-signal
        sinfo --noheader --Node --partition=main --format='%N %c %G'
        sbatch --wrap 'sleep 600' --output=/dev/null
        {dnt} down --wipe
        ls -A /etc/slurm; cat /etc/hosts
        test ! -e /var/lib/dnt-sandbox; ps -eo stat=,comm= | awk '$1 !~ /^Z/ && /slurm|munge|sleep/'
    """
    alone = [
        "unshare",
        "--mount",
        "--net",
        "--pid",
        "--uts",
        "--fork",
        "--mount-proc",
        "--kill-child",
    ]
    done = command(*alone, sys.executable, "-c", ALONE, script)
    assert done.out.splitlines() == [
        "not running; start it with: dnt sandbox up",
        "node1 node2 node1 4 gpu:1",  # srun's answer, then sinfo's
        "Submitted batch job 2",
        "127.0.0.1 localhost",
        "127.0.1.1 laptop",
    ], done


@pytest.mark.skipif(os.geteuid() != 0, reason="any other user is told to be root")
def test_left_out_tests_are_counted_out_loud(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", "/srv/slurm/slurm.conf")
    imports = (
        "from tests.conftest import pytest_terminal_summary; from tests.cluster.conftest import "
        "slurm"
    )
    pytester.makeconftest(imports)
    pytester.makepyfile("def test_one(slurm): ...\ndef test_two(slurm): ...\ndef test_other(): ...")
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(passed=1, skipped=2)
    said = [line for line in result.outlines if LEFT_OUT in line]
    assert len(said) == 1
    assert said[0].startswith(
        "2 SLURM tests left out: SLURM_CONF=/srv/slurm/slurm.conf is of another SLURM"
    )
