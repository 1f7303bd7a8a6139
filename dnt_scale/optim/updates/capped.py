"""The plain step, but no tensor moves by more than a limit: SGD-LL, arXiv 2605.17787.

    d_row <- d_row min(1, row_limit / |d_row|)      with row_limit: the head, or a tied embedding
    p <- p - lr d min(1, limit / RMS(lr d))

RMS is over the elements of the whole tensor. The momentum itself is not clipped. The schedule moves
lr, and not the limits. How it goes with width and batch is not known: where a limit binds, lr says
little.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dnt_scale.config.optim import UPDATES
from dnt_scale.optim.update_rule import Direction, UpdateRule

if TYPE_CHECKING:
    from dnt_scale.optim.shards import Shard


@UPDATES.register
class Capped(UpdateRule):
    """Bound the root mean square of a tensor's step."""

    skips_on_device: ClassVar[bool] = True

    update: Literal["capped"]
    limit: float = Field(gt=0, description="of the root mean square of a tensor's step")
    row_limit: float | None = Field(
        None, gt=0, description="of the L2 norm of each row of the momentum; null: none"
    )

    @property
    def dimensions(self) -> int:
        return 0 if self.row_limit is None else 2

    def move(self, shards: Sequence["Shard"], direction: Direction, lr: float) -> None:
        from dnt_scale.optim.norms import elements, ratio, tensor_norms

        if self.row_limit is not None:
            self._move_rows(shards, direction, lr, self.row_limit)
            return
        for shard, norms in zip(shards, tensor_norms(shards, direction), strict=True):
            for segment, norm in zip(shard.segments, norms, strict=True):
                limit = self.limit * math.sqrt(elements(segment))
                step = ratio(limit, norm, shard.weights.dtype, most=lr)
                for part in shard.within(segment):
                    shard.weights[part].sub_(direction(shard, part) * step)

    def _move_rows(
        self, shards: Sequence["Shard"], direction: Direction, lr: float, row_limit: float
    ) -> None:
        from dnt_scale.optim.norms import elements, ratio, row_norms

        for shard in shards:
            dtype = shard.weights.dtype
            for segment in shard.segments:
                norms_R = row_norms(shard, segment, direction)
                clips_R = ratio(row_limit, norms_R, norms_R.dtype, most=1.0)
                square = (norms_R * clips_R).square().sum()
                if shard.division and not shard.division.cuts_rows:  # else these are all rows
                    square = shard.division.sum(square)
                limit = self.limit * math.sqrt(elements(segment))
                steps_R = (clips_R * ratio(limit, square.sqrt(), dtype, most=lr)).to(dtype)
                for rows, _, p_RC, d_RC in shard.by_rows(segment, direction):
                    p_RC.addcmul_(d_RC, steps_R[rows, None], value=-1.0)
