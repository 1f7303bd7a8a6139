"""``train.dtype=fp8`` on a CPU, where torch multiplies the same fp8 numbers by other kernels: which
layers, how exact, what it does to a run. That a run in it is refused here: test_compute_dtype.py.
"""

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dnt_scale import config
from dnt_scale.distributed import process_group
from dnt_scale.distributed.errors import AgreedError
from dnt_scale.engine import fp8
from dnt_scale.engine.parallelize import prepare_blocks
from dnt_scale.model.dnt import DNT
from dnt_scale.model.init import init_weights
from dnt_scale.model.task import build_task
from testbed.configs import composed
from testbed.run import call, tiny, train
from tests.helpers import engines

pytestmark = pytest.mark.skipif(
    find_spec("torchao") is None, reason="torchao is not installed (the extra fp8)"
)
TOKENS = torch.randint(0, 512, (2, 33), generator=torch.Generator().manual_seed(0))
# fp8 has 1 + 3 bits of a number in e4m3, 1 + 2 in e5m2: what rounding adds to one, relatively
E4M3, E5M2 = 2**-4, 2**-3


def blank(*overrides: str) -> DNT:
    run = composed(*tiny(Path("no-data"), Path("no-folder"), *overrides))
    with torch.device("meta"):
        return build_task(run.model)


def in_fp8(task: nn.Module) -> set[str]:
    return {
        name for name, module in task.named_modules() if type(module).__name__ == "Float8Linear"
    }


# --- which layers ---------------------------------------------------------------------------------


def test_matrices_of_blocks_and_nothing_else() -> None:
    task = blank("model.activation=swiglu", "model.bias=true", "model.tied_head=false")
    before = list(task.named_parameters())
    fp8.convert(task)
    matrices = ("attn.w_q", "attn.w_k", "attn.w_v", "attn.w_o", "ffn.w_1", "ffn.w_2", "ffn.w_3")
    assert in_fp8(task) == {f"blocks.{n}.{matrix}" for n in range(2) for matrix in matrices}
    after = list(task.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(new is old for (_, new), (_, old) in zip(after, before, strict=True))
    assert not list(task.named_buffers()), "a checkpoint has no place for them"
    assert fp8.told(task, compiled=True) == (
        "train.dtype: fp8 in 14 of 14 linear layers of the blocks"
    )


def test_of_an_image_classifier_too() -> None:
    run = config.load(["run.name=x", "data=images", "data.path=none", "model=vit_tiny"])
    with torch.device("meta"):
        task = build_task(run.model)
    fp8.convert(task)
    assert len(in_fp8(task)) == 6 * len(list(task.blocks))
    assert all(name.startswith("blocks.") for name in in_fp8(task))


def test_sizes_that_fp8_does_not_take_stay_in_bf16_and_are_counted() -> None:
    task = blank("model.ffn_size=72")
    fp8.convert(task)
    assert {name.rpartition(".")[2] for name in in_fp8(task)} == {"w_q", "w_k", "w_v", "w_o"}
    line = fp8.told(task, compiled=False)
    assert "fp8 in 8 of 12 linear layers of the blocks; 4 stay in bf16" in line
    assert "engine.compile=true" in line


def test_a_model_without_such_sizes_is_refused() -> None:
    task = blank("model.width=40", "model.heads=2", "model.ffn_size=72")
    with pytest.raises(AgreedError, match=r"train\.dtype is fp8, but no .* 40x40 .*dtype=bf16"):
        fp8.convert(task)


# --- how exact ------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    """A task of one block, which is a linear layer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(*reversed(weight.shape), bias=False)])
        with torch.no_grad():
            self.blocks[0].weight.copy_(weight)


def products(layer: nn.Module, x: Tensor, grad_y: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, layer.weight], grad_y)]


