"""Whether ranks that hold the same part of a tensor hold the same bits."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dnt_scale.checkpoint.tensor_shards import TensorShard
from dnt_scale.distributed.errors import AgreedFault
from dnt_scale.distributed.process_group import Ranks


def check_replicas(
    ranks: Ranks, shards: Sequence[TensorShard], scalars: Mapping[str, float]
) -> None:
    """That ranks which hold the same shards hold the same bits in them, and all ranks the same
    scalars. A collective.

    Args:
        shards: ``Engine.shards()``; each rank sums up its own, on its device, in one pass.
        scalars: ``Engine.scalars()``.

    Raises:
        AgreedFault: on every rank; names the ranks that differ from the rest, and the first tensor
            that does.
    """
    sums = checksums([shard.data for shard in shards])
    places = repr([(shard.name, shard.offset, tuple(shard.data.shape)) for shard in shards])
    mine = (_digest(places), _digest(repr(sums)), sorted(scalars.items()))
    found: list[tuple[str, str, list[tuple[str, float]]]] = [mine] * ranks.world_size
    dist.all_gather_object(found, mine)
    for rank, (_, _, other) in enumerate(found):
        if repr(other) != repr(found[0][2]):
            raise AgreedFault(
                f"rank {rank} counts {dict(other)}, but rank 0 {dict(found[0][2])}; {_PARTED}"
            )
    holders: dict[str, list[int]] = {}
    for rank, (key, _, _) in enumerate(found):
        holders.setdefault(key, []).append(rank)
    apart = [
        held_by for held_by in holders.values() if len({found[rank][1] for rank in held_by}) > 1
    ]
    if not apart:
        return
    every: list[list[int]] = [sums] * ranks.world_size
    dist.all_gather_object(every, sums)
    names: list[list[str]] = [[]] * ranks.world_size
    dist.all_gather_object(names, [shard.name for shard in shards])
    held_by = apart[0]
    first = next(
        index
        for index in range(len(every[held_by[0]]))
        if len({every[rank][index] for rank in held_by}) > 1
    )
    values = [every[rank][first] for rank in held_by]
    usual = max(values, key=values.count)
    odd, rest = (
        [rank for rank in held_by if (every[rank][first] == usual) is same]
        for same in (False, True)
    )
    raise AgreedFault(
        f"{in_words(odd)} {'has' if len(odd) == 1 else 'have'} other bits in "
        f"{names[held_by[0]][first]} than "
        f"{in_words(rest)}, which should hold the same; {_PARTED}"
    )


_PARTED = (
    "the ranks have parted, which a failing device or a fault of the code does: leave that node "
    "out, and run again to go on from the newest checkpoint"
)


def in_words(some: Sequence[int]) -> str:
    """Ranks by their numbers: "rank 2", "ranks 0, 1 and 3"."""
    *most, last = some
    return f"ranks {', '.join(map(str, most))} and {last}" if most else f"rank {last}"


CHUNK = 1 << 22  # elements that are summed up at once: their int64 copies take 64 MB


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Of each tensor's bits: sum of (2 i + 1) times element i as an integer, modulo 2^64; made on
    the tensor's device.

    The factors are odd, so that no change of one element leaves the sum as it was; neither does an
    exchange of two.
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
