"""Optimizers with their state allocated, as the engines have them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dnt_scale.config import OptimConfig
from dnt_scale.optim import MSGDW, allocate, build_optimizer


def new_msgdw(groups: Iterable[dict[str, Any]], **options: Any) -> MSGDW:
    optimizer = MSGDW(groups, **options)
    allocate(optimizer)
    return optimizer


def new_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, seed: int) -> torch.optim.Optimizer:
    optimizer = build_optimizer(named, config, seed)
    allocate(optimizer)
    return optimizer
