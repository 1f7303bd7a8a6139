"""Muon: a matrix moves by its momentum with all singular values brought near 1.

    p <- p - lr f NewtonSchulz(d)

of the whole matrix, in five steps (Jordan et al., 2024, kellerjordan.github.io/posts/muon). With
Nesterov momentum of .95 in the EMA form it is torch.optim.Muon. f is ``scale``:

    tall    max(1, sqrt(rows / columns))
    adamw   0.2 sqrt(max(rows, columns)): steps about as large as AdamW's (arXiv 2502.16982)
    rms     sqrt(max(rows, columns)): an element changes by about lr, as by row_column_normalized

A divided matrix is gathered on all ranks that hold it; one of them, another for each matrix, makes
the step, and it goes back to all. So ranks share the work, and have the same bits. GPUs gather and
iterate in bf16, as torch.optim.Muon does everywhere; CPUs in fp32, for few of them are fast in
bf16, and some very slow.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dnt_scale.config.optim import UPDATES, Powers
from dnt_scale.optim.update_rule import Direction, UpdateRule

if TYPE_CHECKING:
    from torch import Tensor

    from dnt_scale.optim.segments import Segment
    from dnt_scale.optim.shards import Shard

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, Jordan's and torch.optim.Muon's
EPS = 1e-7


@UPDATES.register
class Orthogonalized(UpdateRule):
    """Orthogonalize the direction of a matrix by Newton-Schulz steps."""

    skips_on_device: ClassVar[bool] = True

    update: Literal["orthogonalized"]
    scale: Literal["tall", "adamw", "rms"] = Field(
        "tall",
        description="lr times max(1, sqrt(rows / columns)), times 0.2 sqrt(max(rows, columns)), or "
        "times sqrt(max(rows, columns))",
    )
    newton_schulz_steps: int = Field(5, gt=0, lt=100, description="of the iteration")

    @property
    def dimensions(self) -> int:
        return 2

    def powers(self) -> Powers:
        """A step of spectral norm lr changes outputs by lr, where they grow with sqrt(width);
        ``adamw`` and ``rms`` have that factor in their own. The batch's is Adam's, see adamw.py.
        """
        return Powers(width=0.5 if self.scale == "tall" else 0.0, batch=0.5)

    def factor(self, rows: int, columns: int) -> float:
        """Return by what lr is multiplied for a matrix of this shape."""
        if self.scale == "tall":
            return max(1.0, math.sqrt(rows / columns))
        return math.sqrt(max(rows, columns)) * (0.2 if self.scale == "adamw" else 1.0)

    def move(self, shards: Sequence["Shard"], direction: Direction, lr: float) -> None:
        held = [(shard, segment) for shard in shards for segment in shard.segments]
        for turn, (shard, segment) in enumerate(held):
            step = gathered(shard, segment, direction)
            if shard.division is None or shard.division.is_my_turn(turn):
                step = newton_schulz(step, self.newton_schulz_steps)
            else:
                step = step.zero_()
            if shard.division:
                step = shard.division.sum(step.contiguous())
            mine = step.reshape(-1)[segment.start : segment.start + segment.length]
            shard.weights[segment.offset : segment.offset + segment.length].sub_(
                mine.to(shard.weights.dtype), alpha=lr * self.factor(*segment.shape)
            )


def gathered(shard: "Shard", segment: "Segment", values: Direction) -> "Tensor":
    """Return a tensor's values whole, in its shape, on every rank that has a part: bf16 on a GPU,
    else in the weights' dtype. A collective.
    """
    whole = shard.weights.new_zeros(math.prod(segment.shape))
    whole = whole.bfloat16() if whole.is_cuda else whole
    for part in shard.within(segment):
        first = segment.start + part.start - segment.offset
        whole[first : first + part.stop - part.start] = values(shard, part)
    if shard.division:
        whole = shard.division.sum(whole)  # all but one rank add zeros to an element
    return whole.view(segment.shape)


def newton_schulz(matrix: "Tensor", steps: int) -> "Tensor":
    """Return a matrix (R, C) with its singular values brought between about 0.7 and 1.2, in its
    dtype.

    An odd polynomial, a x + b x^3 + c x^5 of each singular value, so many times; the matrix product
    is that of the shorter side.
    """
    import torch

    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
