"""Rows of a matrix move by steps of one length, whatever their gradients.

    p_row <- p_row - lr f d_row / |d_row|      (rows with d_row = 0 stay)

f = 1, or with ``tall_factor`` max(1, sqrt(rows / columns)): RMNP's, arXiv 2603.20527. A row of a
weight is one output unit, of an embedding one token.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dnt_scale.config.optim import UPDATES, Powers
from dnt_scale.optim.update_rule import Direction, UpdateRule

if TYPE_CHECKING:
    from dnt_scale.optim.shards import Shard


@UPDATES.register
class RowNormalized(UpdateRule):
    """Divide each row of the direction by its L2 norm."""

    skips_on_device: ClassVar[bool] = True

    update: Literal["row_normalized"]
    tall_factor: bool = Field(
        False, description="of a matrix with more rows than columns: lr times sqrt(rows / columns)"
    )

    @property
    def dimensions(self) -> int:
        return 2

    def powers(self) -> Powers:
        """A row's step of a fixed length changes its output by lr sqrt(columns), as the output
        itself grows. The batch's is Adam's, see adamw.py.
        """
        return Powers(width=0.0, batch=0.5)

    def move(self, shards: Sequence["Shard"], direction: Direction, lr: float) -> None:
        for shard in shards:
            for segment in shard.segments:
                rows, columns = segment.shape
                length = lr * max(1.0, math.sqrt(rows / columns)) if self.tall_factor else lr
                for p_RC, d_RC, norms_R in shard.rows(segment, partial(direction, shard)):
                    p_RC.addcdiv_(d_RC, norms_R.where(norms_R > 0, 1.0)[:, None], value=-length)
