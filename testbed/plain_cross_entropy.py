"""The loss of a language model, written out: all logits, then their cross entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dnt_scale.model.batch import IGNORED


def plain_cross_entropy(
    x_ND: Tensor,
    head_RD: Tensor,
    targets_N: Tensor,
    vocab_size: int,
    logit_cap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return what ``linear_cross_entropy`` does, in as many tensors of N x V as autograd likes."""
    padded_NR = F.linear(x_ND, head_RD)
    # all columns are no slice, which would cost a copy
    logits_NV = padded_NR if vocab_size == len(head_RD) else padded_NR[:, :vocab_size]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if logit_cap is not None:
        logits_NV = logit_cap * torch.tanh(logits_NV / logit_cap)
    loss = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="sum")
    if not z_loss:
        return loss, torch.zeros_like(loss)
    squares_N = logits_NV.logsumexp(dim=-1).square()
    z_part = z_loss * (squares_N * (targets_N != IGNORED)).sum()
    return loss + z_part, z_part
