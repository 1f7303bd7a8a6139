"""Root-mean-square norms and matrix products of training on a CPU, faster than torch's own there.

Torch has no kernel of its own for `F.rms_norm` on CPUs: its backward is some ten operations, each a
pass over memory, and keeps what they need. And its fp32 products are MKL's, which has its fastest
kernels for Intel's processors only; oneDNN, which torch brings too, asks what the processor can do
and not who made it. Numbers are in the lab log, 2026-11-30.

Everywhere else (no gradient wanted, another device, inside of `torch.compile` or of `torch.func`)
these are torch's operators themselves.
"""

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# what recomputation keeps, beside torch's own products
OPERATIONS = (
    [torch.ops.mkldnn._linear_pointwise.default]
    if hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else []
)
# multiplications of a product: below it what is saved is no more than Python's part of the call
WORTH_CALLING = 1 << 22


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Return x gain / sqrt(mean(x^2) + eps) over the last dimension: of x's shape and dtype."""
    if _trains_on_cpu(x) and x.dtype in (torch.float32, torch.bfloat16):
        y: Tensor = _RMSNorm.apply(x, gain, eps)  # type: ignore[no-untyped-call]
        return y
    return F.rms_norm(x, (x.shape[-1],), gain, eps)


class Linear(nn.Linear):
    """`nn.Linear`, by oneDNN where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``F.linear(x, weight, bias)``, by oneDNN where that is faster."""
    if _trains_on_cpu(x) and faster_by_onednn(x, weight):
        y: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return F.linear(x, weight, bias)


def product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return x W^T, by oneDNN where that is faster, else in ``out``.

    For the forward of an ``autograd.Function``, whose backward is its own.
    """
    if faster_by_onednn(x, weight):
        return _product(x, weight, None)
    return torch.mm(x, weight.t(), out=out)


def faster_by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether x W^T is faster by oneDNN, as far as is known beforehand."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= WORTH_CALLING
        and type(x) is Tensor  # neither a fake tensor nor one of several devices
        and prefers_onednn()
    )


@cache
def prefers_onednn() -> bool:
    """Whether fp32 products are faster by oneDNN than by MKL: on x86 with AVX-512 that is not
    Intel's.

    It is asked of the processor and not measured, so that a resume rounds as the run before it.
    """
    return (
        platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and bool(OPERATIONS)
        and _vendor() not in ("", "GenuineIntel")
    )


def _vendor() -> str:
    """Return who made the processor, as Linux says; "" where it is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def _trains_on_cpu(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # which fuses norms itself
        and not torch._C._are_functorch_transforms_active()
    )


class _RMSNorm(torch.autograd.Function):
    """Keeps x and a number a row for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        wide = x.float()
        squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, inverse)
        y: Tensor = (wide * inverse).mul_(gain).to(x.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
        # LayerNorm's kernel, told that all means are 0, is one pass. Its gradient also subtracts
        # what goes through the mean, mean(grad_y gain) / rms, which is added again.
        x, gain, inverse = ctx.saved_tensors
        size = x.shape[-1]
        wide_y, wide_gain = grad_y.float().contiguous(), gain.float()
        grad_x, grad_gain, _ = torch.ops.aten.native_layer_norm_backward(
            wide_y,
            x.float(),
            [size],
            torch.zeros_like(inverse),
            inverse,
            wide_gain,
            None,
            [True, True, False],
        )
        through_mean = (wide_y @ wide_gain).unsqueeze(-1).mul_(inverse).div_(size)
        return grad_x.add_(through_mean).to(x.dtype), grad_gain.to(gain.dtype), None


class _Linear(torch.autograd.Function):
    """The products of forward and backward; a square weight's gradient is MKL's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad_y.reshape(-1, grad_y.shape[-1])
        return (
            _product(rows, weight.t(), None).view(x.shape) if of_x else None,
            _of_weight(rows, x.reshape(-1, x.shape[-1])) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _of_weight(grad_y: Tensor, x: Tensor) -> Tensor:
    """Return grad_y^T x. oneDNN is the faster one where the product has more columns than rows."""
    outputs, inputs = grad_y.shape[1], x.shape[1]
    if outputs == inputs:
        return grad_y.t() @ x
    if outputs < inputs:
        return _product(grad_y.t(), x.t(), None)
    return _product(x.t(), grad_y.t(), None).t()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
