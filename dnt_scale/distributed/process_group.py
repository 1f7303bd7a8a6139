"""The ranks of a run: who am I, and how many are we.

A plain process is a world of one. torchrun's variables (RANK, WORLD_SIZE, ...) and srun's
(SLURM_PROCID, ...) are both understood; nothing else of SLURM is known here.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from dnt_scale.distributed import rendezvous
from dnt_scale.distributed.errors import Fault


@dataclass(frozen=True)
class Ranks:
    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


World = tuple[int, int, int]  # rank, local rank, world size
ALONE: World = (0, 0, 1)


def start(
    device: Literal["auto", "cpu", "cuda"] = "auto", hang_s: float = 0.0, world: World | None = None
) -> Ranks:
    """Join the process group (gloo on CPU; nccl for CUDA tensors) and choose this rank's device.

    Args:
        hang_s: the watchdog's; collectives wait for twice as long at least, so that a hang is for
            the watchdog to end.
        world: default what ``environment`` says.

    Raises:
        ValueError: CUDA was asked for and there is none, there are more ranks on this node than
            GPUs, or the variables of the ranks are wrong.
        Fault: the ranks could not meet.
    """
    rank, local_rank, world_size = world or environment()
    # of one among several, a dead GPU is its node's
    trouble = ValueError if world_size == 1 else Fault
    if device == "cuda" and not torch.cuda.is_available():
        raise trouble(
            "run.device is cuda, but torch sees no GPU; use run.device=cpu or a CUDA build of torch"
        )
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        gpus = torch.cuda.device_count()
        # a scheduler that binds one GPU a task shows each task only its own
        gpu = 0 if gpus == 1 else local_rank
        if gpu >= gpus:
            raise trouble(
                f"local rank {local_rank} has no GPU: this node shows {gpus}; "
                "start one rank a GPU, or use run.device=cpu"
            )
        torch.cuda.set_device(gpu)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    timeout = max(timedelta(minutes=30), timedelta(seconds=2 * hang_s))
    try:
        if world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        else:
            store = rendezvous.meet(rank, world_size, timeout)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=timeout
            )
    except (rendezvous.NotMet, dist.DistError, RuntimeError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise Fault(
            f"rank {rank} could not meet the other {world_size - 1} at MASTER_ADDR:MASTER_PORT "
            f"{where} "
            f"({str(error).splitlines()[0]}); is that address this job's first node, and the port "
            "free?"
        ) from None
    return Ranks(
        rank, local_rank, world_size, torch.device("cuda", gpu) if cuda else torch.device("cpu")
    )


@contextmanager
def alone() -> Iterator[Ranks]:
    """A world of this one process, on its GPU where there is one, for the length of a block.

    Whatever the environment says: a shell of srun has the variables of a step whose other tasks do
    nothing.
    """
    try:
        yield start(world=ALONE)
    finally:
        stop()


def environment() -> World:
    """(rank, local rank, world size) from torchrun, else from an srun step, else (0, 0, 1).

    Under srun, MASTER_ADDR and MASTER_PORT are set from the step's first node and the job id unless
    given. To be asked before an engine is built: DeepSpeed's takes LOCAL_RANK for the device's
    number, see ``zero.join``.

    Raises:
        ValueError: variables that are no such numbers, or some without the others; names the
            variable.
    """
    env = os.environ
    if "WORLD_SIZE" in env and "RANK" in env:
        return checked_world("RANK", "WORLD_SIZE", "LOCAL_RANK" if "LOCAL_RANK" in env else None)
    # only an srun step has SLURM_STEP_NUM_TASKS: a batch script that runs python directly is one
    # process
    if "SLURM_STEP_NUM_TASKS" in env and whole("SLURM_STEP_NUM_TASKS", 1) > 1:
        world = checked_world("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = first_host(needed("SLURM_STEP_NODELIST"))
        env.setdefault("MASTER_PORT", str(20000 + whole("SLURM_JOB_ID") % 40000))
        return world
    for name, other, harmless in (("RANK", "WORLD_SIZE", "0"), ("WORLD_SIZE", "RANK", "1")):
        if env.get(name, harmless) != harmless:
            raise ValueError(
                f"{name} is {env[name]!r}, but {other} is not set; set both, or "
                f"{rendezvous.alone()}"
            )
    return ALONE


def checked_world(rank: str, size: str, local: str | None) -> World:
    """The values of these variables. Raises ValueError where they do not fit together."""
    world_size, number = whole(size, 1), whole(rank)
    if number >= world_size:
        raise ValueError(
            f"{rank} is {number}, expected 0 to {world_size - 1}, for {size} is {world_size}"
        )
    return number, whole(local) if local else 0, world_size


def whole(name: str, least: int = 0) -> int:
    """A variable's value. Raises ValueError where it is no whole number from ``least`` on."""
    value = needed(name)
    if not (value.isascii() and value.isdigit() and int(value) >= least):
        raise ValueError(
            f"{name} is {value!r}, expected a whole number, {least} or more; {rendezvous.alone()}"
        )
    return int(value)


def needed(name: str) -> str:
    if name not in os.environ:
        raise ValueError(
            f"{name} is not set, as it is in every task that srun starts; {rendezvous.alone()}"
        )
    return os.environ[name]


def first_host(nodelist: str) -> str:
    """The first name of a SLURM node list: ``gpu[03-05,9],cpu1`` gives ``gpu03``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodelist)
    if match is None:
        raise ValueError(
            f"SLURM_STEP_NODELIST is {nodelist!r}, not a node list; set MASTER_ADDR yourself"
        )
    return "".join(part or "" for part in match.groups())


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