# as many tokens as the products want, and another number, which is padded
@pytest.mark.parametrize("tokens", [64, 197])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_each_product_is_as_exact_as_rounding_both_factors(tokens: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, weight, grad_y = (
        scale * torch.randn(shape, generator=generator)
        for shape in ((tokens, 128), (96, 128), (tokens, 96))
    )
    task = OneLayer(weight)
    exact = products(task.blocks[0], x, grad_y)
    of_sizes = products(OneLayer(weight.abs()).blocks[0], x.abs(), grad_y.abs())
    fp8.convert(task)
    found = products(task.blocks[0], x, grad_y)
    for name, got, wanted, sizes, (a, b) in zip(
        ("y", "dx", "dW"),
        found,
        exact,
        of_sizes,
        ((E4M3, E4M3), (E5M2, E4M3), (E5M2, E4M3)),
        strict=True,
    ):
        worst = (a + b + a * b) * 1.01 * sizes  # numbers too small to be normal add a hundredth
        assert (got - wanted).abs().le(worst).all(), name
        # errors of single numbers are uniform, about a third of the worst, and add as squares do
        relative = float((got - wanted).norm() / wanted.norm())
        assert math.hypot(a, b) / 4 < relative < math.hypot(a, b) / 1.5, (name, relative)


def gradients(task: DNT) -> dict[str, Tensor]:
    task.zero_grad()
    task(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    return {name: parameter.grad for name, parameter in task.named_parameters()}


def prepared(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> DNT:
    run = composed(*tiny(Path("no-data"), Path("no-folder"), "train.dtype=fp8", *overrides))
    compiled = torch.compile
    # the graph is what counts, not the kernels that are made of it
    monkeypatch.setattr(
        torch, "compile", lambda function, **how: compiled(function, backend="aot_eager", **how)
    )
    torch._dynamo.reset()
    task = DNT(run.model)
    init_weights(task, 1)
    fp8.convert(task)
    prepare_blocks(task, run)
    monkeypatch.undo()
    return task


@pytest.mark.parametrize(
    ("how", "compiles", "recomputed"),
    [("selective", "false", 0), ("selective", "true", 0), ("full", "true", 6)],
)
def test_compiled_and_recomputed_it_is_the_same(
    how: str, compiles: str, recomputed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block is compiled as one graph, which ``prepare_blocks`` asks for; and what is selective
    multiplies nothing again.
    """
    wanted = gradients(prepared(monkeypatch, "engine.activation_checkpointing=none"))
    chosen = (f"engine.activation_checkpointing={how}", f"engine.compile={compiles}")
    task = prepared(monkeypatch, *chosen)
    found = gradients(task)
    for name, gradient in found.items():
        assert torch.allclose(gradient, wanted[name], rtol=1e-4, atol=1e-6), name
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradients(task)
    calls = {event.key: event.count for event in profile.key_averages()}
    # of each of two blocks six matrices have three products
    assert calls["aten::_scaled_mm"] == 2 * (6 * 3 + recomputed)


# --- in a run -------------------------------------------------------------------------------------


def train_in_fp8(data: Path, out: Path) -> None:
    me = process_group.start("cpu")
    losses: dict[str, list[float]] = {}
    described: dict[str, list[str]] = {}
    for label, dtype, more in (
        ("bf16", "bf16", []),
        ("fsdp", "fp8", []),
        ("ddp", "fp8", ["engine=ddp"]),
        ("in backward", "fp8", ["optim.gradient_buffer=false", "optim.clip_norm=null"]),
    ):
        of_run = ["optim.weight_decay=0", "optim.clip_norm=null", f"train.dtype={dtype}", *more]
        with engines.built("fsdp", me, data, *of_run) as (run, engine):
            losses[label] = engines.losses(run, engine, me, 0, engines.STEPS)
            described[label] = [
                f"{shard.name} {shard.shape} {shard.data.dtype}" for shard in engine.shards()
            ]
            if label in ("bf16", "fsdp"):
                engines.save(engine, me, out / label)
    # each goes on from the other's checkpoint
    for label, dtype, from_label in (("to bf16", "bf16", "fsdp"), ("to fp8", "fp8", "bf16")):
        with engines.built("fsdp", me, data, f"train.dtype={dtype}") as (run, engine):
            engines.load(engine, me, out / from_label / f"step-{engines.STEPS:08d}")
            losses[label] = engines.losses(run, engine, me, 0, 1)
    if me.first:
        (out / "found.json").write_text(json.dumps([losses, described]))
    process_group.stop()


@pytest.mark.slow
def test_engines_train_in_it_and_keep_their_state_as_before(corpus: Path, tmp_path: Path) -> None:
    call(train_in_fp8, corpus, tmp_path, ranks=2).ok()
    losses, described = json.loads((tmp_path / "found.json").read_text())
    wanted = losses["bf16"]
    for label in ("fsdp", "ddp", "in backward"):
        assert losses[label][-1] < losses[label][0] - 0.5, label
        assert losses[label] == pytest.approx(wanted, abs=0.05), label
        assert losses[label] != wanted
    assert losses["ddp"] == pytest.approx(losses["fsdp"], abs=0.05)
    assert described["fsdp"] == described["bf16"]
    assert all("float32" in line for line in described["fsdp"])
    assert losses["to fp8"] == pytest.approx(losses["to bf16"], abs=0.05)
    assert losses["to fp8"][0] < wanted[0] - 0.5


def allowed_here(overrides: list[str]) -> None:
    """Train in a process that takes the CPU for a device with fp8."""
    from dnt_scale.distributed import compute_dtype
    from dnt_scale.train.rank import main

    compute_dtype.check_fp8 = lambda device: None
    sys.exit(main(overrides))


@pytest.mark.slow
def test_a_run_is_recorded_in_it_and_goes_on_in_bf16_where_that_is_typed(
    corpus: Path, tmp_path: Path
) -> None:
    def line_of_last_step() -> dict[str, float]:
        return json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])

    def recorded() -> str:
        return config.from_yaml(tmp_path / "run" / "config.yaml").train.dtype

    overrides = tiny(corpus, tmp_path / "run", "train.micro_batch=auto", "eval.every=4")
    overrides.remove("train.dtype=fp32")
    told = call(allowed_here, [*overrides, "train.dtype=fp8", "train.steps=4"]).ok().err
    assert "train.dtype: fp8 in 12 of 12 linear layers of the blocks; without engine" in told
    assert recorded() == "fp8" and line_of_last_step()["val/loss"] < 6.5

    # without a word it stays, which is refused here; bf16 has to be typed
    more = [*overrides, "train.steps=6"]
    assert "this is a CPU; use train.dtype=bf16" in train(more).error()
    told = train([*more, "train.dtype=bf16"]).ok().err
    assert "train.dtype fp8 -> bf16" in told
    assert recorded() == "bf16" and line_of_last_step()["step"] == 6
