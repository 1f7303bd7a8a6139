"""The momentum on its own: gradients added as backward makes them, buffers of bf16, allocation,
going on.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dnt_scale.optim.algorithms.adamw import AdamWConfig
from dnt_scale.optim.algorithms.msgdw import MSGDWConfig
from dnt_scale.optim.build import build_optimizer
from dnt_scale.optim.sharded_optimizer import ShardedOptimizer
from dnt_scale.optim.stochastic_rounding import stochastic_bf16
from tests.helpers.optimizers import new_msgdw, new_optimizer

SHAPES = [(7,), (3, 5), (1,), (64, 33), (200, 1000)]
PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)


def drawn(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def build(**options: Any) -> tuple[ShardedOptimizer, list[nn.Parameter]]:
    params = [nn.Parameter(value) for value in drawn(1000)]
    matrices = [p for p in params if p.ndim == 2]
    rows = {"params": matrices[:1], "update": "row_normalized", "lr": 0.05}
    groups = [
        rows,
        {"params": matrices[1:]},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return new_msgdw(groups, **{"lr": 0.1, "weight_decay": 0.02, **options}), params


def usual_step(optimizer: ShardedOptimizer, params: list[nn.Parameter], step: int) -> None:
    for parameter, gradient in zip(params, drawn(step), strict=True):
        parameter.grad = gradient
    optimizer.updates = step
    optimizer.step()


def buffers(optimizer: ShardedOptimizer, params: list[nn.Parameter]) -> list[Tensor]:
    return [optimizer.state[p]["momentum_buffer"] for p in params]


# ---------------------------------------------------------------- without a gradient buffer


@pytest.mark.parametrize("scale", [1.0, torch.tensor(1.0)])
@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dampening", [0.0, 0.9])
def test_adding_then_applying_is_a_step(
    dampening: float, momentum_dtype: torch.dtype | None, scale: float | Tensor
) -> None:
    whole, one = build(dampening=dampening, momentum_dtype=momentum_dtype)
    parts, other = build(dampening=dampening, momentum_dtype=momentum_dtype)
    for step in range(5):
        usual_step(whole, one, step)
        parts.updates = step
        # as backward has them
        for parameter, gradient in reversed(list(zip(other, drawn(step), strict=True))):
            parts.add_gradient(parameter, gradient, scale=scale, first=True)
        parts.apply()
    for a, b in zip([*one, *buffers(whole, one)], [*other, *buffers(parts, other)], strict=True):
        assert torch.equal(a, b)


def test_micro_batches_add_up_and_only_the_first_decays() -> None:
    optimizer, params = build(dampening=0.3)
    usual_step(optimizer, params, 0)
    expected = [
        0.9 * v + 0.7 * 0.5 * (a + 2 * b)
        for v, a, b in zip(buffers(optimizer, params), drawn(1), drawn(2), strict=True)
    ]
    before = [p.detach().clone() for p in params]
    for parameter, a, b in zip(params, drawn(1), drawn(2), strict=True):
        optimizer.add_gradient(parameter, a, scale=0.5, first=True)
        optimizer.add_gradient(parameter, b.double(), scale=torch.tensor(1.0), first=False)
    for found, wanted in zip(buffers(optimizer, params), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert all(torch.equal(p, was) for p, was in zip(params, before, strict=True))  # until apply
    optimizer.apply()
    assert not any(torch.equal(p, was) for p, was in zip(params, before, strict=True))


def test_what_is_added_is_left_as_it_was() -> None:
    for momentum_dtype in (None, torch.bfloat16):
        optimizer, params = build(momentum_dtype=momentum_dtype)
        gradients = drawn(3)
        for parameter, gradient in zip(params, gradients, strict=True):
            optimizer.add_gradient(parameter, gradient, scale=0.3, first=True)
        assert all(torch.equal(a, b) for a, b in zip(gradients, drawn(3), strict=True))


# ---------------------------------------------------------------- bf16, rounded stochastically


def rounded(values: Tensor, seed: int) -> Tensor:
    return stochastic_bf16(values, torch.Generator().manual_seed(seed))


@PROPERTY
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50),
    st.integers(0, 99),
)
def test_a_value_becomes_one_of_its_two_neighbours(numbers: list[float], seed: int) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    toward_zero = (values.view(torch.int32) & -0x10000).view(torch.float32)
    away = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    found = rounded(values, seed).float()
    exact = toward_zero == values
    assert torch.equal(found[exact], values[exact])
    assert ((found == toward_zero) | (found == away))[~exact].all()


def test_the_expectation_is_exact() -> None:
    """Over many draws the mean error of each value is within 5 standard errors, in both
    directions of the sign.
    """
    draws, count = 40_000, 64
    values = torch.randn(
        count, generator=torch.Generator().manual_seed(4)
    ) * 10.0 ** torch.linspace(-8, 8, count)
    # next to a bf16, and a denormal
    values[:3] = torch.tensor([1 + 2**-15, 1 + 2**-8 - 2**-15, -3e-39])
    found = rounded(values.repeat(draws), 1).double().view(draws, count)
    spacing = 2.0 ** (torch.frexp(values.double()).exponent - 8).clamp(min=-133)
    error = (found.mean(0) - values.double()) / spacing
    # rounds up with this probability, on the positive side
    part = (values.double() / spacing).remainder(1)
    standard_error = (part * (1 - part) / draws).sqrt()
    assert (error.abs() <= 5 * standard_error + 1e-12).all(), error
    assert (found != values).any(0)[:3].all()  # also the rare direction happens
    nearest = values.to(torch.bfloat16).double() - values.double()
    # which rounding to nearest would not pass
    assert nearest.abs().sum() > 50 * (error * spacing).abs().sum()


@pytest.mark.parametrize(
    "bits", [0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000]
)
def test_what_is_not_finite_stays_so(bits: int) -> None:
    signed = bits - (1 << 32) if bits >> 31 else bits
    values = torch.full((999,), signed, dtype=torch.int32).view(torch.float32)
    assert not rounded(values, 1).isfinite().any()


def test_all_sixteen_bits_are_drawn_evenly() -> None:
    """1 + k/2^16 spacings round up with probability k/2^16, for every position of four values in
    a 64-bit draw.
    """
    draws = 1 << 18
    for k in (1 << 14, 1 << 15, 3 << 14):
        value = torch.tensor([0x3F800000 + k], dtype=torch.int32).view(torch.float32)
        up = (rounded(value.repeat(draws), k).float() > 1).view(-1, 4).double().mean(0)
        expected = k / (1 << 16)
        assert (
            (up - expected).abs() < 5 * math.sqrt(expected * (1 - expected) / (draws / 4))
        ).all(), (k, up)


def test_bf16_momentum_takes_two_bytes_and_follows_fp32() -> None:
    exact, one = build()
    short, other = build(momentum_dtype=torch.bfloat16)
    start = [p.detach().clone() for p in one]
    for step in range(40):
        usual_step(exact, one, step)
        usual_step(short, other, step)
    assert all(v.dtype == torch.bfloat16 for v in buffers(short, other))
    for a, b, was in zip(one, other, start, strict=True):
        if a.numel() > 1:
            assert (a - b).norm() < 0.02 * (a - was).norm()


def test_small_gradients_are_not_lost_in_bf16() -> None:
    """Without decay of the buffer, 400 gradients of 1/1000 of a bf16 spacing each would all
    round away.
    """
    parameter = nn.Parameter(torch.zeros(20_000))
    optimizer = new_msgdw([{"params": [parameter]}], lr=0.0, momentum_dtype=torch.bfloat16, seed=3)
    optimizer.add_gradient(parameter, torch.ones(20_000), scale=1.0, first=True)
    for _ in range(400):
        optimizer.add_gradient(parameter, torch.full((20_000,), 2.0**-17), scale=1.0, first=False)
    mean = optimizer.state[parameter]["momentum_buffer"].double().mean()
    assert float(mean) == pytest.approx(1 + 400 * 2**-17, abs=3e-4)


def test_the_draws_are_the_optimizers_own_and_a_resumed_run_repeats_them() -> None:
    def run(
        seed: int, disturb: Callable[[], object] = lambda: None, stop: int | None = None
    ) -> list[Tensor]:
        optimizer, params = build(momentum_dtype=torch.bfloat16, seed=seed)
        for step in range(6):
            disturb()
            if step == stop:
                old = [*params, *buffers(optimizer, params)]
                optimizer, params = build(momentum_dtype=torch.bfloat16, seed=seed)
                with torch.no_grad():
                    for new, value in zip([*params, *buffers(optimizer, params)], old, strict=True):
                        new.copy_(value)
                optimizer.set_updates(step)
            usual_step(optimizer, params, step)
        return [*params, *buffers(optimizer, params)]

    before = torch.get_rng_state()
    first = run(1)
    assert torch.equal(torch.get_rng_state(), before)
    for again in (run(1, disturb=lambda: torch.rand(3)), run(1, stop=3)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, run(2), strict=True))


def test_updates_parameters_and_micro_batches_draw_differently() -> None:
    params = [nn.Parameter(torch.zeros(1000)) for _ in range(2)]
    optimizer = new_msgdw([{"params": params}], lr=0.0, momentum=0.0, momentum_dtype=torch.bfloat16)
    halfway = torch.full((1000,), 1 + 2**-8)  # between two bf16
    found = []
    for optimizer.updates in range(2):
        for parameter in params:
            optimizer.add_gradient(parameter, halfway, scale=1.0, first=True)
            found.append(optimizer.state[parameter]["momentum_buffer"] > 1)
            optimizer.add_gradient(
                parameter,
                halfway - optimizer.state[parameter]["momentum_buffer"],
                scale=1.0,
                first=False,
            )
            found.append(optimizer.state[parameter]["momentum_buffer"] > 1)
    for i, one in enumerate(found):
        for other in found[:i]:
            assert 350 < int((one == other).sum()) < 650


# ---------------------------------------------------------------- allocation, and going on


@pytest.mark.parametrize(
    "config", [MSGDWConfig(algorithm="msgdw", lr=0.1), AdamWConfig(algorithm="adamw", lr=0.1)]
)
def test_state_can_be_allocated_for_what_replaces_the_parameters(
    config: MSGDWConfig | AdamWConfig,
) -> None:
    optimizer = build_optimizer([("a", nn.Parameter(torch.ones(4, 3)))], config, 1)
    assert not optimizer.state
    flat = torch.ones(6)  # half of it, as on one of two ranks
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.allocate()
    assert list(optimizer.state) == [flat]
    flat.grad = torch.ones(6)
    optimizer.step()
    assert not torch.equal(flat, torch.ones(6))


def test_adamw_goes_on_with_its_bias_correction() -> None:
    def build() -> tuple[ShardedOptimizer, nn.Parameter]:
        parameter = nn.Parameter(torch.ones(5))
        config = AdamWConfig(algorithm="adamw", lr=0.1)
        return new_optimizer([("a", parameter)], config, 1), parameter

    def step(optimizer: ShardedOptimizer, parameter: nn.Parameter, number: int) -> None:
        parameter.grad = torch.randn(5, generator=torch.Generator().manual_seed(number))
        optimizer.step()

    straight, one = build()
    for number in range(6):
        step(straight, one, number)
    stopped, other = build()
    for number in range(3):
        step(stopped, other, number)
    resumed, last = build()
    with torch.no_grad():
        last.copy_(other)
        for key in ("exp_avg", "exp_avg_sq"):
            resumed.state[last][key].copy_(stopped.state[other][key])
    resumed.set_updates(3)
    for number in range(3, 6):
        step(resumed, last, number)
    assert torch.equal(one, last)


def test_momentum_dtype_is_what_the_config_says() -> None:
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        config = MSGDWConfig.model_validate(
            {"algorithm": "msgdw", "lr": 0.1, "momentum_dtype": name}
        )
        optimizer = new_optimizer([("a", nn.Parameter(torch.ones(4, 3)))], config, 7)
        assert optimizer._bits.seed == 7
        assert [state["momentum_buffer"].dtype for state in optimizer.state.values()] == [dtype]
