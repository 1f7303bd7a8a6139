"""Signum against its formula, also without a gradient buffer."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dnt_scale.config import load
from dnt_scale.optim.algorithms.signum import SignumConfig
from dnt_scale.optim.sharded_optimizer import ShardedOptimizer
from dnt_scale.optim.update_rule import UpdateRule
from tests.helpers.optimizers import drive, new_optimizer, tensors

# The run that tests/dnt_scale/test_matrix.py compares with `reference_update`. Where rounding turns
# a sign, a weight is 2 lr off, which is 2.5 % of what a gain of 64 elements changes by.
OVERRIDES = ["optim=signum", "optim.lr=1e-3"]
CHANGES = {"fp32": 3e-2}
ERROR = 1e-2


def reference_update(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    optim: SignumConfig,
    update: UpdateRule,
    lr: float,
    decay: float,
) -> None:
    m = state.setdefault("momentum_buffer", torch.zeros_like(weight))
    m.copy_(optim.momentum * m + (1 - optim.momentum) * gradient)
    weight.copy_((1 - lr * decay) * weight - lr * torch.sign(m))


def signum(weight: nn.Parameter, **fields: object) -> ShardedOptimizer:
    config = SignumConfig.model_validate({"algorithm": "signum", "lr": 0.01, **fields})
    return new_optimizer([("weight", weight)], config, seed=1)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_algorithm_2_of_the_paper(momentum: float, weight_decay: float) -> None:
    [start] = tensors([(40, 9)], 1000, torch.float64)
    weight = nn.Parameter(start.clone())
    drive(signum(weight, momentum=momentum, weight_decay=weight_decay), [weight], 30)
    p, m = start.numpy().copy(), np.zeros((40, 9))
    for step in range(30):
        g = tensors([(40, 9)], step, torch.float64)[0].numpy()
        m = momentum * m + (1 - momentum) * g
        p = p - 0.01 * (np.sign(m) + weight_decay * p)
    np.testing.assert_allclose(weight.detach().numpy(), p, rtol=0, atol=1e-14)


def test_micro_batches_add_up_in_the_momentum() -> None:
    """Two that are added one after the other, in the place of their sum in a gradient buffer."""
    chosen = ["optim=signum", "optim.gradient_buffer=false", "optim.clip=previous"]
    config = load([*chosen, "optim.momentum=0.5", "run.name=x", "data.path=x"]).optim
    halves = [[tensors([(6, 8)], 2 * step + half)[0] for half in (0, 1)] for step in range(5)]
    early, usual = (nn.Parameter(torch.zeros(6, 8)) for _ in range(2))
    optimizer = new_optimizer([("weight", early)], config, seed=1)
    for one, other in halves:
        optimizer.add_gradient(early, one, scale=1.0, first=True)
        optimizer.add_gradient(early, other, scale=1.0, first=False)
        optimizer.apply()
    buffered = config.model_copy(update={"gradient_buffer": True, "clip": "global"})
    drive(
        new_optimizer([("weight", usual)], buffered, seed=1),
        [usual],
        5,
        lambda step: [halves[step][0] + halves[step][1]],
    )
    assert torch.equal(early, usual) and early.any()


def test_momentum_in_bf16_is_near_that_in_fp32() -> None:
    exact, short = (nn.Parameter(tensors([(64, 33)], 1000)[0]) for _ in range(2))
    drive(signum(exact), [exact], 40)
    optimizer = signum(short, momentum_dtype="bf16")
    drive(optimizer, [short], 40)
    assert optimizer.state[short]["momentum_buffer"].dtype == torch.bfloat16
    assert (exact - short).norm() < 0.1 * (exact - tensors([(64, 33)], 1000)[0]).norm()
