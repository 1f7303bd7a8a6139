"""The loss of a language model without its logits: those of some rows at a time, used up at once.

    l = head x,  with a cap  l = cap tanh(head x / cap)
    loss = sum over rows of  log Z - l[target] + z_loss log^2 Z,    Z = sum(exp(l))

Logits of all rows would be the largest tensor of a step, several times over: themselves, their
softmax, their gradient. Here the gradients of x and of the head are made along with the loss, from
the same logits, so that no product is computed twice; backward has but to multiply them by the
gradient of the loss, a scalar (Liger Kernel, arXiv 2410.10989, does so too).

Shapes in names: N rows (tokens), P those of a piece, D width, V vocabulary, R rows of the head,
which are the vocabulary and its padding.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dnt_scale.model import cpu_ops
from dnt_scale.model.batch import IGNORED

# Rows that have logits at a time. Each piece reads and writes the head's gradient once, which is
# small beside its products from some hundred rows on (measured on a CPU). For CUDA by arithmetic,
# not measured: with 2,048 rows that takes about a seventh of the time of the products.
PIECE_ROWS = {"cpu": 256, "cuda": 2048}
# Rows of the head whose gradient is added at a time where it has to be converted: on a CPU torch
# converts into a tensor of its own before it adds.
CONVERTED_ROWS = 1024


def linear_cross_entropy(
    x_ND: Tensor,
    head_RD: Tensor,
    targets_N: Tensor,
    vocab_size: int,
    logit_cap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the loss summed over the targets that count, and which part of it is the z-loss.

    Only the loss has a gradient, for one backward, which scales it in place: a second one raises
    torch's RuntimeError. Under ``no_grad`` no gradient is made.

    Args:
        x_ND: in the compute dtype, in which products are made; sums are made in fp32 or wider.
        head_RD: in the same dtype. Rows from ``vocab_size`` on are padding, which no softmax sees.
        targets_N: int64 ids of tokens; ``IGNORED`` ones do not count.
        logit_cap: logits become cap tanh(logits / cap).
        z_loss: the factor of log^2 Z (PaLM, arXiv 2204.02311, section 5).

    Returns:
        Two scalars, nats: fp32, or float64 of float64.
    """
    differentiate = torch.is_grad_enabled()
    found: tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_ND, head_RD, targets_N, vocab_size, logit_cap, z_loss, differentiate
    )
    return found


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        head_RD: Tensor,
        targets_N: Tensor,
        vocab_size: int,
        logit_cap: float | None,
        z_loss: float,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = PIECE_ROWS.get(x_ND.device.type, PIECE_ROWS["cuda"])
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        of_x, of_head = (differentiate and needed for needed in ctx.needs_input_grad[:2])
        # wide until backward has scaled them, so that what is rounded is rounded once
        grad_x_ND = torch.empty_like(x_ND, dtype=wide) if of_x else None
        grad_head_RD = torch.zeros_like(head_RD, dtype=wide) if of_head else None
        loss, z_part = (x_ND.new_zeros((), dtype=wide) for _ in range(2))
        # one for all pieces: the system is slow to give and to take back blocks of this size
        buffer_PR = None
        if not cpu_ops.faster_by_onednn(x_ND[:rows], head_RD):  # which takes none
            buffer_PR = x_ND.new_empty(min(rows, len(x_ND)), len(head_RD))
        if converts := wide != x_ND.dtype:
            wide_PV = x_ND.new_empty(min(rows, len(x_ND)), vocab_size, dtype=wide)
        for begin in range(0, len(x_ND), rows):
            x_PD, targets_P = x_ND[begin : begin + rows], targets_N[begin : begin + rows]
            out_PR = None if buffer_PR is None else buffer_PR[: len(x_PD)]
            products_PR = cpu_ops.product(x_PD, head_RD, out_PR)
            logits_PV = products_PR[:, :vocab_size]
            if converts:
                logits_PV = wide_PV[: len(x_PD)].copy_(logits_PV)
            piece, z_piece = _losses(logits_PV, targets_P, logit_cap, z_loss, of_x or of_head)
            loss += piece
            z_part += z_piece
            # from here on the gradient of the products, in whose dtype they go on
            if converts:
                products_PR[:, :vocab_size] = logits_PV
            products_PR[:, vocab_size:] = 0
            if grad_x_ND is not None:
                grad_x_ND[begin : begin + rows] = cpu_ops.product(products_PR, head_RD.t())
            if grad_head_RD is not None:
                _add_product(grad_head_RD, products_PR, x_PD)
            del products_PR, logits_PV  # before the next ones are made
        ctx.save_for_backward(grad_x_ND, grad_head_RD)
        ctx.dtypes = x_ND.dtype, head_RD.dtype
        ctx.mark_non_differentiable(z_part)
        return loss, z_part

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # in place, which torch finds out if they are asked for again
        gradients = (
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None, None, None, None)


def _losses(
    logits_PV: Tensor,
    targets_P: Tensor,
    logit_cap: float | None,
    z_loss: float,
    differentiate: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss of a piece and its z-loss, scalars.

    Args:
        logits_PV: not yet capped; overwritten, with ``differentiate`` by the gradient of the loss.
    """
    slope_PV = None
    if logit_cap is not None:
        logits_PV.div_(logit_cap).tanh_()
        if differentiate:
            slope_PV = logits_PV.square().neg_().add_(1)
        logits_PV.mul_(logit_cap)
    counts_P1 = (targets_P != IGNORED).to(logits_PV.dtype)[:, None]
    targets_P1 = targets_P.clamp(min=0)[:, None]

    highest_P1 = logits_PV.amax(dim=1, keepdim=True)
    logits_PV.sub_(highest_P1)
    own_P1 = logits_PV.gather(1, targets_P1)
    sums_P1 = logits_PV.exp_().sum(dim=1, keepdim=True)
    log_sums_P1 = sums_P1.log()
    log_z_P1 = log_sums_P1 + highest_P1
    z_part = z_loss * (log_z_P1.square() * counts_P1).sum()
    loss = ((log_sums_P1 - own_P1) * counts_P1).sum() + z_part
    if differentiate:
        logits_PV.mul_((1 + 2 * z_loss * log_z_P1) * counts_P1 / sums_P1)
        logits_PV.scatter_add_(1, targets_P1, -counts_P1)
        if slope_PV is not None:
            logits_PV.mul_(slope_PV)
    return loss, z_part


def _add_product(sum_RD: Tensor, grad_PR: Tensor, x_PD: Tensor) -> None:
    """Add grad^T x to the gradient of the head, which may be of a wider dtype than these."""
    if sum_RD.dtype == x_PD.dtype:
        sum_RD.addmm_(grad_PR.T, x_PD)
        return
    rows = CONVERTED_ROWS if sum_RD.device.type == "cpu" else len(sum_RD)
    parts = zip(sum_RD.split(rows), grad_PR.split(rows, dim=1), strict=True)
    for part_RD, part_PR in parts:
        part_RD.add_(part_PR.T @ x_PD)
