"""A rank's elements of a parameter as an update rule sees them: flat, in pieces, in fp32."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dnt_scale.optim.segments import Division, Segment, row_parts, rows_held, rows_with_norms
from dnt_scale.optim.stochastic_rounding import stochastic_bf16
from dnt_scale.optim.update_rule import Direction


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, or the tensor itself: a view, never a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def factor(value: float | Tensor, go: Tensor | None, like: Tensor) -> float | Tensor:
    """Return ``value``, and 1 where ``go`` is false, as a scalar of the dtype of ``like`` on its
    device.
    """
    if go is None:
        return value
    if isinstance(value, Tensor):
        return torch.where(go, value, 1.0)
    # Filled there: a number that is copied from the host makes it wait.
    return torch.ones((), dtype=like.dtype, device=like.device).masked_fill_(go, value)


def piece_length(tensor: Tensor) -> int:
    """Return how many elements to work on at a time.

    A CPU keeps so many in its cache; a GPU needs many to be busy.
    """
    return 1 << 17 if tensor.device.type == "cpu" else 1 << 24


@dataclass(frozen=True, eq=False)
class Shard:
    """What an update changes of one parameter, as flat views of its storage.

    Attributes:
        weights: (elements,), fp32.
        gradient: (elements,), any float dtype; None where backward has added it to the momentum.
        buffers: by name, (elements,), stored in fp32 or bf16.
        row_buffers: by name, of each segment (rows,), fp32: of the rows that `rows_held` says.
        counters: by name, fp32 scalars.
        segments: where the model's parameters lie in ``weights``.
        division: the ranks that hold the rest of them; None: nobody else does.
        generator: makes the random bits of this update and this parameter.
        go: on the device, a bool scalar: whether the step is made. Where it is not, all stays as it
            is, bit for bit, whatever the gradient holds. None: it is made.
    """

    weights: Tensor
    gradient: Tensor | None
    buffers: Mapping[str, Tensor]
    row_buffers: Mapping[str, Sequence[Tensor]]
    counters: Mapping[str, Tensor]
    segments: Sequence[Segment]
    division: Division | None
    generator: Callable[[], torch.Generator]
    go: Tensor | None = None

    @property
    def parts(self) -> list[slice]:
        """The pieces to work on, so that what is temporary stays small."""
        length = piece_length(self.weights)
        return [slice(start, start + length) for start in range(0, self.weights.numel(), length)]

    def within(self, segment: Segment) -> list[slice]:
        """The pieces of one parameter."""
        length, end = piece_length(self.weights), segment.offset + segment.length
        starts = range(segment.offset, end, length)
        return [slice(start, min(start + length, end)) for start in starts]

    def by_rows(
        self, segment: Segment, values: Direction
    ) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yield (rows, columns, weights, values) of a matrix in pieces, the latter (R, C), views.

        Rows are places in what is kept of each row (`rows_held`). One that is cut between ranks
        comes as what lies here, some of the columns.
        """
        first, _ = rows_held(segment, self.division)
        for part in row_parts(segment, piece_length(self.weights)):
            values_RC = values(self, part.place).view(part.rows, part.columns)
            rows = slice(part.row - first, part.row - first + part.rows)
            columns = slice(part.column, part.column + part.columns)
            yield rows, columns, self.weights[part.place].view_as(values_RC), values_RC

    def read(self, buffer: str, part: slice) -> Tensor:
        """Return a part of a buffer in the weights' dtype; it may be a view: do not change it."""
        return self.buffers[buffer][part].to(self.weights.dtype)

    def factor(self, value: float | Tensor) -> float | Tensor:
        """Return by what to multiply weights or a buffer: ``value``, and 1 where the step is not
        made.
        """
        return factor(value, self.go, self.weights)

    def moving(self, values: Tensor) -> Tensor:
        """Return what weights move against: ``values``, and 0 where the step is not made."""
        return values if self.go is None else torch.where(self.go, values, 0.0)

    def own_gradient(self, part: slice) -> Tensor:
        """Return a part of the gradient, and -0 where the step is not made, which added to any
        number leaves it; it may be a view: do not change it.
        """
        assert self.gradient is not None
        found = self.gradient[part]
        return found if self.go is None else torch.where(self.go, found, -0.0)

    @property
    def stop(self) -> Tensor | None:
        """The contrary of ``go`` as torch's fused kernels take it: an fp32 scalar, 1 to change
        nothing.
        """
        return None if self.go is None else self.go.logical_not().float()

    def pieces(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield (weights, gradient, each buffer) of one piece after the other.

        Weights and buffers may be changed in place. A buffer that is stored in bf16 comes as an
        fp32 copy, which is rounded back when the next piece is asked for.
        """
        dtype = self.weights.dtype
        rounded = any(buffer.dtype != dtype for buffer in self.buffers.values())
        generator = self.generator() if rounded else None
        for part in self.parts:
            stored = [buffer[part] for buffer in self.buffers.values()]
            working = [buffer.to(dtype) for buffer in stored]
            yield self.weights[part], self.own_gradient(part), *working
            for buffer, values in zip(stored, working, strict=True):
                if buffer.dtype != dtype:
                    assert generator is not None
                    buffer.copy_(stochastic_bf16(values, generator))

    def rows(
        self, segment: Segment, values: Callable[[slice], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (weights, values, norms of values) by rows of a matrix, see `rows_with_norms`.

        A collective where rows are cut.
        """
        return rows_with_norms(
            self.weights, segment, values, piece=piece_length(self.weights), division=self.division
        )
