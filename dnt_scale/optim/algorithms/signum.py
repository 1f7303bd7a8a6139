"""Signum, the sign of the momentum (Bernstein et al., arXiv 1802.04434, Algorithm 2): one buffer.

    m <- momentum m + (1 - momentum) g
    p <- (1 - lr wd) p - lr sign(m)

The paper has no weight decay; here it is decoupled, as in Lion. Every weight moves by lr in every
step. The momentum is a sum of gradients, so it goes without a gradient buffer too.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dnt_scale.config.optim import OPTIMIZERS, Beta, GroupConfig, Powers, Storage
from dnt_scale.optim.algorithm import Algorithm, Group

if TYPE_CHECKING:
    from torch import Tensor

    from dnt_scale.optim.shards import Shard


@OPTIMIZERS.register
class SignumConfig(Algorithm):
    """Sign of the momentum, with decoupled weight decay."""

    skips_on_device: ClassVar[bool] = True

    algorithm: Literal["signum"]
    momentum: Beta = 0.9
    momentum_dtype: Storage = Field("fp32", description="bf16: 2 bytes, stochastically rounded")

    def buffers(self) -> dict[str, Storage]:
        return {"momentum_buffer": self.momentum_dtype}

    def describe(self) -> str:
        return f"momentum {self.momentum:g}"

    def needs_gradient_buffer(self) -> str | None:
        return None

    def powers(self, rule: GroupConfig) -> Powers:
        """Every element moves by lr: adamw.py."""
        return Powers(width=-0.5, batch=0.5)

    def accumulate(
        self,
        momentum: "Tensor",
        gradient: "Tensor",
        *,
        first: bool,
        go: "Tensor | None" = None,
    ) -> None:
        from dnt_scale.optim.shards import factor

        if first:
            momentum.mul_(factor(self.momentum, go, momentum))
        momentum.add_(gradient, alpha=1 - self.momentum)

    def move(self, shards: Sequence["Shard"], group: Group) -> None:
        lr = group["lr"]
        for shard in shards:
            for part in shard.parts:
                p, m = shard.weights[part], shard.read("momentum_buffer", part)
                p.mul_(shard.factor(1 - lr * group["weight_decay"]))
                p.add_(shard.moving(m.sign()), alpha=-lr)
