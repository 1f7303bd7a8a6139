"""The plain momentum step of many tensors, in as few passes over memory as the device allows."""

from collections.abc import Sequence

import torch

from dnt_scale.optim import fused_cpu
from dnt_scale.optim.shards import Shard

WORTH_COMPILING = 1 << 20  # elements of a group: compiling takes a quarter of a second


def momentum_step(
    shards: Sequence[Shard],
    *,
    momentum: float,
    dampening: float,
    lr: float,
    weight_decay: float,
) -> None:
    """Do v <- momentum v + (1 - dampening) g, then p <- (1 - lr wd) p - lr v, in place.

    The one buffer of each shard, its weights and its gradient have one dtype. It takes one pass on
    a CPU where there is a C compiler, and 1.4 on CUDA.
    """
    shards = [shard for shard in shards if shard.weights.numel()]
    if not shards:
        return
    ps = [shard.weights for shard in shards]
    gs = [shard.gradient for shard in shards if shard.gradient is not None]
    vs = [next(iter(shard.buffers.values())) for shard in shards]
    shrink = 1.0 - lr * weight_decay
    go = shards[0].go
    if ps[0].is_cuda:
        if shrink != 1.0:
            torch._foreach_mul_(ps, shards[0].factor(shrink))
        torch._fused_sgd_(
            ps,
            gs,
            vs,
            weight_decay=0.0,
            momentum=momentum,
            lr=lr,
            dampening=dampening,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=shards[0].stop,  # the kernel then changes nothing
        )
        return
    large = ps[0].dtype == torch.float32 and sum(p.numel() for p in ps) >= WORTH_COMPILING
    if go is None and large and (update := fused_cpu.load()):
        update(ps, vs, gs, momentum, 1.0 - dampening, shrink, lr)
        return
    if go is not None:
        gs = [shard.own_gradient(slice(None)) for shard in shards]
    torch._foreach_mul_(vs, shards[0].factor(momentum))
    torch._foreach_add_(vs, gs, alpha=1.0 - dampening)
    if shrink != 1.0:
        torch._foreach_mul_(ps, shards[0].factor(shrink))
    steps = vs if go is None else [shards[0].moving(v) for v in vs]
    torch._foreach_add_(ps, steps, alpha=-lr)
