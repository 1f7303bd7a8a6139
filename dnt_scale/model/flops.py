"""Parameters and FLOPs, counted without allocating anything."""

import torch

from dnt_scale.config import ModelConfig
from dnt_scale.model.dnt import DNT


def count_parameters(config: ModelConfig, *, positions: bool = True) -> int:
    """Number of weights; nothing is allocated. dnt.md counts without the position table."""
    with torch.device("meta"):
        model = DNT(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    if not positions and model.pos_emb is not None:
        total -= model.pos_emb.weight.numel()
    return total


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs a token, forward and backward: 6 N + 12 layers width seq_len.

    N counts every weight but the position table; a tied head counts once. Attention is counted in full, not
    halved for causality (PaLM, arXiv 2204.02311, appendix B; nanoGPT and torchtitan count the same way).
    """
    return 6.0 * count_parameters(config, positions=False) + 12.0 * config.layers * config.width * seq_len
