"""Rows of matrices inside of flat tensors, of which a rank holds any run and cuts rows in two."""

from collections.abc import Callable, Iterator, Sequence
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
    offset: int  # place of its first element in the flat tensor
    rows: int
    columns: int

    @property
    def place(self) -> slice:
        """The elements in the flat tensor."""
        return slice(self.offset, self.offset + self.rows * self.columns)


def rows_with_norms(
    weights: Tensor,
    segments: Sequence[Segment],
    values: Callable[[slice], Tensor],
    *,
    piece: int,
    divided: bool,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (weights, values, norms) of the segments' rows: views (R, C), (R, C) and (R,).

    A norm is that of the whole row's values, wherever they are. A row that is cut comes as the part
    that lies here, after the segment's whole rows.

    Args:
        weights: (elements,), flat.
        values: makes the values that belong to a slice of the weights; called again for rows that
            are cut.
        piece: elements to yield at a time, or else one row.
        divided: whether other ranks hold the rest. Squares are then summed over all ranks, so that
            each has to come by, with the same matrices in the same order.
    """
    for segment in segments:
        cut = []
        squares_R = torch.zeros(segment.shape[0], dtype=torch.float64, device=weights.device)
        for part in _row_parts(segment, piece):
            values_RC = values(part.place).view(part.rows, part.columns)
            norms_R = torch.linalg.vector_norm(values_RC, dim=1)
            if part.columns < segment.shape[1]:
                cut.append(part)
                squares_R[part.row] += norms_R[0].double().square()
            else:
                yield weights[part.place].view_as(values_RC), values_RC, norms_R
        if divided and dist.is_initialized():
            dist.all_reduce(squares_R)
        for part in cut:
            values_RC = values(part.place)[None]
            norms_R = squares_R[part.row, None].sqrt().to(weights.dtype)
            yield weights[part.place].view_as(values_RC), values_RC, norms_R


def _row_parts(segment: Segment, piece: int) -> Iterator[RowPart]:
    """Yield the segment's rows in parts of at most ``piece`` elements or one row."""
    width = segment.shape[1]
    place, end = segment.start, segment.start + segment.length
    while place < end:
        row, column = divmod(place, width)
        whole = 0 if column else (end - place) // width
        rows = min(whole, max(1, piece // width)) or 1
        columns = width if whole else min(width - column, end - place)
        yield RowPart(row, segment.offset + place - segment.start, rows, columns)
        place += rows * columns
