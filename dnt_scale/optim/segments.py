"""Rows of matrices inside of flat tensors, of which a rank holds any run and cuts rows in two."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Elements [start, start + length) of a flattened parameter; at ``offset`` of a flat tensor."""

    shape: tuple[int, ...]  # of the whole parameter
    start: int
    offset: int
    length: int


class RowPart(NamedTuple):
    """Whole rows of a segment, or a part of one row."""

    row: int  # number of the first one in the whole parameter
    column: int  # number of the first one; 0 of whole rows
    offset: int  # place of its first element in the flat tensor
    rows: int
    columns: int

    @property
    def place(self) -> slice:
        """The elements in the flat tensor."""
        return slice(self.offset, self.offset + self.rows * self.columns)


@dataclass(frozen=True)
class Division:
    """How parameters are divided among ranks."""

    group: dist.ProcessGroup | None = None  # the ranks that share a copy; None: all
    device: torch.device | None = None  # where collectives take their tensors; None: as they are
    cuts_rows: bool = True  # whether a row may lie on several ranks

    def is_my_turn(self, turn: int) -> bool:
        """Return whether this rank does what these ranks do one after the other."""
        if not dist.is_initialized():
            return True
        return turn % dist.get_world_size(self.group) == dist.get_rank(self.group)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over these ranks of ``values``, whose shape it has; of one rank itself. A
        collective.
        """
        if not dist.is_initialized() or dist.get_world_size(self.group) == 1:
            return values
        total = values.to(self.device or values.device, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(values.device)


def rows_with_norms(
    weights: Tensor,
    segment: Segment,
    values: Callable[[slice], Tensor],
    *,
    piece: int,
    division: Division | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (weights, values, norms) of a matrix's rows: views (R, C), (R, C) and (R,).

    A norm is that of the whole row's values, wherever they are. A row that is cut comes as the part
    that lies here, after the whole rows.

    Args:
        weights: (elements,), flat.
        segment: what of them is the matrix's.
        values: makes the values that belong to a slice of the weights; called again for rows that
            are cut.
        piece: elements to yield at a time, or else one row.
        division: who holds the rest; None: nobody. Where rows are cut, squares are summed over
            these ranks, so that each has to come by, with the same matrices in the same order.
    """
    cut = []
    cuts_rows = division is not None and division.cuts_rows
    rows = segment.shape[0] if cuts_rows else 0
    squares_R = torch.zeros(rows, dtype=torch.float64, device=weights.device)
    for part in row_parts(segment, piece):
        values_RC = values(part.place).view(part.rows, part.columns)
        norms_R = torch.linalg.vector_norm(values_RC, dim=1)
        if part.columns < segment.shape[1]:
            cut.append(part)
            squares_R[part.row] += norms_R[0].double().square()
        else:
            yield weights[part.place].view_as(values_RC), values_RC, norms_R
    if division and cuts_rows:
        squares_R = division.sum(squares_R)
    for part in cut:
        values_RC = values(part.place)[None]
        norms_R = squares_R[part.row, None].sqrt().to(weights.dtype)
        yield weights[part.place].view_as(values_RC), values_RC, norms_R


def rows_held(segment: Segment, division: Division | None) -> tuple[int, int]:
    """Return the first row and the number of rows of which a rank keeps what there is once a row.

    All of them where rows are cut: it is the same on all ranks, which have summed it up.
    """
    if division and division.cuts_rows:
        return 0, segment.shape[0]
    return segment.start // segment.shape[1], segment.length // segment.shape[1]


def row_parts(segment: Segment, piece: int) -> Iterator[RowPart]:
    """Yield the segment's rows in parts of at most ``piece`` elements or one row."""
    width = segment.shape[1]
    place, end = segment.start, segment.start + segment.length
    while place < end:
        row, column = divmod(place, width)
        whole = 0 if column else (end - place) // width
        rows = min(whole, max(1, piece // width)) or 1
        columns = width if whole else min(width - column, end - place)
        yield RowPart(row, column, segment.offset + place - segment.start, rows, columns)
        place += rows * columns
