"""What a file of updates/ gives beside its settings: how momentum becomes a step."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dnt_scale.config.optim import GroupConfig

if TYPE_CHECKING:
    from torch import Tensor

    from dnt_scale.optim.shards import Shard

# What the weights move against, d: of a shard, the elements of a slice; fp32, not to be changed.
Direction = Callable[["Shard", slice], "Tensor"]


class UpdateRule(GroupConfig):
    """A parameter group's section, with its rule: settings of a rule are keys of the group.

    The algorithm makes the momentum, and decays the weights before they move.
    """

    def move(self, shards: Sequence["Shard"], direction: Direction, lr: float) -> None:
        """Change the weights of a group's parameters in place by a direction.

        Every rank comes by with the same tensors, also where it holds nothing of one: a rule may
        ask all ranks for norms.
        """
        raise NotImplementedError
