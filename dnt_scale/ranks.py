"""The ranks of a run: who am I, how many are we, and what we agree on.

A plain process is a world of one. torchrun's variables (RANK, WORLD_SIZE, ...) and srun's (SLURM_PROCID, ...)
are both understood; nothing else of SLURM is known here.
"""

import errno
import hashlib
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dnt_scale import meeting

if TYPE_CHECKING:  # the checkpoint package imports this module
    from dnt_scale.checkpoint.boxes import Box

T = TypeVar("T")


class AgreedError(ValueError):
    """A fault that every rank raises, with the same message: rank 0's report is enough."""


class Fault(ValueError):
    """Nothing that the user has to mend in the run: another try, perhaps on other nodes, may go well."""


class AgreedFault(Fault, AgreedError):
    """A fault that every rank raises with the same message."""


# what a disk or a file server says that fails, not one that is asked for what it cannot do
FAILING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENODEV, errno.EREMOTEIO}


def is_fault(error: BaseException) -> bool:
    """Whether another try may go well without anybody mending anything in the run; what it was raised from counts."""
    if isinstance(error, Fault) or (isinstance(error, OSError) and error.errno in FAILING):
        return True
    behind = error.__cause__ or error.__context__
    return behind is not None and is_fault(behind)


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


def start(device: Literal["auto", "cpu", "cuda"] = "auto", hang_s: float = 0.0, world: World | None = None) -> Ranks:
    """Join the process group (gloo on CPU; nccl for CUDA tensors) and choose this rank's device.

    Args:
        hang_s: the watchdog's; collectives wait for twice as long at least, so that a hang is for the watchdog to end.
        world: default what ``environment`` says.

    Raises:
        ValueError: CUDA was asked for and there is none, there are more ranks on this node than GPUs, or the variables
            of the ranks are wrong.
        Fault: the ranks could not meet.
    """
    rank, local_rank, world_size = world or environment()
    trouble = ValueError if world_size == 1 else Fault  # of one among several, a dead GPU is its node's
    if device == "cuda" and not torch.cuda.is_available():
        raise trouble("run.device is cuda, but torch sees no GPU; use run.device=cpu or a CUDA build of torch")
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        gpus = torch.cuda.device_count()
        gpu = 0 if gpus == 1 else local_rank  # a scheduler that binds one GPU a task shows each task only its own
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
            store = meeting.meet(rank, world_size, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (meeting.NotMet, dist.DistError, RuntimeError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise Fault(
            f"rank {rank} could not meet the other {world_size - 1} at MASTER_ADDR:MASTER_PORT {where} "
            f"({str(error).splitlines()[0]}); is that address this job's first node, and the port free?"
        ) from None
    return Ranks(rank, local_rank, world_size, torch.device("cuda", gpu) if cuda else torch.device("cpu"))


@contextmanager
def alone() -> Iterator[Ranks]:
    """A world of this one process, on its GPU where there is one, for the length of a block.

    Whatever the environment says: a shell of srun has the variables of a step whose other tasks do nothing.
    """
    try:
        yield start(world=ALONE)
    finally:
        stop()


def environment() -> World:
    """(rank, local rank, world size) from torchrun, else from an srun step, else (0, 0, 1).

    Under srun, MASTER_ADDR and MASTER_PORT are set from the step's first node and the job id unless given.
    To be asked before an engine is built: DeepSpeed's takes LOCAL_RANK for the device's number, see ``zero.join``.

    Raises:
        ValueError: variables that are no such numbers, or some without the others; names the variable.
    """
    env = os.environ
    if "WORLD_SIZE" in env and "RANK" in env:
        return checked_world("RANK", "WORLD_SIZE", "LOCAL_RANK" if "LOCAL_RANK" in env else None)
    # only an srun step has SLURM_STEP_NUM_TASKS: a batch script that runs python directly is one process
    if "SLURM_STEP_NUM_TASKS" in env and whole("SLURM_STEP_NUM_TASKS", 1) > 1:
        world = checked_world("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = first_host(needed("SLURM_STEP_NODELIST"))
        env.setdefault("MASTER_PORT", str(20000 + whole("SLURM_JOB_ID") % 40000))
        return world
    for name, other, harmless in (("RANK", "WORLD_SIZE", "0"), ("WORLD_SIZE", "RANK", "1")):
        if env.get(name, harmless) != harmless:
            raise ValueError(f"{name} is {env[name]!r}, but {other} is not set; set both, or {meeting.alone()}")
    return ALONE


def checked_world(rank: str, size: str, local: str | None) -> World:
    """The values of these variables. Raises ValueError where they do not fit together."""
    world_size, number = whole(size, 1), whole(rank)
    if number >= world_size:
        raise ValueError(f"{rank} is {number}, expected 0 to {world_size - 1}, for {size} is {world_size}")
    return number, whole(local) if local else 0, world_size


def whole(name: str, least: int = 0) -> int:
    """A variable's value. Raises ValueError where it is no whole number from ``least`` on."""
    value = needed(name)
    if not (value.isascii() and value.isdigit() and int(value) >= least):
        raise ValueError(f"{name} is {value!r}, expected a whole number, {least} or more; {meeting.alone()}")
    return int(value)


def needed(name: str) -> str:
    if name not in os.environ:
        raise ValueError(f"{name} is not set, as it is in every task that srun starts; {meeting.alone()}")
    return os.environ[name]


def first_host(nodelist: str) -> str:
    """The first name of a SLURM node list: ``gpu[03-05,9],cpu1`` gives ``gpu03``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodelist)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST is {nodelist!r}, not a node list; set MASTER_ADDR yourself")
    return "".join(part or "" for part in match.groups())


def highest(*values: int) -> tuple[int, ...]:
    """The largest of all ranks' values, each by itself, on every rank. A collective: all ranks call it together."""
    tensor = torch.tensor(values)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tuple(tensor.tolist())


def on_first(me: Ranks, action: Callable[[], T]) -> T:
    """What ``action`` returns on rank 0, on every rank. A collective; the result travels pickled between our ranks.

    Raises:
        AgreedError: on every rank, when it raised ValueError or OSError; AgreedFault for one that :func:`is_fault`.
    """
    outcome: list[T | AgreedError | None] = [None, None]
    if me.first:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as error:
            outcome[1] = agreed(error)
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[1], AgreedError):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


def together(me: Ranks, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank and give each its own result. A collective, so ``action`` must not hold one.

    Raises:
        AgreedError: on every rank, when any raised ValueError or OSError, with the first such message; AgreedFault for
            one that :func:`is_fault`.
    """
    result, failure = None, None
    try:
        result = action()
    except (ValueError, OSError) as error:
        failure = agreed(error, "" if me.first else f"rank {me.rank}: ")
    failures: list[AgreedError | None] = [None] * me.world_size
    dist.all_gather_object(failures, failure)
    for found in failures:
        if found is not None:
            raise found
    return result  # type: ignore[return-value]


def agreed(error: Exception, speaker: str = "") -> AgreedError:
    """The error as all ranks are going to raise it."""
    return (AgreedFault if is_fault(error) else AgreedError)(f"{speaker}{error}")


# what changes a GPU's arithmetic, or which code runs
NUMERIC_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "DS_ACCELERATOR",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def check_settings(me: Ranks, settings: Mapping[str, object]) -> None:
    """That every rank has the settings, the code, the libraries and the environment that rank 0 has. A collective.

    Args:
        settings: ``config.flat(run)``.

    Raises:
        AgreedError: on every rank, as ``same_everywhere``.
    """
    same_everywhere(me, {**settings, **surroundings(me)})


def surroundings(me: Ranks) -> dict[str, object]:
    """What beside the configuration a run's numbers depend on: code, versions, environment."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("deepspeed", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        **{f"the version of {name}": version for name, version in versions.items()},
        "the device": me.device.type,
        "the code of dnt_scale": code.hexdigest()[:12],
        **{f"the variable {name}": os.environ.get(name, "not set") for name in NUMERIC_VARIABLES},
    }


def same_everywhere(me: Ranks, what: Mapping[str, object]) -> None:
    """That ``what``, names to plain values, is on every rank as on rank 0. A collective.

    Raises:
        AgreedError: on every rank; names the first rank and field that differ, and both values.
    """
    expected = on_first(me, lambda: dict(what))
    difference = next(
        (name for name in sorted({*what, *expected}) if what.get(name) != expected.get(name)),
        None,
    )
    found: list[tuple[str, object] | None] = [None] * me.world_size
    dist.all_gather_object(found, None if difference is None else (difference, what.get(difference)))
    for rank, other in enumerate(found):
        if other is not None:
            name, value = other
            raise AgreedError(
                f"{name} is {value} on rank {rank}, but {expected.get(name)} on rank 0; "
                "start every rank with the same command, in the same environment, from the same code"
            )


def check_replicas(me: Ranks, boxes: "Sequence[Box]", scalars: Mapping[str, float]) -> None:
    """That ranks which hold the same boxes hold the same bits in them, and all ranks the same scalars. A collective.

    Args:
        boxes: ``Engine.boxes()``; each rank sums up its own, on its device, in one pass over them.
        scalars: ``Engine.scalars()``.

    Raises:
        AgreedFault: on every rank; names the ranks that differ from the rest, and the first tensor that does.
    """
    sums = checksums([box.data for box in boxes])
    places = repr([(box.name, box.offset, tuple(box.data.shape)) for box in boxes])
    mine = (_digest(places), _digest(repr(sums)), sorted(scalars.items()))
    found: list[tuple[str, str, list[tuple[str, float]]]] = [mine] * me.world_size
    dist.all_gather_object(found, mine)
    for rank, (_, _, other) in enumerate(found):
        if repr(other) != repr(found[0][2]):
            raise AgreedFault(f"rank {rank} counts {dict(other)}, but rank 0 {dict(found[0][2])}; {_PARTED}")
    holders: dict[str, list[int]] = {}
    for rank, (key, _, _) in enumerate(found):
        holders.setdefault(key, []).append(rank)
    apart = [held_by for held_by in holders.values() if len({found[rank][1] for rank in held_by}) > 1]
    if not apart:
        return
    every: list[list[int]] = [sums] * me.world_size
    dist.all_gather_object(every, sums)
    names: list[list[str]] = [[]] * me.world_size
    dist.all_gather_object(names, [box.name for box in boxes])
    held_by = apart[0]
    first = next(index for index in range(len(every[held_by[0]])) if len({every[rank][index] for rank in held_by}) > 1)
    values = [every[rank][first] for rank in held_by]
    usual = max(values, key=values.count)
    odd, rest = ([rank for rank in held_by if (every[rank][first] == usual) is same] for same in (False, True))
    raise AgreedFault(
        f"{in_words(odd)} {'has' if len(odd) == 1 else 'have'} other bits in {names[held_by[0]][first]} than "
        f"{in_words(rest)}, which should hold the same; {_PARTED}"
    )


_PARTED = (
    "the ranks have parted, which a failing device or a fault of the code does: leave that node out, "
    "and run again to go on from the newest checkpoint"
)


def in_words(some: Sequence[int]) -> str:
    """Ranks by their numbers: "rank 2", "ranks 0, 1 and 3"."""
    *most, last = some
    return f"ranks {', '.join(map(str, most))} and {last}" if most else f"rank {last}"


CHUNK = 1 << 22  # elements that are summed up at once: their int64 copies take 64 MB


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Of each tensor's bits: sum of (2 i + 1) times element i as an integer, modulo 2^64; made on the tensor's device.

    The factors are odd, so that no change of one element leaves the sum as it was; neither does an exchange of two.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = []
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(-1).view(integers[tensor.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=tensor.device)
        for start in range(0, bits.numel(), CHUNK):
            chunk = bits[start : start + CHUNK]
            places = torch.arange(start, start + chunk.numel(), device=tensor.device)
            total += places.mul_(2).add_(1).mul_(chunk).sum()
        sums.append(total)
    # one transfer, though an engine that offloads holds tensors on both devices
    return torch.stack([total.to(sums[0].device) for total in sums]).tolist() if sums else []


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank ended, rather than for a fault of this one."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "peer has left")
    return any(sign in str(error) for sign in signs)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
