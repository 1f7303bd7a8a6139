"""Rows of a matrix move by their momentum over the size of their gradients: Adam's second moment,
one number a row.

    v_row <- beta v_row + (1 - beta) mean(g_row^2)
    p_row <- p_row - lr d_row / (sqrt(v_row / (1 - beta^t)) + eps)      in the t-th update

beta = ``square_beta``. As in Adam-mini (arXiv 2406.16793), with rows for its blocks. The state is
rows / elements of a buffer more; a step needs the gradient itself.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dnt_scale.config.optim import UPDATES, Beta, Powers
from dnt_scale.optim.update_rule import Direction, UpdateRule

if TYPE_CHECKING:
    from torch import Tensor

    from dnt_scale.optim.shards import Shard


@UPDATES.register
class RowAdaptive(UpdateRule):
    """Divide each row of the direction by the root of the running mean of its gradient's square."""

    row_buffers: ClassVar[tuple[str, ...]] = ("row_square",)
    counters: ClassVar[tuple[str, ...]] = ("row_step",)
    needs_gradient: ClassVar[bool] = True
    skips_on_device: ClassVar[bool] = True

    update: Literal["row_adaptive"]
    square_beta: Beta = Field(0.95, description="of the running mean of a row's squares")
    eps: float = Field(1e-8, gt=0, description="added to a row's root mean square")

    @property
    def dimensions(self) -> int:
        return 2

    def powers(self) -> Powers:
        """Elements of a row move by about lr, as AdamW's do: adamw.py."""
        return Powers(width=-0.5, batch=0.5)

    def move(self, shards: Sequence["Shard"], direction: Direction, lr: float) -> None:
        from dnt_scale.optim.norms import row_norms

        for shard in shards:
            count = shard.counters["row_step"].add_(1 if shard.go is None else shard.go)
            unbiased = 1.0 - self.square_beta ** count.double()
            for segment, v_R in zip(shard.segments, shard.row_buffers["row_square"], strict=True):
                means_R = row_norms(shard, segment, _gradient).square() / segment.shape[1]
                v_R.mul_(shard.factor(self.square_beta))
                v_R.add_(means_R, alpha=1.0 - self.square_beta)
                # Before a first update there is nothing to divide by.
                steps_R = shard.moving(lr / ((v_R / unbiased).sqrt() + self.eps))
                for rows, _, p_RC, d_RC in shard.by_rows(segment, direction):
                    p_RC.addcmul_(d_RC, steps_R[rows, None], value=-1.0)


def _gradient(shard: "Shard", part: slice) -> "Tensor":
    return shard.own_gradient(part)
