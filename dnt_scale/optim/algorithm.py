"""What a file of algorithms/ gives beside its settings: the update rule."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from dnt_scale.config.optim import OptimizerConfig

if TYPE_CHECKING:
    from torch import Tensor

    from dnt_scale.optim.shards import Shard

# A parameter group: lr (with the schedule's factor), weight_decay, update (its `UpdateRule`);
# params, names, base_lr.
Group = dict[str, Any]


class Algorithm(OptimizerConfig):
    """An optimizer: settings, facts (`OptimizerConfig`) and one of two forms of an update rule.

    Any rule is a ``step``. One whose momentum is a sum of gradients, and whose weights move by that
    alone, is better written as ``accumulate`` and ``move``: it then works without a gradient buffer
    too.

    Attributes:
        skips_on_device: whether all that changes weights, buffers and counters minds ``Shard.go``.
            Engines wait for a step's verdict before the update of one that does not.
    """

    skips_on_device: ClassVar[bool] = False

    def step(self, shards: Sequence["Shard"], group: Group) -> None:
        """Change the weights and buffers of a group's parameters in place by their gradients.

        A shard may be empty: every rank has all parameters of the group.
        """
        for shard in shards:
            for _, gradient, momentum in shard.pieces():
                if shard.go is None:
                    self.accumulate(momentum, gradient, first=True)
                else:
                    self.accumulate(momentum, gradient, first=True, go=shard.go)
        self.move(shards, group)

    def accumulate(
        self,
        momentum: "Tensor",
        gradient: "Tensor",
        *,
        first: bool,
        go: "Tensor | None" = None,
    ) -> None:
        """Add a gradient to the one buffer in place, elementwise.

        Args:
            momentum: fp32, flat; an fp32 copy where it is stored in bf16.
            gradient: of the same shape, any float dtype; it may not change.
            first: whether it is the update's first: micro-batches add more.
            go: see ``Shard.go``; given with ``skips_on_device`` only.
        """
        raise NotImplementedError

    def move(self, shards: Sequence["Shard"], group: Group) -> None:
        """Change the weights in place by the momentum; ``gradient`` of a shard may be None."""
        raise NotImplementedError
