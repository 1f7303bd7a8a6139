"""Norms and matrix products of training on a CPU are torch's, but for rounding."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dnt_scale.model import cpu_ops

EPS = 1e-6
UNITS = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # of the largest number of a result


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prefer oneDNN whatever the processor, and count its products."""
    if not cpu_ops.OPERATIONS:
        pytest.skip("this torch has no oneDNN")
    products: list[int] = []
    product = cpu_ops._product

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        products.append(1)
        return product(x, weight, bias)

    monkeypatch.setattr(cpu_ops, "prefers_onednn", lambda: True)
    monkeypatch.setattr(cpu_ops, "_product", counted)
    return products


def with_gradients(
    function: Callable[..., Tensor], given: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Return the result and its gradients by ``given``, computed in a dtype: float64."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in given]
    result = function(*leaves)
    weights = torch.linspace(-1, 2, result.numel(), dtype=torch.float64).view(result.shape)
    result.backward(weights.to(dtype))
    found = [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    assert [tensor.dtype for tensor in found] == [dtype] * (1 + len(given))
    return [tensor.double() for tensor in found]


def assert_alike(ours: Sequence[Tensor], right: Sequence[Tensor], unit: float) -> None:
    for own, expected in zip(ours, right, strict=True):
        assert own.shape == expected.shape
        assert (own - expected).abs().max() <= unit * expected.abs().max()


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scale", [1e-4, 1.0])  # at 1e-4 eps is 100 times the mean square
def test_norm_and_its_gradients(dtype: torch.dtype, transposed: bool, scale: float) -> None:
    x = (scale * torch.randn(3, 5, 4, 48)).to(dtype).float()
    gain = torch.linspace(0.5, 1.5, 48).to(dtype).float()

    def normalised(
        norm: Callable[[Tensor, Tensor], Tensor],
    ) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, gain: norm(x.transpose(1, 2) if transposed else x, gain)

    right = with_gradients(
        normalised(lambda x, gain: F.rms_norm(x, (48,), gain, EPS)), (x, gain), torch.float64
    )
    ours = with_gradients(
        normalised(lambda x, gain: cpu_ops.rms_norm(x, gain, EPS)), (x, gain), dtype
    )
    assert_alike(ours, right, UNITS[dtype])


# as many outputs as inputs, more, fewer: the weight's gradient is made in another order for each
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 128), (64, 256), (256, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_product_and_its_gradients(
    inputs: int, outputs: int, bias: bool, by_onednn: list[int]
) -> None:
    given = [torch.randn(4, 100, inputs), torch.randn(outputs, inputs)]
    given += [torch.randn(outputs)] if bias else []
    right = with_gradients(F.linear, given, torch.float64)
    ours = with_gradients(cpu_ops.linear, given, torch.float32)
    assert_alike(ours, right, 1e-5)
    assert len(by_onednn) == (2 if inputs == outputs else 3)


def test_what_needs_no_gradient_costs_no_product(by_onednn: list[int]) -> None:
    weight = torch.randn(128, 128)
    x = torch.randn(400, 128, requires_grad=True)
    cpu_ops.linear(x, weight).sum().backward()
    assert len(by_onednn) == 2 and weight.grad is None


def test_small_products_and_other_dtypes_are_torchs(by_onednn: list[int]) -> None:
    cpu_ops.linear(torch.randn(2, 8, requires_grad=True), torch.randn(4, 8)).sum().backward()
    large = torch.randn(400, 128, dtype=torch.bfloat16, requires_grad=True)
    cpu_ops.linear(large, torch.randn(128, 128, dtype=torch.bfloat16)).sum().backward()
    assert by_onednn == []


def test_without_a_gradient_bits_are_torchs(by_onednn: list[int]) -> None:
    x, gain, weight = torch.randn(4, 100, 128), torch.randn(128), torch.randn(128, 128)
    with torch.no_grad():
        assert torch.equal(cpu_ops.rms_norm(x, gain, EPS), F.rms_norm(x, (128,), gain, EPS))
        assert torch.equal(cpu_ops.linear(x, weight), F.linear(x, weight))
    assert by_onednn == []


def test_derivatives_by_torch_func(by_onednn: list[int]) -> None:
    x, gain, weight = torch.randn(4, 100, 128), torch.randn(128), torch.randn(128, 128)

    def both(x: Tensor) -> Tensor:
        return cpu_ops.linear(cpu_ops.rms_norm(x, gain, EPS), weight)

    y, moved = torch.func.jvp(both, (x,), (x,))  # along x a norm does not change, but for eps
    assert moved.abs().max() < 1e-4 * y.abs().max()
    assert torch.func.vjp(both, x)[1](y)[0].shape == x.shape


@pytest.mark.parametrize(
    ("text", "vendor"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\n", "AuthenticAMD"),
        ("vendor_id\t: GenuineIntel\n", "GenuineIntel"),
        ("Features\t: fp asimd\n", ""),
        (None, ""),
    ],
)
def test_who_made_the_processor(
    text: str | None, vendor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(self: Path, errors: str) -> str:
        if text is None:
            raise FileNotFoundError(str(self))
        return text

    monkeypatch.setattr(Path, "read_text", read_text)
    assert cpu_ops._vendor() == vendor
