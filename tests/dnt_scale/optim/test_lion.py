"""Lion against its formula, and what it cannot do."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dnt_scale.config import ConfigError, load
from dnt_scale.optim.algorithms.lion import LionConfig
from dnt_scale.optim.update_rule import UpdateRule
from tests.helpers.optimizers import drive, new_optimizer, tensors

# The run that tests/dnt_scale/test_matrix.py compares with `reference_update`. Where rounding turns
# a sign, a weight is 2 lr off, which is 2.5 % of what a gain of 64 elements changes by.
OVERRIDES = ["optim=lion", "optim.lr=1e-3"]
CHANGES = {"fp32": 3e-2}
ERROR = 1e-2


def reference_update(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    optim: LionConfig,
    update: UpdateRule,
    lr: float,
    decay: float,
) -> None:
    m, (b1, b2) = state.setdefault("momentum_buffer", torch.zeros_like(weight)), optim.betas
    direction = torch.sign(b1 * m + (1 - b1) * gradient)
    weight.copy_((1 - lr * decay) * weight - lr * direction)
    m.copy_(b2 * m + (1 - b2) * gradient)


def lion(weight: nn.Parameter, **fields: object) -> torch.optim.Optimizer:
    config = LionConfig.model_validate({"algorithm": "lion", "lr": 0.01, **fields})
    return new_optimizer([("weight", weight)], config, seed=1)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.8)])
def test_it_is_algorithm_2_of_the_paper(betas: tuple[float, float], weight_decay: float) -> None:
    [start] = tensors([(40, 9)], 1000, torch.float64)
    weight = nn.Parameter(start.clone())
    drive(lion(weight, betas=betas, weight_decay=weight_decay), [weight], 30)
    p, m = start.numpy().copy(), np.zeros((40, 9))
    for step in range(30):
        g = tensors([(40, 9)], step, torch.float64)[0].numpy()
        update = np.sign(betas[0] * m + (1 - betas[0]) * g)
        p = p - 0.01 * (update + weight_decay * p)
        m = betas[1] * m + (1 - betas[1]) * g
    np.testing.assert_allclose(weight.detach().numpy(), p, rtol=0, atol=1e-14)


def test_every_weight_moves_by_lr_and_those_without_a_gradient_stay() -> None:
    weight = nn.Parameter(torch.zeros(4, 3))
    gradient = 10.0 ** torch.arange(-9, 3).float().view(4, 3)
    gradient[2] = 0
    drive(lion(weight), [weight], 1, lambda _: [gradient])
    expected = torch.full((4, 3), -0.01)
    expected[2] = 0
    assert torch.equal(weight.detach(), expected)


def test_momentum_in_bf16_is_near_that_in_fp32() -> None:
    exact, short = (nn.Parameter(tensors([(64, 33)], 1000)[0]) for _ in range(2))
    drive(lion(exact), [exact], 40)
    optimizer = lion(short, momentum_dtype="bf16")
    drive(optimizer, [short], 40)
    assert optimizer.state[short]["momentum_buffer"].dtype == torch.bfloat16
    assert float((exact != short).float().mean()) < 0.2
    assert (exact - short).norm() < 0.1 * (exact - tensors([(64, 33)], 1000)[0]).norm()


def test_without_a_gradient_buffer_it_is_refused() -> None:
    chosen = ["optim=lion", "optim.gradient_buffer=false", "run.name=x", "data.path=x"]
    with pytest.raises(
        ConfigError, match="optim: lion steps by the gradient and the momentum"
    ) as e:
        load(chosen)
    assert "set gradient_buffer: true, or use optim=signum" in str(e.value)
