"""Rotary positions (RoPE, arXiv 2104.09864): queries and keys are turned by their positions.

Of a head's K numbers, i and i + K/2 are a pair, as in transformers; a token at position t turns the
pair by the angle t theta^(-2i/K). Angles, cosines and sines are fp32, whatever the dtype of what is
turned, for at position 8,000 a bf16 angle is off by whole turns.
"""

import math

import torch
from torch import Tensor

from dnt_scale.config import RopeSection


def frequencies(rope: RopeSection, head_size: int) -> Tensor:
    """Return the angle by which a position turns each pair: radians, float64 (head_size / 2,).

    ``linear`` scaling divides all by ``factor`` (arXiv 2306.15595). ``llama3`` (Llama 3.1) divides
    those with at most ``low_freq_factor`` turns in ``original_context`` tokens, leaves those with
    ``high_freq_factor`` or more, and takes a mean of both in between, linear in the turns.
    """
    place = torch.arange(0, head_size, 2, dtype=torch.float64)
    angles = rope.theta ** (-place / head_size)
    if rope.scaling == "linear":
        return angles / rope.factor
    if rope.scaling == "llama3":
        assert rope.original_context is not None, "the section is validated"
        low, high = rope.low_freq_factor, rope.high_freq_factor
        turns = angles * rope.original_context / (2 * math.pi)
        unscaled = ((turns - low) / (high - low)).clamp(0, 1)
        return angles * (unscaled + (1 - unscaled) / rope.factor)
    return angles


def table(rope: RopeSection, head_size: int, context: int) -> Tensor:
    """Return cosines, and behind them sines, of each position's angles: float64 (context,
    head_size).
    """
    positions = torch.arange(context, dtype=torch.float64)
    angles = torch.outer(positions, frequencies(rope, head_size))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotated(x_BTHK: Tensor, rotary: Tensor | None) -> Tensor:
    """Return queries or keys turned by their positions, in their own dtype.

    Args:
        rotary: the positions' lines of `table`, (T, 1, K), or (B, T, 1, K) where rows differ; None:
            nothing turns.
    """
    if rotary is None:
        return x_BTHK
    cosines, sines = rotary.chunk(2, dim=-1)
    first, second = x_BTHK.chunk(2, dim=-1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.cat(turned, dim=-1).to(x_BTHK.dtype)
