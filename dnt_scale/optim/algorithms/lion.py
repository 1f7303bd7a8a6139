"""Lion, evolved sign momentum (Chen et al., arXiv 2302.06675, Algorithm 2): one buffer.

    c = b1 m + (1 - b1) g
    p <- (1 - lr wd) p - lr sign(c)
    m <- b2 m + (1 - b2) g

Every weight moves by lr in every step. The step looks at the gradient and at the momentum before
it, so there is no way to do without a gradient buffer.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dnt_scale.config.optim import OPTIMIZERS, Beta, GroupConfig, Powers, Storage
from dnt_scale.optim.algorithm import Algorithm, Group

if TYPE_CHECKING:
    from dnt_scale.optim.shards import Shard


@OPTIMIZERS.register
class LionConfig(Algorithm):
    """Sign of an interpolation between momentum and gradient, with decoupled weight decay."""

    skips_on_device: ClassVar[bool] = True

    algorithm: Literal["lion"]
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    momentum_dtype: Storage = Field("fp32", description="bf16: 2 bytes, stochastically rounded")

    def buffers(self) -> dict[str, Storage]:
        return {"momentum_buffer": self.momentum_dtype}

    def describe(self) -> str:
        return f"betas {self.betas}"

    def needs_gradient_buffer(self) -> str | None:
        return (
            "lion steps by the gradient and the momentum before it, so it needs the gradient after "
            "backward; set gradient_buffer: true, or use optim=signum"
        )

    def powers(self, rule: GroupConfig) -> Powers:
        """Every element moves by lr: adamw.py."""
        return Powers(width=-0.5, batch=0.5)

    def step(self, shards: Sequence["Shard"], group: Group) -> None:
        lr, (b1, b2) = group["lr"], self.betas
        for shard in shards:
            for p, g, m in shard.pieces():
                c = m.mul(b1).add_(g, alpha=1 - b1)
                p.mul_(shard.factor(1 - lr * group["weight_decay"]))
                p.add_(shard.moving(c.sign_()), alpha=-lr)
                m.mul_(shard.factor(b2)).add_(g, alpha=1 - b2)
