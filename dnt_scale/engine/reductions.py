"""Sums that engines make: squares of gradients, and anything over the ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# elements whose squares torch may add up in fp32 on a CPU, one after the other: 1e7 are 4e-4 wrong, these 2e-7
PIECE = 1 << 16


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The squared norm of each of fp32 ``tensors``: float64 of shape (len(tensors),), on their device.

    Right to 1e-6 of itself however large a tensor is; not finite where the tensor is not.
    """
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(list(tensors))).double().square()
    norms = [torch.stack(torch._foreach_norm(tensor.reshape(-1).split(PIECE))) for tensor in tensors]
    return torch.stack([pieces.double().square().sum() for pieces in norms])


def over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """The sum over all ranks of ``values``, whose shape it has: float64, on ``device``. A collective."""
    total = values.detach().to(device, torch.float64, copy=True)
    dist.all_reduce(total)
    return total
