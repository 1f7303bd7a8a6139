"""Attention that stays inside the documents of a row, without a mask of T x T.

Documents are contiguous, so on CPU rows are cut into them and each is plain causal attention. On
CUDA, where the host would have to wait for the places of the cuts, FlexAttention (arXiv 2412.05496)
skips the blocks of keys that lie outside. Memory is linear in T, but for FlexAttention's lists of
blocks: four of (T / 128)^2 int32 a row.

Shapes in names: B rows, T tokens, N all tokens of the rows, H heads, K width of a head.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Tokens: so many of short documents go through one kernel, with a mask of their own. Measured: 64
# to 256 are alike, one document at a time is slower from some twenty tokens a document downwards.
TOGETHER = 128
BLOCK = 128  # tokens: of FlexAttention's blocks
LEAST_HEAD = 16  # the narrowest head that FlexAttention computes
_aten = torch.ops.aten


@dataclass(frozen=True)
class Pieces:
    """Rows, one behind the other, cut into pieces: a document, or several short ones of a row."""

    lengths: list[int]  # tokens
    masks: list[Tensor | None]  # (length, length), added to a piece's logits; None: one document


@dataclass(frozen=True)
class Documents:
    """Where the documents of some rows lie: made once, for all blocks.

    ``Documents(begin_BT)`` is right by itself, and of one row for any number of copies of it, but
    attention then looks for the pieces in every block, and on CUDA waits for them.
    """

    begin_BT: Tensor  # int64: the place in the row where a token's document begins
    pieces: Pieces | None = None  # on CPU
    block_mask: "BlockMask | None" = None  # on CUDA

    @property
    def positions_BT(self) -> Tensor:
        """How far each token is from its document's beginning: int64."""
        places_T = torch.arange(self.begin_BT.shape[1], device=self.begin_BT.device)
        return places_T - self.begin_BT


def find_documents(tokens_BT: Tensor, eos: int, dtype: torch.dtype) -> Documents:
    """Return where documents lie: each ``eos`` begins one, and what precedes a row's first is the
    rest of another.

    Args:
        dtype: of the queries to come.
    """
    places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    begin_BT = torch.where(tokens_BT == eos, places_T, 0).cummax(dim=1).values
    if tokens_BT.device.type == "cuda":
        return Documents(begin_BT, block_mask=block_mask(begin_BT))
    return Documents(begin_BT, pieces=cut(begin_BT, dtype))


def attention(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, documents: Documents | None, causal: bool
) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v as (B, H, T, K), over what each query sees.

    Args:
        documents: a query sees what is of its own document and not after it. None: all of the row,
            where ``causal`` what is not after it.
    """
    if documents is None:
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=causal)
    if documents.block_mask is not None:
        return _in_blocks(q_BHTK, k_BHTK, v_BHTK, documents.block_mask)
    if torch.compiler.is_compiling():
        y_BHTK: Tensor = _whole(q_BHTK, k_BHTK, v_BHTK, documents.begin_BT)[0]
        return y_BHTK
    pieces = documents.pieces
    if pieces is None or len(documents.begin_BT) != len(q_BHTK):
        pieces = cut(documents.begin_BT.expand(len(q_BHTK), -1), q_BHTK.dtype)
    return _in_pieces(q_BHTK, k_BHTK, v_BHTK, pieces)


# --- CPU: piece by piece --------------------------------------------------------------------------


def cut(begin_BT: Tensor, dtype: torch.dtype) -> Pieces:
    """Return the pieces of rows; ``dtype`` is that of their masks.

    Where a row is cut depends on that row alone, so that the loss of rows does not depend on those
    beside them.
    """
    rows, length = begin_BT.shape
    places_T = torch.arange(length, device=begin_BT.device)
    begins = (begin_BT == places_T).flatten().nonzero()[:, 0].tolist()
    cuts: list[int] = []
    alone: list[bool] = []
    for begin, end in pairwise([*begins, rows * length]):
        if begin % length and end - cuts[-1] <= TOGETHER:
            alone[-1] = False
        else:
            cuts.append(begin)
            alone.append(True)
    lengths = [end - begin for begin, end in pairwise([*cuts, rows * length])]
    masks = [
        None if single else _mask(begin_L, dtype)
        for begin_L, single in zip(begin_BT.flatten().split(lengths), alone, strict=True)
    ]
    return Pieces(lengths, masks)


def _mask(begin_L: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the logits of a piece. Not a bool mask, of which every block would
    make such a one and keep it for its backward.
    """
    seen_LL = (begin_L[:, None] == begin_L).tril()
    return torch.zeros_like(seen_LL, dtype=dtype).masked_fill_(~seen_LL, -torch.inf)


def _in_pieces(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, pieces: Pieces) -> Tensor:
    if len(pieces.lengths) == len(q_BHTK) and not any(
        mask is not None for mask in pieces.masks
    ):  # each row is of one document
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
    parts = (_split(x_BHTK, pieces.lengths) for x_BHTK in (q_BHTK, k_BHTK, v_BHTK))
    found = (
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        for q, k, v, mask in zip(*parts, pieces.masks, strict=True)
    )
    return _joined(found, len(q_BHTK))


def _split(x_BHTK: Tensor, lengths: list[int]) -> Iterator[Tensor]:
    """Return the pieces of rows, each (1, H, length, K); of rows that lie in memory token by token
    without a copy.
    """
    x_NHK = x_BHTK.transpose(1, 2).flatten(0, 1)
    # of split, and not of slices, the backward pass is one copy
    return (piece.transpose(0, 1)[None] for piece in x_NHK.split(lengths))


