"""A step whose verdict is on the device: made as without one, or not made, to the last bit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnt_scale.config.optim import OPTIMIZERS, UPDATES
from dnt_scale.optim.algorithm import Algorithm
from dnt_scale.optim.sharded_optimizer import ShardedOptimizer
from tests.helpers.optimizers import rule, tensors
from tests.helpers.waits import waits

SHAPES = [(12, 30), (30, 12), (8, 8)]
SETTINGS: dict[str, dict[str, Any]] = {"capped": {"limit": 1e-4}}
MORE: dict[str, list[dict[str, Any]]] = {
    "capped": [{"row_limit": 0.1}],
    "row_normalized": [{"tall_factor": True}],
    "plain": [{"fixed_norm": True}],
}


def chosen() -> list[Any]:
    """Each optimizer in each storage, and each update rule with the momentum that takes them."""
    found = []
    for name, section in OPTIMIZERS.every().items():
        stored = ("fp32", "bf16") if "momentum_dtype" in section.model_fields else (None,)
        for dtype in stored:
            options = {} if dtype is None else {"momentum_dtype": dtype}
            found.append(pytest.param(name, options, {"update": "plain"}, id=f"{name}-{dtype}"))
    for name in UPDATES.every():
        for more in ({}, *MORE.get(name, [])):
            section = {"update": name, **SETTINGS.get(name, {}), **more}
            for nesterov in (False, True):
                options = {"nesterov": nesterov, "dampening": 0.1 if nesterov else 0.0}
                label = "-".join([name, *more, *(["nesterov"] if nesterov else [])])
                found.append(pytest.param("msgdw", options, section, id=label))
    return found


def built(algorithm: str, options: dict[str, Any], section: dict[str, Any]) -> ShardedOptimizer:
    fields = {"algorithm": algorithm, "lr": 0.01, "weight_decay": 0.1, **options}
    config = OPTIMIZERS.every()[algorithm].model_validate(fields)
    assert isinstance(config, Algorithm)
    values = tensors(SHAPES, 1000)
    values[0][0, :4] = torch.tensor([-0.0, 0.0, -0.0, 0.0])  # a sign is a bit too
    params = [nn.Parameter(value) for value in values]
    optimizer = ShardedOptimizer(config, [{"params": params, "update": rule(section)}], seed=3)
    optimizer.allocate()
    return optimizer


def contents(optimizer: ShardedOptimizer) -> list[Tensor]:
    params = optimizer.param_groups[0]["params"]
    return [
        *(p.detach().clone() for p in params),
        *(value.clone() for p in params for value in optimizer.state[p].values()),
    ]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Compare bits: zeros have signs."""
    return all(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )


def step(optimizer: ShardedOptimizer, gradients: list[Tensor], go: bool | None, made: int) -> None:
    for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.updates = made
    verdict = None if go is None else torch.tensor(go)
    with waits() as seen:
        optimizer.step(go=verdict)
    assert go is None or not seen, seen


def poisoned(value: float, everywhere: bool) -> list[Tensor]:
    gradients = tensors(SHAPES, 77)
    for gradient in gradients:
        if everywhere:
            gradient.fill_(value)
        else:
            gradient[1, 2] = value
    return gradients


@pytest.mark.parametrize(("algorithm", "options", "section"), chosen())
def test_what_the_device_skips_changes_no_bit_and_what_it_makes_is_the_same(
    algorithm, options, section
):
    asked, plain = (built(algorithm, options, section) for _ in range(2))
    assert asked.skips_on_device
    for number in range(4):
        before = contents(asked)
        for value in (torch.nan, torch.inf, -torch.inf, 1e30, 0.0):
            for everywhere in (False, True):
                step(asked, poisoned(value, everywhere), go=False, made=number)
                assert same(contents(asked), before), (number, value)
        gradients = tensors(SHAPES, number)
        step(asked, gradients, go=True, made=number)
        step(plain, gradients, go=None, made=number)
        assert same(contents(asked), contents(plain)), number
        assert not same(contents(asked), before)


def test_a_rule_that_does_not_mind_the_verdict_is_not_asked_to():
    class Deaf(type(rule("plain"))):
        skips_on_device = False

    optimizer = built("msgdw", {}, {"update": "plain"})
    optimizer.param_groups[0]["update"] = Deaf(pattern=None)
    assert not optimizer.skips_on_device
