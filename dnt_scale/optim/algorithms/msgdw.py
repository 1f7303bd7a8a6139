"""mSGDW: momentum SGD with decoupled weight decay, of one buffer (arXiv 2507.17501; docs/dnt.md).

    v <- momentum v + (1 - dampening) g
    d  = (1 - dampening) g + momentum v   if nesterov else  v
    plain:           p <- (1 - lr wd) p - lr d
    row_normalized:  p_row <- (1 - lr wd) p_row - lr d_row / |d_row|      (rows with d_row = 0 stay)

With dampening 0 and weight decay 0 the plain update is torch.optim.SGD's, bit for bit (on CUDA:
with fused=True).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dnt_scale.config.optim import OPTIMIZERS, Storage
from dnt_scale.optim.algorithm import Algorithm, Group

if TYPE_CHECKING:
    from torch import Tensor

    from dnt_scale.optim.shards import Shard

    Direction = Callable[[slice], Tensor]  # d of a slice of a shard's elements


@OPTIMIZERS.register
class MSGDWConfig(Algorithm):
    """Momentum SGD with decoupled weight decay."""

    updates: ClassVar[Mapping[str, int]] = {"plain": 0, "row_normalized": 2}

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
        if group["update"] == "plain" and not self.nesterov and all(map(_of_one_dtype, shards)):
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

    def accumulate(self, momentum: "Tensor", gradient: "Tensor", *, first: bool) -> None:
        if first:
            momentum.mul_(self.momentum)
        momentum.add_(gradient, alpha=1.0 - self.dampening)

    def move(self, shard: "Shard", group: Group) -> None:
        if group["weight_decay"] > 0:
            shard.weights.mul_(1.0 - group["lr"] * group["weight_decay"])
        update = {"plain": plain, "row_normalized": row_normalized}[group["update"]]
        direction = self._nesterov(shard) if self.nesterov else self._momentum(shard)
        update(shard, direction, group["lr"])

    def _momentum(self, shard: "Shard") -> "Direction":
        return lambda part: shard.read("momentum_buffer", part)

    def _nesterov(self, shard: "Shard") -> "Direction":
        gradient = shard.gradient
        assert gradient is not None

        def direction(part: slice) -> "Tensor":
            kept = gradient[part].to(shard.weights.dtype) * (1.0 - self.dampening)
            return kept.add_(shard.read("momentum_buffer", part), alpha=self.momentum)

        return direction


def plain(shard: "Shard", direction: "Direction", lr: float) -> None:
    """Move the weights: p <- p - lr d."""
    for part in shard.parts:
        shard.weights[part].add_(direction(part), alpha=-lr)


def row_normalized(shard: "Shard", direction: "Direction", lr: float) -> None:
    """Move each row of the weights by a step of length lr: p_row <- p_row - lr d_row / |d_row|."""
    for p_RC, d_RC, norms_R in shard.rows(direction):
        p_RC.addcdiv_(d_RC, norms_R.where(norms_R > 0, 1.0)[:, None], value=-lr)


def _of_one_dtype(shard: "Shard") -> bool:
    assert shard.gradient is not None
    return shard.weights.dtype == shard.gradient.dtype == shard.buffers["momentum_buffer"].dtype
