"""mSGDW, the AdamW baseline, parameter groups by regex, and learning-rate schedules."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dnt_scale.config import AdamWConfig, GroupConfig, MSGDWConfig, OptimConfig, ScheduleConfig


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, or the tensor itself: the same storage, never a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MSGDW(torch.optim.Optimizer):
    """Momentum SGD with decoupled weight decay, one buffer a parameter (arXiv 2507.17501; dnt.md, mSGDW).

        v <- momentum v + (1 - dampening) g
        d  = g (1 - dampening) + momentum v   if nesterov else  v
        plain:           p <- (1 - lr wd) p - lr d
        row_normalized:  p_row <- (1 - lr wd) p_row - lr d_row / |d_row|      (rows with d_row = 0 stay)

    With dampening 0 and weight decay 0 the plain update is torch.optim.SGD's, bit for bit. The buffer is
    allocated here, not on the first step: with dampening that changes the first update, and checkpoint loaders
    need it. Steps run on local shards with foreach kernels; FSDP2 shards dimension 0, so rows are whole.

    Args:
        groups: dicts of ``params`` and any of lr, weight_decay, update; see ``parameter_groups``.
        lr, momentum, dampening, nesterov, weight_decay: defaults of the groups.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "update": "plain",
        }
        super().__init__(groups, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            active = [p for p in group["params"] if p.grad is not None and local(p).numel() > 0]
            if not active:
                continue
            params = [local(p) for p in active]
            grads = [local(p.grad) for p in active]
            buffers = [local(self.state[p]["momentum_buffer"]) for p in active]
            mu, keep, lr = group["momentum"], 1.0 - group["dampening"], group["lr"]

            torch._foreach_mul_(buffers, mu)
            torch._foreach_add_(buffers, grads, alpha=keep)
            directions = buffers
            if group["nesterov"]:
                directions = list(torch._foreach_mul(grads, keep))
                torch._foreach_add_(directions, buffers, alpha=mu)
            if group["update"] == "row_normalized":
                directions = [_row_normalized(d) for d in directions]
            if group["weight_decay"] > 0:
                torch._foreach_mul_(params, 1.0 - lr * group["weight_decay"])
            torch._foreach_add_(params, directions, alpha=-lr)


def _row_normalized(direction_RC: Tensor) -> Tensor:
    norms_R1 = direction_RC.norm(dim=1, keepdim=True)
    return direction_RC / torch.where(norms_R1 > 0, norms_R1, 1.0)


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """Every parameter in exactly one group; what no pattern matches gets the optimizer's own values.

    Tensors with fewer than two dimensions (gains, biases) are never decayed. Each dict has params, names, lr,
    base_lr (what the schedule multiplies), weight_decay and update.

    Raises:
        ValueError: a pattern that is no regex or matches nothing, a parameter that two patterns match, or a
            row-normalised update on a tensor without rows.
    """
    rules = {}
    for label, group in config.groups.items():
        try:
            rules[label] = re.compile(group.pattern)
        except re.error as error:
            raise ValueError(f"optim.groups.{label}.pattern: {group.pattern!r} is not a regex: {error}") from None
    members: dict[str, list[tuple[str, nn.Parameter]]] = {label: [] for label in [*rules, "default"]}
    for name, parameter in named:
        matching = [label for label, regex in rules.items() if regex.search(name)]
        if len(matching) > 1:
            raise ValueError(
                f"optim.groups: parameter {name} is matched by {' and '.join(matching)}; narrow one pattern"
            )
        members[matching[0] if matching else "default"].append((name, parameter))

    groups = []
    every_name = [name for inside in members.values() for name, _ in inside]
    for label, inside in members.items():
        if not inside and label in rules:
            examples = ", ".join(every_name[:3])
            raise ValueError(
                f"optim.groups.{label}.pattern: {rules[label].pattern!r} matches no parameter; "
                f"names look like {examples}"
            )
        rule = config.groups.get(label, GroupConfig(pattern=""))
        lr = config.lr if rule.lr is None else rule.lr
        decay = config.weight_decay if rule.weight_decay is None else rule.weight_decay
        if rule.update == "row_normalized":
            for name, parameter in inside:
                if parameter.ndim != 2:
                    raise ValueError(
                        f"optim.groups.{label}: row_normalized needs matrices, but {name} has shape "
                        f"{tuple(parameter.shape)}; narrow the pattern"
                    )
        for decayed in (True, False):
            part = [(name, p) for name, p in inside if (p.ndim >= 2) == decayed]
            if part:
                groups.append(
                    {
                        "params": [p for _, p in part],
                        "names": [name for name, _ in part],
                        "lr": lr,
                        "base_lr": lr,
                        "weight_decay": decay if decayed else 0.0,
                        "update": rule.update,
                    }
                )
    return groups


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer with all of its state allocated. Raises ValueError as ``parameter_groups`` does."""
    groups = parameter_groups(named, config)
    if isinstance(config, MSGDWConfig):
        return MSGDW(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            dampening=config.dampening,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
    assert isinstance(config, AdamWConfig)
    for group in groups:
        del group["update"]
    adamw = torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, foreach=True
    )
    for group in adamw.param_groups:
        for parameter in group["params"]:
            adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return adamw


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor of a step: ``config`` spread over ``total_steps``."""

    config: ScheduleConfig
    total_steps: int

    def __post_init__(self) -> None:
        if self.config.warmup_steps >= self.total_steps:
            raise ValueError(
                f"optim.schedule.warmup_steps is {self.config.warmup_steps}, but the run has {self.total_steps} "
                "steps; warm up for fewer steps or train for more"
            )

    def factor(self, step: int) -> float:
        """Factor for the update numbered ``step``, counted from 0: warmup ends at 1, the last step at ``final``."""
        warmup, final, last = self.config.warmup_steps, self.config.final, self.total_steps - 1
        if step < warmup:
            return (step + 1) / warmup
        if self.config.name == "constant":
            return 1.0
        if self.config.name == "cosine":
            progress = (step - warmup) / (last - warmup) if last > warmup else 1.0
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        decay_steps = min(last - warmup, round(self.config.decay_fraction * self.total_steps)) or 1
        progress = max(0.0, (step - (last - decay_steps)) / decay_steps)
        return 1 - (1 - final) * min(1.0, progress)
