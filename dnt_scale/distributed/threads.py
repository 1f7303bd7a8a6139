"""How many threads torch takes on a rank."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from dnt_scale.distributed import host
from dnt_scale.distributed.process_group import Ranks

OPENMP, MKL = "OMP_NUM_THREADS", "MKL_NUM_THREADS"


def share_cpus(ranks: Ranks) -> None:
    """Divide CPUs between the ranks of a machine that may use the same ones, for torch's threads
    and for ``host.cpus_of_a_rank``. A collective.

    Torch by itself takes all of them on each rank, and torchrun has it take one. A number that
    somebody chose stays.
    """
    mine = host.host(), host.cpus()
    everyone = [mine] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(everyone, mine)
    host.sharing = everyone.count(mine)
    if ranks.world_size > 1 and not chosen():
        torch.set_num_threads(max(1, host.cores() // host.sharing))


def chosen() -> bool:
    """Whether somebody chose the number of threads."""
    return MKL in os.environ or (OPENMP in os.environ and not _torchruns())


def _torchruns() -> bool:
    """Whether the number is torchrun's, which is 1 where it was started without any.

    What a process was started with Linux tells; where nothing can be told the number is somebody's.
    """
    if os.environ[OPENMP] != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        began_with = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(began_with) and not any(
        each.startswith(f"{OPENMP}=".encode()) for each in began_with
    )
