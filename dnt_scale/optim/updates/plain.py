"""The plain step of any tensor: p <- p - lr d."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from dnt_scale.config.optim import UPDATES, Powers
from dnt_scale.optim.update_rule import Direction, UpdateRule

if TYPE_CHECKING:
    from dnt_scale.optim.shards import Shard


@UPDATES.register
class Plain(UpdateRule):
    """Step by the direction itself."""

    skips_on_device: ClassVar[bool] = True

    update: Literal["plain"] = "plain"

    def powers(self) -> Powers:
        """The batch's is SGD's linear rule (Goyal et al., arXiv 1706.02677), which holds up to a
        critical batch.
        """
        return Powers(width=0.0, batch=1.0)

    def move(self, shards: Sequence["Shard"], direction: Direction, lr: float) -> None:
        for shard in shards:
            for part in shard.parts:
                shard.weights[part].add_(direction(shard, part), alpha=-lr)
