"""Norms of rows and of whole tensors, wherever their elements lie, and what they are for."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dnt_scale.optim.segments import Segment, rows_held
from dnt_scale.optim.shards import Shard
from dnt_scale.optim.update_rule import Direction


def elements(segment: Segment) -> int:
    """Return how many elements the whole tensor has."""
    return math.prod(segment.shape)


def tensor_norms(shards: Sequence[Shard], values: Direction) -> list[list[Tensor]]:
    """Return the L2 norm of each whole tensor's values: float64 scalars, a list for each shard with
    one for each segment. A collective, one for all of them.
    """
    squares = [
        sum(
            (values(shard, part).square().sum(dtype=torch.float64) for part in shard.within(each)),
            torch.zeros((), dtype=torch.float64, device=shard.weights.device),
        )
        for shard in shards
        for each in shard.segments
    ]
    division = shards[0].division
    summed = torch.stack(squares)
    norms = iter((division.sum(summed) if division else summed).sqrt().unbind())
    return [[next(norms) for _ in shard.segments] for shard in shards]


def row_norms(shard: Shard, segment: Segment, values: Direction) -> Tensor:
    """Return the L2 norms of the rows that `rows_held` says, of whole rows: float64 (rows,).

    A collective where rows are cut.
    """
    _, count = rows_held(segment, shard.division)
    squares_R = torch.zeros(count, dtype=torch.float64, device=shard.weights.device)
    for rows, _, _, values_RC in shard.by_rows(segment, values):
        squares_R[rows] += values_RC.square().sum(dim=1, dtype=torch.float64)
    if shard.division and shard.division.cuts_rows:
        squares_R = shard.division.sum(squares_R)
    return squares_R.sqrt()


def column_norms(shard: Shard, segment: Segment, values: Direction) -> Tensor:
    """Return the L2 norms of a matrix's whole columns: float64 (columns,). A collective."""
    squares_C = torch.zeros(segment.shape[1], dtype=torch.float64, device=shard.weights.device)
    for _, columns, _, values_RC in shard.by_rows(segment, values):
        squares_C[columns] += values_RC.square().sum(dim=0, dtype=torch.float64)
    return (shard.division.sum(squares_C) if shard.division else squares_C).sqrt()


def ratio(
    numerator: Tensor | float, denominator: Tensor, dtype: torch.dtype, most: float = math.inf
) -> Tensor:
    """Return a quotient of at most ``most`` in this dtype, 0 where the denominator is 0."""
    quotient = torch.where(denominator > 0, numerator / denominator, 0.0)
    return quotient.clamp(max=most).to(dtype)


@contextmanager
def fixed_norms(shards: Sequence[Shard]) -> Iterator[None]:
    """Scale each tensor, at the end, to the Frobenius norm that it has at the start (Hyperball,
    arXiv 2606.16899). A collective.
    """
    before = tensor_norms(shards, _weights)
    yield
    after = tensor_norms(shards, _weights)
    for shard, old, new in zip(shards, before, after, strict=True):
        for segment, was, now in zip(shard.segments, old, new, strict=True):
            for part in shard.within(segment):
                shard.weights[part].mul_(shard.factor(ratio(was, now, shard.weights.dtype)))


def _weights(shard: Shard, part: slice) -> Tensor:
    return shard.weights[part]
