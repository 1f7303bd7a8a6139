"""What every file of dnt_scale/optim/algorithms has to keep, whatever its rule."""

from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dnt_scale import config
from dnt_scale.config import OptimizerConfig
from dnt_scale.config.optim import OPTIMIZERS
from dnt_scale.optim.algorithm import Algorithm
from dnt_scale.optim.sharded_optimizer import ShardedOptimizer
from tests.helpers.optimizers import tensors

SHAPES = [(40, 30), (7,), (3, 5), (), (300, 700)]
ALGORITHMS = OPTIMIZERS.every()
ROOT = Path(__file__).parents[3]


@pytest.fixture(params=ALGORITHMS)
def algorithm(request: pytest.FixtureRequest) -> OptimizerConfig:
    return ALGORITHMS[request.param].model_validate(
        {"algorithm": request.param, "lr": 0.01, "weight_decay": 0.1}
    )


def built(algorithm: OptimizerConfig, values: list[Tensor], seed: int = 0) -> ShardedOptimizer:
    assert isinstance(algorithm, Algorithm)
    group = {"params": [nn.Parameter(value.clone()) for value in values]}
    optimizer = ShardedOptimizer(algorithm, [group], seed)
    optimizer.allocate()
    return optimizer


def trained(optimizer: ShardedOptimizer, steps: list[list[Tensor]], first: int = 0) -> list[Tensor]:
    """The weights and buffers after a step with each list of gradients."""
    [group] = optimizer.param_groups
    for number, gradients in enumerate(steps, first):
        for parameter, gradient in zip(group["params"], gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.updates = number
        optimizer.step()
    return contents(optimizer)


def contents(optimizer: ShardedOptimizer) -> list[Tensor]:
    params = optimizer.param_groups[0]["params"]
    buffers = [buffer for p in params for buffer in optimizer.buffers(p).values()]
    return [p.detach() for p in params] + buffers


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


START = tensors(SHAPES, 1000)
GRADIENTS = [tensors(SHAPES, step) for step in range(6)]


def test_each_has_a_file_a_configuration_and_a_test() -> None:
    for name in ALGORITHMS:
        assert (ROOT / "dnt_scale" / "optim" / "algorithms" / f"{name}.py").is_file()
        run = config.load([f"optim={name}", "run.name=x", "data.path=x"])
        assert run.optim.algorithm == name
        assert config.validate(run.model_dump(mode="json")) == run
    files = {path.stem for path in (ROOT / "dnt_scale" / "optim" / "algorithms").glob("[a-z]*.py")}
    assert files == ALGORITHMS.keys()


def test_buffers_are_as_described(algorithm: OptimizerConfig) -> None:
    optimizer = built(algorithm, START)
    held = 0
    for parameter in optimizer.param_groups[0]["params"]:
        found = optimizer.buffers(parameter)
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        described = {name: dtypes[stored] for name, stored in algorithm.buffers().items()}
        assert {name: buffer.dtype for name, buffer in found.items()} == described
        assert all(b.shape == parameter.shape and not b.any() for b in found.values())
        assert optimizer.state[parameter].keys() == {*found, *algorithm.counters}
        held += sum(buffer.numel() * buffer.element_size() for buffer in found.values())
    assert held == algorithm.bytes_a_weight * sum(value.numel() for value in START)
    assert algorithm.describe()


def test_a_rank_steps_its_elements_as_the_whole_is_stepped(algorithm: OptimizerConfig) -> None:
    """Wherever a flat tensor is cut; torch's fused AdamW rounds a tensor's last elements
    otherwise.
    """
    if not algorithm.elementwise:
        pytest.skip("its step looks at whole tensors: its own test cuts them")
    whole = trained(built(algorithm, START), GRADIENTS)
    count = len(SHAPES)
    joined = [torch.cat([t.reshape(-1) for t in some]) for some in (whole[:count], START)]
    flat_steps = [torch.cat([t.reshape(-1) for t in gradients]) for gradients in GRADIENTS]
    bounds = [0, 17, 1201, 1202, len(joined[0])]
    for first, last in pairwise(bounds):
        optimizer = built(algorithm, [joined[1][first:last]])
        found = trained(optimizer, [[step[first:last]] for step in flat_steps])[0]
        torch.testing.assert_close(found, joined[0][first:last], rtol=1e-6, atol=1e-7)


def test_it_goes_on_as_if_it_had_not_stopped(algorithm: OptimizerConfig) -> None:
    fields = {key: "bf16" for key in type(algorithm).model_fields if key == "momentum_dtype"}
    for chosen in (algorithm, algorithm.model_copy(update=fields)):
        straight = trained(built(chosen, START, seed=5), GRADIENTS)
        stopped = trained(built(chosen, START, seed=5), GRADIENTS[:3])
        resumed = built(chosen, START, seed=5)
        with torch.no_grad():
            for new, value in zip(contents(resumed), stopped, strict=True):
                new.copy_(value)
        resumed.set_updates(3)
        assert same(trained(resumed, GRADIENTS[3:], first=3), straight)


def test_without_a_gradient_buffer_it_is_the_same_or_refused(algorithm: OptimizerConfig) -> None:
    raw = {**algorithm.model_dump(), "gradient_buffer": False, "clip": "tensor"}
    if reason := algorithm.needs_gradient_buffer():
        assert "set gradient_buffer: true" in reason
        with pytest.raises(ValidationError, match="needs the gradient after backward"):
            type(algorithm).model_validate(raw)
        return
    usual, early = built(algorithm, START), built(type(algorithm).model_validate(raw), START)
    trained(usual, GRADIENTS)
    for gradients in GRADIENTS:
        params = early.param_groups[0]["params"]
        for parameter, gradient in reversed(list(zip(params, gradients, strict=True))):
            early.add_gradient(parameter, gradient, scale=1.0, first=True)
        early.apply()
    assert same(contents(usual), contents(early))


def test_a_test_may_register_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPTIMIZERS, "_classes", {**OPTIMIZERS.every()})

    @OPTIMIZERS.register
    class SignSGD(Algorithm):
        algorithm: Literal["sign_sgd"]

        def buffers(self) -> dict[str, Literal["fp32", "bf16"]]:
            return {}

        def describe(self) -> str:
            return "no momentum"

        def step(self, shards, group):  # type: ignore[no-untyped-def]
            for shard in shards:
                shard.weights.sub_(shard.gradient.sign(), alpha=group["lr"])

    run = config.load(["preset=demo"])
    raw = {**run.model_dump(mode="json"), "optim": {"algorithm": "sign_sgd", "lr": 0.5}}
    chosen = config.validate(raw).optim
    assert isinstance(chosen, SignSGD) and chosen.bytes_a_weight == 0
    optimizer = built(chosen, [torch.zeros(3)])
    [weights] = trained(optimizer, [[torch.tensor([2.0, 0.0, -3.0])]])
    assert weights.tolist() == [-0.5, 0.0, 0.5]
    raw["optim"]["algorithm"] = "sign_sgb"
    with pytest.raises(config.ConfigError, match=r"did you mean sign_sgd\?"):
        config.validate(raw)
