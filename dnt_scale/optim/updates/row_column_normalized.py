"""Rows and columns of a matrix move by steps of one size, whatever their gradients.

    p_ij <- p_ij - lr d_ij / sqrt(r_i c_j / m)      (where d_ij = 0 it stays)

r_i, c_j and m are the mean squares of the direction's row i, of its column j and of all of it: the
factored second moment of Adafactor (arXiv 1804.04235), of the direction itself instead of a running
mean, so that there is nothing to keep. lr is about how much an element changes in a step. As one
round of the normalization by rows and columns of SinkGD (arXiv 2502.06742), which has no momentum.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from dnt_scale.config.optim import UPDATES, Powers
from dnt_scale.optim.update_rule import Direction, UpdateRule

if TYPE_CHECKING:
    from dnt_scale.optim.shards import Shard


@UPDATES.register
class RowColumnNormalized(UpdateRule):
    """Divide the direction by the root of its rows' and columns' mean squares."""

    skips_on_device: ClassVar[bool] = True

    update: Literal["row_column_normalized"]

    @property
    def dimensions(self) -> int:
        return 2

    def powers(self) -> Powers:
        """Elements move by about lr, as AdamW's do: adamw.py."""
        return Powers(width=-0.5, batch=0.5)

    def move(self, shards: Sequence["Shard"], direction: Direction, lr: float) -> None:
        from dnt_scale.optim.norms import column_norms, ratio, row_norms

        for shard in shards:
            dtype = shard.weights.dtype
            for segment in shard.segments:
                norms_R = row_norms(shard, segment, direction)
                norms_C = column_norms(shard, segment, direction)
                # sqrt(r_i c_j / m) = |row i| |column j| / |all|
                factors_R = ratio(lr * norms_C.norm(), norms_R, dtype)
                factors_C = ratio(1.0, norms_C, dtype)
                for rows, columns, p_RC, d_RC in shard.by_rows(segment, direction):
                    p_RC.addcmul_(d_RC * factors_C[columns], factors_R[rows, None], value=-1.0)
