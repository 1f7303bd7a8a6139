"""The ranks of a run: who am I, how many are we, and what we agree on.

A plain process is a world of one. torchrun's variables (RANK, WORLD_SIZE, ...) and srun's (SLURM_PROCID, ...)
are both understood; nothing else of SLURM is known here.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class AgreedError(ValueError):
    """A fault that every rank raises, with the same message: rank 0's report is enough."""


@dataclass(frozen=True)
class Ranks:
    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def start(device: Literal["auto", "cpu", "cuda"] = "auto") -> Ranks:
    """Join the process group (gloo on CPU; nccl for CUDA tensors) and choose this rank's device.

    Raises:
        ValueError: CUDA was asked for and there is none, there are more ranks on this node than GPUs, or the ranks
            could not meet.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device is cuda, but torch sees no GPU; use run.device=cpu or a CUDA build of torch")
    cuda = device != "cpu" and torch.cuda.is_available()
    rank, local_rank, world_size = environment()
    if cuda:
        gpus = torch.cuda.device_count()
        gpu = 0 if gpus == 1 else local_rank  # a scheduler that binds one GPU a task shows each task only its own
        if gpu >= gpus:
            raise ValueError(
                f"local rank {local_rank} has no GPU: this node shows {gpus}; "
                "start one rank a GPU, or use run.device=cpu"
            )
        torch.cuda.set_device(gpu)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        if world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        else:
            timeout = timedelta(minutes=30)
            dist.init_process_group(backend, init_method="env://", rank=rank, world_size=world_size, timeout=timeout)
    except (dist.DistError, RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(
            f"rank {rank} could not meet the other {world_size - 1} at MASTER_ADDR:MASTER_PORT {where} "
            f"({str(error).splitlines()[0]}); is that address this job's first node, and the port free?"
        ) from None
    return Ranks(rank, local_rank, world_size, torch.device("cuda", gpu) if cuda else torch.device("cpu"))


@contextmanager
def alone() -> Iterator[Ranks]:
    """A world of this one process, on its GPU where there is one, for the length of a block."""
    try:
        yield start()
    finally:
        stop()


def environment() -> tuple[int, int, int]:
    """(rank, local rank, world size) from torchrun, else from an srun step, else (0, 0, 1).

    Under srun, MASTER_ADDR and MASTER_PORT are set from the step's first node and the job id unless given.
    """
    env = os.environ
    if "WORLD_SIZE" in env and "RANK" in env:
        return int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"])
    # only an srun step has SLURM_STEP_NUM_TASKS: a batch script that runs python directly is one process
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 40000))
        return int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), int(env["SLURM_STEP_NUM_TASKS"])
    return 0, 0, 1


def first_host(nodelist: str) -> str:
    """The first name of a SLURM node list: ``gpu[03-05,9],cpu1`` gives ``gpu03``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodelist)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST is {nodelist!r}, not a node list; set MASTER_ADDR yourself")
    return "".join(part or "" for part in match.groups())


def highest(value: int) -> int:
    """The largest of all ranks' values, on every rank. A collective: all ranks call it together."""
    values = torch.tensor([value])
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return int(values.item())


def on_first(me: Ranks, action: Callable[[], T]) -> T:
    """What ``action`` returns on rank 0, on every rank. A collective; the result travels pickled between our ranks.

    Raises:
        AgreedError: on every rank, when it raised ValueError or OSError.
    """
    outcome: list[T | str | None] = [None, None]
    if me.first:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise AgreedError(outcome[1])
    return outcome[0]  # type: ignore[return-value]


def together(me: Ranks, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank and give each its own result. A collective, so ``action`` must not hold one.

    Raises:
        AgreedError: on every rank, when any raised ValueError or OSError, with the first such message.
    """
    result, failure = None, None
    try:
        result = action()
    except (ValueError, OSError) as error:
        failure = str(error)
    failures: list[str | None] = [None] * me.world_size
    dist.all_gather_object(failures, failure)
    for rank, message in enumerate(failures):
        if message is not None:
            raise AgreedError(message if rank == 0 else f"rank {rank}: {message}")
    return result  # type: ignore[return-value]


def lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank ended, rather than for a fault of this one."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "peer has left")
    return any(sign in str(error) for sign in signs)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
