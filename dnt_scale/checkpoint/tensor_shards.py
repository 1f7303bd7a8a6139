"""Shards: what a rank holds of a tensor, whoever sharded it.

Every engine describes its weights and optimizer buffers as rectangular parts of the whole tensors.
FSDP2's rows are one shard each; a run of a flattened tensor, as ZeRO partitions are, is at most
three shards of a matrix.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

SMALL = 1 << 16  # bytes that are not worth sharing out
WEIGHT, AVERAGE = "model.", "ema."  # what names of weights and of their averages begin with


class Region(NamedTuple):
    """A rectangular part of a tensor: where it begins and its extent, one number a dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorShard:
    """A part of the tensor ``name`` that this rank holds.

    ``data`` is a view of the engine's own storage, of the whole tensor's number of dimensions:
    writing into it changes what the engine holds. ``replicas`` ranks hold an equal shard, of which
    this is number ``replica``.
    """

    name: str  # model.NAME, ema.NAME, or BUFFER.NAME: momentum_buffer; exp_avg, exp_avg_sq
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]  # where data begins in it
    data: Tensor
    replica: int = 0
    replicas: int = 1

    @property
    def region(self) -> Region:
        return Region(self.offset, tuple(self.data.shape))


def shard_to_write(shard: TensorShard) -> TensorShard | None:
    """What of ``shard`` this replica writes, so that all replicas together write each element
    once.
    """
    rows = shard.data.shape[0] if shard.data.dim() else 1
    if shard.replicas == 1 or rows < shard.replicas or shard.data.nbytes <= SMALL:
        return shard if shard.replica == 0 and shard.data.numel() else None
    first, last = (rows * number // shard.replicas for number in (shard.replica, shard.replica + 1))
    return replace(
        shard, offset=(shard.offset[0] + first, *shard.offset[1:]), data=shard.data[first:last]
    )


def intersect(one: Region, other: Region) -> Region | None:
    """What two regions of the same tensor share."""
    offset = tuple(map(max, one.offset, other.offset))
    ends = (
        min(a + n, b + m)
        for a, n, b, m in zip(one.offset, one.shape, other.offset, other.shape, strict=True)
    )
    shape = tuple(end - start for start, end in zip(offset, ends, strict=True))
    return Region(offset, shape) if all(size > 0 for size in shape) else None


def first_gap_or_overlap(region: Region, parts: Sequence[Region]) -> tuple[int, ...] | None:
    """The first place in ``region`` that not exactly one of ``parts``, which lie inside it,
    covers; None if all are.
    """
    if not region.shape:
        return None if len(parts) == 1 else ()
    if 0 in region.shape:
        return None
    inner = Region(region.offset[1:], region.shape[1:])
    starts = [
        (part.offset[0], part.offset[0] + part.shape[0], Region(part.offset[1:], part.shape[1:]))
        for part in parts
    ]
    waiting = sorted(starts, reverse=True)
    cuts = {region.offset[0], region.offset[0] + region.shape[0]}
    active: list[tuple[int, int, Region]] = []
    for first, last in pairwise(sorted(cuts.union(*((start, end) for start, end, _ in starts)))):
        active = [part for part in active if part[1] >= last]
        while waiting and waiting[-1][0] == first:
            active.append(waiting.pop())
        place = first_gap_or_overlap(inner, [part for _, _, part in active])
        if place is not None:
            return (first, *place)
    return None


def flat_shards(
    name: str, shape: tuple[int, ...], start: int, flat: Tensor, replica: int = 0, replicas: int = 1
) -> Iterator[TensorShard]:
    """The shards of a run of a flattened tensor.

    Args:
        shape: of the whole tensor, not flattened.
        start: the place of the run's first element in the flattened tensor.
        flat: the run itself, one-dimensional and contiguous; the shards' data are views of it.
    """
    if not flat.numel():
        return
    if len(shape) <= 1:
        yield TensorShard(
            name, shape, (start,) * len(shape), flat.view(-1 if shape else ()), replica, replicas
        )
        return
    row = 1
    for size in shape[1:]:
        row *= size
    end = start + flat.numel()
    # the rest of a row that is cut at the front, whole rows, a row that is cut at the end
    cuts = sorted({start, min(end, -(-start // row) * row), max(start, end // row * row), end})
    for first, last in pairwise(cuts):
        part = flat[first - start : last - start]
        if first % row == 0 and last % row == 0:
            index = (first // row,) + (0,) * (len(shape) - 1)
            yield TensorShard(name, shape, index, part.view(-1, *shape[1:]), replica, replicas)
        else:
            for inner in flat_shards(name, shape[1:], first % row, part, replica, replicas):
                yield TensorShard(
                    name, shape, (first // row, *inner.offset), inner.data[None], replica, replicas
                )
