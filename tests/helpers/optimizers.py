"""Optimizers with their state allocated, as the engines have them, and what to try them on."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dnt_scale.config import ModelConfig, OptimizerConfig
from dnt_scale.config.optim import UPDATES
from dnt_scale.model.dnt import DNT
from dnt_scale.optim.algorithms.msgdw import MSGDWConfig
from dnt_scale.optim.build import build_optimizer
from dnt_scale.optim.groups import Named
from dnt_scale.optim.segments import Segment
from dnt_scale.optim.sharded_optimizer import ShardedOptimizer
from dnt_scale.optim.update_rule import UpdateRule


def new_msgdw(
    groups: Iterable[dict[str, Any]],
    *,
    seed: int = 0,
    momentum_dtype: torch.dtype | None = None,
    segments: Mapping[Tensor, list[Segment]] | None = None,
    **options: Any,
) -> ShardedOptimizer:
    """mSGDW of these groups; ``momentum_dtype`` None is each parameter's own.

    A group's ``update`` is a rule's name, or its section.
    """
    stored = "bf16" if momentum_dtype == torch.bfloat16 else "fp32"
    config = MSGDWConfig(algorithm="msgdw", momentum_dtype=stored, **options)
    groups = [
        {**group, "update": rule(group["update"])} if "update" in group else group
        for group in groups
    ]
    optimizer = ShardedOptimizer(config, groups, seed)
    optimizer.segments.update(segments or {})
    optimizer.allocate()
    return optimizer


def rule(section: str | dict[str, Any]) -> UpdateRule:
    fields = {"update": section} if isinstance(section, str) else section
    found = UPDATES.validate({"pattern": "", **fields}, None)
    assert isinstance(found, UpdateRule)
    return found


def new_optimizer(named: Named, config: OptimizerConfig, seed: int) -> ShardedOptimizer:
    optimizer = build_optimizer(named, config, seed)
    optimizer.allocate()
    return optimizer


def tiny_model() -> DNT:
    config = ModelConfig(
        name="t", layers=2, width=16, heads=2, vocab_size=23, context=8, setting="S5"
    )
    model = DNT(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def tensors(
    shapes: Iterable[tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def drive(
    optimizer: torch.optim.Optimizer,
    params: list[nn.Parameter],
    steps: int,
    gradients: Callable[[int], list[Tensor | None]] | None = None,
) -> None:
    """``steps`` updates with the gradients of a seed a step."""
    for step in range(steps):
        given_grads = (
            gradients(step)
            if gradients
            else tensors([p.shape for p in params], step, params[0].dtype)
        )
        for parameter, gradient in zip(params, given_grads, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()
