"""Initial weights: a function of (seed, parameter name) alone, the same on any engine and any
ranks.
"""

import hashlib
import math

import torch
from torch import Tensor

from dnt_scale.config import BlockSection
from dnt_scale.model.task import Task


def drawn(name: str, shape: torch.Size, std: float, seed: int) -> Tensor:
    """Return fp32 values on the CPU out of N(0, std), by a generator of (seed, name)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(
        0.0, std, generator=generator
    )


def initial_tensor(name: str, shape: torch.Size, config: BlockSection, seed: int) -> Tensor:
    """Return the fp32 CPU value that parameter ``name`` of a DNT, of language or of images, starts
    from: a function of (seed, name) alone.

    nanoGPT's scheme: N(0, init_std), W_o and W_2 smaller by 1/sqrt(2 layers); gains at gain_init,
    biases 0.
    """
    if name.endswith(".gain"):
        return torch.full(shape, config.gain_init, dtype=torch.float32, device="cpu")
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=torch.float32, device="cpu")
    std = config.init_std
    if config.residual_init_scaled and name.endswith((".w_o.weight", ".w_2.weight")):
        std /= math.sqrt(2 * config.layers)
    return drawn(name, shape, std, seed)


@torch.no_grad()
def init_weights(task: Task, seed: int) -> None:
    """Fill an unsharded model in place, buffers too; the engines do the same shard by shard."""
    for name, parameter in task.named_parameters():
        parameter.copy_(task.initial(name, parameter.shape, seed))
    task.init_buffers()
