"""The compiled update gives the very bits of torch's operations, and does without a compiler."""

import os

import pytest
import torch
from torch import Tensor, nn

from dnt_scale.optim import fused_cpu, one_pass
from tests.helpers.optimizers import new_msgdw

SIZES = [1, 7, 16, 1000, 65_536, 65_537, 1_000_003]


def after_steps(
    seed: int, *, momentum: float, dampening: float, weight_decay: float
) -> list[Tensor]:
    """Weights and buffers after three steps; gradients are tiny, huge and usual, and some rows
    have none.
    """
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES]
    groups = [{"params": params}]
    optimizer = new_msgdw(
        groups, lr=0.07, momentum=momentum, dampening=dampening, weight_decay=weight_decay
    )
    for scale in (1e-30, 1e3, 1.0):
        for p in params:
            p.grad = scale * torch.randn(p.shape, generator=generator)
            p.grad[::5] = 0
        optimizer.step()
    return [p.detach() for p in params] + [optimizer.state[p]["momentum_buffer"] for p in params]


@pytest.mark.skipif(fused_cpu.load() is None, reason="no C compiler here")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("momentum", "dampening"), [(0.9, 0.0), (0.9, 0.9), (0.0, 0.3), (0.99, 1 / 3)]
)
def test_the_kernel_gives_the_bits_of_torchs_operations(
    momentum: float,
    dampening: float,
    weight_decay: float,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ends = []
        for worth in (0, 1 << 40):
            monkeypatch.setattr(one_pass, "WORTH_COMPILING", worth)
            ends.append(
                after_steps(3, momentum=momentum, dampening=dampening, weight_decay=weight_decay)
            )
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32)), (a.shape, (a - b).abs().max())


@pytest.mark.skipif(fused_cpu.load() is None, reason="no C compiler here")
def test_what_is_not_finite_is_not_hidden() -> None:
    update = fused_cpu.load()
    assert update is not None
    p, v, g = torch.ones(3), torch.zeros(3), torch.tensor([torch.inf, torch.nan, 1.0])
    update([p], [v], [g], 0.9, 1.0, 1.0, 0.5)
    assert (
        v[0] == torch.inf
        and p[0] == -torch.inf
        and v[1].isnan()
        and p[1].isnan()
        and (p[2], v[2]) == (0.5, 1.0)
    )


@pytest.mark.parametrize("compiler", ["there-is-no-such-compiler", "false"])
def test_without_a_compiler_torch_steps(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_pass, "WORTH_COMPILING", 0)
    options = {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}
    expected = after_steps(5, **options)
    monkeypatch.setenv("CC", compiler)
    fused_cpu.load.cache_clear()
    try:
        assert fused_cpu.load() is None
        assert all(
            torch.equal(a, b) for a, b in zip(after_steps(5, **options), expected, strict=True)
        )
    finally:
        fused_cpu.load.cache_clear()


@pytest.mark.skipif(fused_cpu.load() is None, reason="no C compiler here")
def test_the_compiler_may_have_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{os.environ.get('CC') or 'cc'} -g")
    fused_cpu.load.cache_clear()
    try:
        assert fused_cpu.load() is not None
    finally:
        fused_cpu.load.cache_clear()
