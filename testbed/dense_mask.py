"""Attention inside documents as a mask of T x T says it: what the model's own has to equal."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from dnt_scale.model import block
from dnt_scale.model.documents import Documents


def dense_mask(begin_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the logits: (B, 1, T, T)."""
    same_BTT = begin_BT[:, :, None] == begin_BT[:, None, :]
    seen_B1TT = same_BTT.tril()[:, None]
    return torch.zeros_like(seen_B1TT, dtype=dtype).masked_fill_(~seen_B1TT, -torch.inf)


@contextmanager
def dense_attention() -> Iterator[None]:
    """Let blocks compute with such a mask, made once for all of them."""
    made: list[tuple[Tensor, Tensor]] = []

    def attention(
        q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, causal: bool
    ) -> Tensor:
        assert documents is not None and causal
        if not made or made[0][0] is not documents.begin_BT:
            made[:] = [(documents.begin_BT, dense_mask(documents.begin_BT, q.dtype))]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=made[0][1])

    own, block.attention = block.attention, attention
    try:
        yield
    finally:
        block.attention = own
