"""Parameters, and the FLOPs of a DNT, counted without allocating anything."""

import math

from torch import nn

from dnt_scale.config import ModelConfig, ModelSection
from dnt_scale.model.task import shapes_of


def count_parameters(section: ModelSection, *, positions: bool = True) -> int:
    """Return the number of weights; those of the position table only with ``positions``, as dnt.md
    counts.
    """
    shapes = shapes_of(section)
    return sum(
        math.prod(shape) for name, shape in shapes.items() if positions or name != "pos_emb.weight"
    )


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return the training FLOPs a token, forward and backward: 6 N + 12 layers heads head_size
    seq_len.

    N counts every weight but the position table; a tied head counts once. Attention is counted in
    full, not halved for causality (PaLM, arXiv 2204.02311, appendix B; nanoGPT and torchtitan count
    the same way).
    """
    return (
        6.0 * count_parameters(config, positions=False)
        + 12.0 * config.layers * config.heads * config.sizes.head * seq_len
    )


def matrices_flops(module: nn.Module) -> float:
    """Return the training FLOPs that a token costs in a module's matrices, forward and backward: 6
    a weight.
    """
    return 6.0 * sum(weight.numel() for weight in module.parameters() if weight.ndim == 2)
