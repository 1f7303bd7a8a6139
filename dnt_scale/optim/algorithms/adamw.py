"""AdamW, the baseline of two buffers (Loshchilov and Hutter, arXiv 1711.05101), torch's own.

m <- b1 m + (1 - b1) g
s <- b2 s + (1 - b2) g^2
p <- (1 - lr wd) p - lr (m / (1 - b1^t)) / (sqrt(s / (1 - b2^t)) + eps)      in the t-th update
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dnt_scale.config.optim import OPTIMIZERS, Beta, GroupConfig, Powers, Storage
from dnt_scale.optim.algorithm import Algorithm, Group

if TYPE_CHECKING:
    from dnt_scale.optim.shards import Shard


@OPTIMIZERS.register
class AdamWConfig(Algorithm):
    """The baseline, torch.optim.AdamW."""

    counters: ClassVar[tuple[str, ...]] = ("step",)
    state_name: ClassVar[str] = "moments"
    skips_on_device: ClassVar[bool] = True

    algorithm: Literal["adamw"]
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)

    def buffers(self) -> dict[str, Storage]:
        return {"exp_avg": "fp32", "exp_avg_sq": "fp32"}

    def describe(self) -> str:
        return f"betas {self.betas}"

    def powers(self, rule: GroupConfig) -> Powers:
        """Elements move by about lr, so an output by up to lr columns, while it grows with
        sqrt(columns). Batch: the square root (Malladi et al., arXiv 2205.10287), whose change of
        betas and eps is left out.
        """
        return Powers(width=-0.5, batch=0.5)

    def step(self, shards: Sequence["Shard"], group: Group) -> None:
        from torch.optim.adamw import adamw

        shards = [shard for shard in shards if shard.weights.numel()]
        if not shards:
            return
        adamw(
            [shard.weights for shard in shards],
            [shard.gradient for shard in shards if shard.gradient is not None],
            [shard.buffers["exp_avg"] for shard in shards],
            [shard.buffers["exp_avg_sq"] for shard in shards],
            [],
            [shard.counters["step"] for shard in shards],
            lr=group["lr"],
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=self.eps,
            weight_decay=group["weight_decay"],
            fused=True,  # one pass over memory, on CPU as on CUDA
            found_inf=shards[0].stop,  # the kernel then changes nothing
            amsgrad=False,
            maximize=False,
        )