def _joined(pieces: Iterable[Tensor], rows: int) -> Tensor:
    """Return the rows of pieces as (B, H, T, K), in memory token by token."""
    x_NHK = torch.cat([piece[0].transpose(0, 1) for piece in pieces])
    x_BTHK: Tensor = x_NHK.unflatten(0, (rows, -1))
    return x_BTHK.transpose(1, 2)


# --- CPU, compiled: the same as one operation -----------------------------------------------------
#
# The cuts are other ones in each batch, and a graph of pieces would be compiled again for each.


@torch.library.custom_op("dnt_scale::document_attention", mutates_args=())
def _whole(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, begin_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Return attention inside documents, and log(sum(exp(logits))) of each query: (1, H, N), at
    least fp32.
    """
    pieces = cut(begin_BT, q_BHTK.dtype)
    parts = (_split(x_BHTK, pieces.lengths) for x_BHTK in (q_BHTK, k_BHTK, v_BHTK))
    found = [
        _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=mask
        )
        for q, k, v, mask in zip(*parts, pieces.masks, strict=True)
    ]
    return _joined((y for y, _ in found), len(q_BHTK)), torch.cat([lse for _, lse in found], dim=2)


@_whole.register_fake
def _(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, begin_BT: Tensor) -> tuple[Tensor, Tensor]:
    rows, heads, length, _ = q_BHTK.shape
    wide = torch.promote_types(q_BHTK.dtype, torch.float32)
    return _token_by_token(q_BHTK), q_BHTK.new_empty(1, heads, rows * length, dtype=wide)


@torch.library.custom_op("dnt_scale::document_attention_backward", mutates_args=())
def _whole_backward(
    gradient_BHTK: Tensor,
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    y_BHTK: Tensor,
    lse_1HN: Tensor,
    begin_BT: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    pieces = cut(begin_BT, q_BHTK.dtype)
    parts = (
        _split(x_BHTK, pieces.lengths) for x_BHTK in (gradient_BHTK, q_BHTK, k_BHTK, v_BHTK, y_BHTK)
    )
    found = [
        _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *given, 0.0, mask is None, attn_mask=mask
        )
        for *given, mask in zip(
            *parts, lse_1HN.split(pieces.lengths, dim=2), pieces.masks, strict=True
        )
    ]
    dq, dk, dv = (_joined(gradients, len(q_BHTK)) for gradients in zip(*found, strict=True))
    return dq, dk, dv


@_whole_backward.register_fake
def _(
    gradient_BHTK: Tensor,
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    y_BHTK: Tensor,
    lse_1HN: Tensor,
    begin_BT: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return _token_by_token(q_BHTK), _token_by_token(k_BHTK), _token_by_token(v_BHTK)


def _token_by_token(x_BHTK: Tensor) -> Tensor:
    """Return an empty tensor of the shape and dtype, laid out as `_joined` does."""
    rows, heads, length, width = x_BHTK.shape
    return x_BHTK.new_empty(rows, length, heads, width).transpose(1, 2)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BHTK, k_BHTK, v_BHTK, begin_BT = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q_BHTK, k_BHTK, v_BHTK, *output, begin_BT)


def _gradients(ctx: Any, gradient_BHTK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_whole_backward(gradient_BHTK, *ctx.saved_tensors), None


_whole.register_autograd(_gradients, setup_context=_keep)


# --- CUDA: block by block -------------------------------------------------------------------------


def block_mask(begin_BT: Tensor) -> "BlockMask":
    """Return FlexAttention's mask. Nothing is read on the host.

    Of the blocks of keys that a block of queries sees anything of, those are told apart that lie
    before it and in its last query's document: all of its queries see all of them.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = begin_BT.shape[1]
    first_BS = begin_BT[:, ::BLOCK]  # of each of S blocks of queries the earliest key
    last_BS = begin_BT[:, BLOCK - 1 :: BLOCK]  # and the earliest of its last query
    # a block that the row's end cuts short sees no other in full, as in torch's own masks
    last_BS = F.pad(last_BS, (0, first_BS.shape[1] - last_BS.shape[1]), value=length)
    blocks_S = torch.arange(first_BS.shape[1], device=begin_BT.device)
    before_SS = blocks_S < blocks_S[:, None]
    seen_BSS = (blocks_S <= blocks_S[:, None]) & (blocks_S >= first_BS[..., None] // BLOCK)
    full_BSS = before_SS & (blocks_S * BLOCK >= last_BS[..., None])

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= begin_BT[row, query])

    return BlockMask.from_kv_blocks(
        *_numbers(seen_BSS & ~full_BSS),
        *_numbers(full_BSS),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def _numbers(chosen_BSS: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks of keys are chosen for each of queries, int32 (B, 1, S), and which,
    int32 (B, 1, S, S), those in front.
    """
    chosen = chosen_BSS[:, None].int()
    count = chosen.sum(dim=-1, dtype=torch.int32)
    return count, chosen.argsort(dim=-1, descending=True, stable=True).int()


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    whole: Callable[..., Tensor] = torch.compile(flex_attention)
    return whole


def _in_blocks(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: "BlockMask") -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    width = q_BHTK.shape[-1]
    missing = max(0, LEAST_HEAD - width)  # zeros, which change no logit
    q, k, v = (F.pad(x, (0, missing)) if missing else x for x in (q_BHTK, k_BHTK, v_BHTK))
    # what compiles a block compiles this with it
    inside: Callable[..., Tensor] = flex_attention
    function = inside if torch.compiler.is_compiling() else _compiled()
    y_BHTK = function(q, k, v, block_mask=mask, scale=width**-0.5)
    return y_BHTK[..., :width]


# Under which names attention inside documents is one operation, for selective recomputation.
OPERATIONS = [
    torch.ops.dnt_scale.document_attention.default,
    torch.ops.higher_order.flex_attention,
]
