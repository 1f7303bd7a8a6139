"""Make the optimizer that a configuration names, its buffers, and its update count after a resume."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dnt_scale.config import AdamWConfig, MSGDWConfig, OptimConfig
from dnt_scale.optim.groups import parameter_groups
from dnt_scale.optim.msgdw import MSGDW


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, seed: int) -> torch.optim.Optimizer:
    """The optimizer, without its state: call ``allocate`` once its groups hold the tensors that it will step.

    Args:
        seed: of the stochastic rounding of bf16 momentum.

    Raises:
        ConfigError: as ``parameter_groups`` does.
    """
    groups = parameter_groups(named, config)
    optimizer: torch.optim.Optimizer
    if isinstance(config, MSGDWConfig):
        optimizer = MSGDW(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            dampening=config.dampening,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            momentum_dtype=torch.bfloat16 if config.momentum_dtype == "bf16" else torch.float32,
            seed=seed,
        )
    else:
        assert isinstance(config, AdamWConfig)
        for group in groups:
            del group["update"]
        optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, foreach=True
        )
    return optimizer


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """All of the optimizer's state, as zeros, for the parameters that its groups hold now."""
    if isinstance(optimizer, MSGDW):
        optimizer.allocate()
        return
    for group in optimizer.param_groups:
        # DTensors leak host memory in the fused kernels (torchtitan #3790), which few kinds of devices have
        fused = all(p.device.type in ("cpu", "cuda") and not isinstance(p, DTensor) for p in group["params"])
        group.update(fused=fused, foreach=not fused)
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Go on as after ``updates`` updates: random bits of mSGDW, bias correction of AdamW."""
    if isinstance(optimizer, MSGDW):
        optimizer.updates = updates
        return
    for state in optimizer.state.values():
        state["step"].fill_(updates)
