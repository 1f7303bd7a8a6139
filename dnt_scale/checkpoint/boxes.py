"""Boxes: what a rank holds of a tensor, whoever sharded it.

Every engine describes its weights and optimizer buffers as rectangular parts of the whole tensors. FSDP2's row shards
are one box each; a run of a flattened tensor, as ZeRO partitions are, is at most three boxes of a matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A part of the tensor ``name`` that this rank holds.

    ``data`` is a view of the engine's own storage, of the whole tensor's number of dimensions: writing into it changes
    what the engine holds. ``replicas`` ranks hold an equal box, of which this is number ``replica``.
    """

    name: str  # model.NAME, or BUFFER.NAME: momentum_buffer; exp_avg, exp_avg_sq
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]  # where data begins in it
    data: Tensor
    replica: int = 0
    replicas: int = 1


def flat_boxes(
    name: str, shape: tuple[int, ...], start: int, flat: Tensor, replica: int = 0, replicas: int = 1
) -> Iterator[Box]:
    """The boxes of a run of a flattened tensor.

    Args:
        shape: of the whole tensor, not flattened.
        start: the place of the run's first element in the flattened tensor.
        flat: the run itself, one-dimensional and contiguous; the boxes' data are views of it.
    """
    if not flat.numel():
        return
    if len(shape) <= 1:
        yield Box(name, shape, (start,) * len(shape), flat.view(-1 if shape else ()), replica, replicas)
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
            yield Box(name, shape, index, part.view(-1, *shape[1:]), replica, replicas)
        else:
            for inner in flat_boxes(name, shape[1:], first % row, part, replica, replicas):
                yield Box(name, shape, (first // row, *inner.offset), inner.data[None], replica, replicas)
