"""mSGDW: momentum SGD with decoupled weight decay, of one buffer (arXiv 2507.17501; docs/dnt.md).

    v <- momentum v + (1 - dampening) g
    d  = (1 - dampening) g + momentum v   if nesterov else  v
    p <- (1 - lr wd) p, and then a step against d, plain or by another rule of updates/

With dampening 0 and weight decay 0 the plain update is torch.optim.SGD's, bit for bit (on CUDA:
with fused=True).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dnt_scale.config.optim import OPTIMIZERS, Storage
from dnt_scale.optim.algorithm import Algorithm, Group
from dnt_scale.optim.updates.plain import Plain

if TYPE_CHECKING:
    from torch import Tensor

    from dnt_scale.optim.shards import Shard


@OPTIMIZERS.register
class MSGDWConfig(Algorithm):
    """Momentum SGD with decoupled weight decay."""

    takes_updates: ClassVar[bool] = True
    skips_on_device: ClassVar[bool] = True

    algorithm: Literal["msgdw"]
    momentum: float = Field(0.9, ge=0, lt=1)
    dampening: float = Field(0.0, ge=0, lt=1)
    nesterov: bool = False
    momentum_dtype: Storage = Field("fp32", description="bf16: 2 bytes, stochastically rounded")

    def buffers(self) -> dict[str, Storage]:
        return {"momentum_buffer": self.momentum_dtype}

    def describe(self) -> str:
        return f"momentum {self.momentum:g}"

    def needs_gradient_buffer(self) -> str | None:
        if not self.nesterov:
            return None
        remedy = "set gradient_buffer: true or nesterov: false"
        return f"nesterov needs the gradient after backward; {remedy}"

    def step(self, shards: Sequence["Shard"], group: Group) -> None:
        is_plain = isinstance(group["update"], Plain)
        if is_plain and not self.nesterov and all(map(_of_one_dtype, shards)):
            from dnt_scale.optim.one_pass import momentum_step

            momentum_step(
                shards,
                momentum=self.momentum,
                dampening=self.dampening,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
            )
        else:
            super().step(shards, group)

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
        momentum.add_(gradient, alpha=1.0 - self.dampening)

    def move(self, shards: Sequence["Shard"], group: Group) -> None:
        if group["weight_decay"] > 0:
            for shard in shards:
                shard.weights.mul_(shard.factor(1.0 - group["lr"] * group["weight_decay"]))
        group["update"].move(shards, self._nesterov if self.nesterov else _momentum, group["lr"])

    def _nesterov(self, shard: "Shard", part: slice) -> "Tensor":
        kept = shard.own_gradient(part).to(shard.weights.dtype) * (1.0 - self.dampening)
        return shard.moving(kept.add_(shard.read("momentum_buffer", part), alpha=self.momentum))


def _momentum(shard: "Shard", part: slice) -> "Tensor":
    return shard.moving(shard.read("momentum_buffer", part))


def _of_one_dtype(shard: "Shard") -> bool:
    assert shard.gradient is not None
    return shard.weights.dtype == shard.gradient.dtype == shard.buffers["momentum_buffer"].dtype
