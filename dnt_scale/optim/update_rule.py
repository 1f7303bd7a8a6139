"""What a file of updates/ gives beside its settings: how momentum becomes a step."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from dnt_scale.config.optim import GroupConfig

if TYPE_CHECKING:
    from torch import Tensor

    from dnt_scale.optim.shards import Shard

# What the weights move against, d: of a shard, the elements of a slice; fp32, not to be changed.
Direction = Callable[["Shard", slice], "Tensor"]


class UpdateRule(GroupConfig):
    """A parameter group's section, with its rule: settings of a rule are keys of the group.

    The algorithm makes the momentum, and decays the weights before they move.

    Attributes:
        skips_on_device: whether weights stay, bit for bit, where the direction is 0 in all of the
            group's tensors: a step that is skipped on the device (``Shard.go``). What a rule keeps
            beside them has to mind that itself.
    """

    skips_on_device: ClassVar[bool] = False

    def move(self, shards: Sequence["Shard"], direction: Direction, lr: float) -> None:
        """Change the weights of a group's parameters in place by a direction.

        Every rank comes by with the same tensors, also where it holds nothing of one: a rule may
        ask all ranks for norms.
        """
        raise NotImplementedError
