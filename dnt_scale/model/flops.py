"""Parameters and FLOPs of a DNT, counted without allocating anything."""

import torch

from dnt_scale.config import ModelConfig
from dnt_scale.model.dnt import DNT


def _on_meta(config: ModelConfig) -> DNT:
    with torch.device("meta"):
        return DNT(config)


def count_parameters(config: ModelConfig, *, positions: bool = True) -> int:
    """Return the number of weights. dnt.md counts without the position table."""
    return _on_meta(config).count_parameters(positions=positions)


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return the training FLOPs a token; see ``DNT.flops_per_token``."""
    return _on_meta(config).flops_per_token(seq_len)
