"""Every tensor moves by a step of one size, whatever its gradient.

    p <- p - lr d / RMS(d)      (a tensor with d = 0 stays)

RMS is the root mean square over the elements of the whole tensor, so that lr is how much an element
changes in a step.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from dnt_scale.config.optim import UPDATES, Powers
from dnt_scale.optim.update_rule import Direction, UpdateRule

if TYPE_CHECKING:
    from dnt_scale.optim.shards import Shard


@UPDATES.register
class TensorNormalized(UpdateRule):
    """Divide the direction of a tensor by its root mean square."""

    skips_on_device: ClassVar[bool] = True

    update: Literal["tensor_normalized"]

    def powers(self) -> Powers:
        """Elements move by lr, as AdamW's do: adamw.py."""
        return Powers(width=-0.5, batch=0.5)

    def move(self, shards: Sequence["Shard"], direction: Direction, lr: float) -> None:
        from dnt_scale.optim.norms import elements, ratio, tensor_norms

        for shard, norms in zip(shards, tensor_norms(shards, direction), strict=True):
            for segment, norm in zip(shard.segments, norms, strict=True):
                scale = ratio(lr * math.sqrt(elements(segment)), norm, shard.weights.dtype)
                for part in shard.within(segment):
                    shard.weights[part].sub_(direction(shard, part) * scale)
