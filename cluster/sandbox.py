"""``dnt sandbox``: a real SLURM on this machine, to try jobs on. sandbox.sh beside this file does
the work."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("sandbox.sh")
MOST_NODES, MOST_CPUS, MOST_GPUS = 64, 4096, 64


def up(
    nodes: int = 3,
    cpus: int = 8,
    gpus: int = 8,
    accounting: bool = True,
    preempt_signal: bool = True,
) -> int:
    """Start it, or change what runs to these options; what is right already stays as it is. Jobs
    live on.

    Args:
        nodes: node1 to nodeN.
        cpus: of each node, whatever the machine has.
        gpus: of each node; stand-ins, which SLURM hands out as it would real ones.
        accounting: with slurmdbd and MariaDB, so that sacct works.
        preempt_signal: a preempted job first gets the signal that it asked for.

    Returns:
        The exit status, after a line on stderr where it is not 0: 1 something failed, 2 this
        machine is not fit for it.

    Raises:
        ValueError: a number out of range, or not root.
    """
    for name, value, least, most in (
        ("nodes", nodes, 1, MOST_NODES),
        ("cpus", cpus, 1, MOST_CPUS),
        ("gpus", gpus, 0, MOST_GPUS),
    ):
        if not least <= value <= most:
            raise ValueError(f"--{name}: found {value}, expected {least} to {most}")
    return _run_as_root("up", nodes, cpus, gpus, int(accounting), int(preempt_signal))


def down(wipe: bool = False) -> int:
    """Cancel its jobs and stop it; ``wipe`` also removes its files and configuration. Returns and
    raises as `up`."""
    return _run_as_root("down", int(wipe))


def status() -> int:
    """Print what runs. Returns 0 where the sandbox runs, 1 where not, 2 where there is another
    SLURM."""
    return _run("status")


def kill_node(node: str) -> int:
    """Lose a node: SIGKILL to all its processes at once. Returns and raises as `up`."""
    return _run_as_root("kill-node", node)


def start_node(node: str) -> int:
    """Bring a lost node back. Returns and raises as `up`."""
    return _run_as_root("start-node", node)


def _run_as_root(command: str, *arguments: object) -> int:
    if os.geteuid() != 0:
        dnt = shutil.which(sys.argv[0]) or "dnt"
        raise ValueError(
            f"dnt sandbox {command} starts and stops daemons: run it as root, sudo {dnt} sandbox "
            f"{command}"
        )
    return _run(command, *arguments)


def _run(command: str, *arguments: object) -> int:
    return subprocess.run(["bash", SCRIPT, command, *map(str, arguments)]).returncode
