"""`dnt plan`'s formulas: against counted tensors and the peaks of real engines, and monotone."""

import math
from collections.abc import Callable
from functools import cache
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dnt_scale import config
from dnt_scale.config import ConfigError, ModelConfig, RunConfig, TorchEngineConfig
from dnt_scale.config.hardware import hardware_names, hardware_of, load_hardware
from dnt_scale.costs.peak import peak
from dnt_scale.costs.work import activation_bytes, block_bytes, loss_bytes, work_of
from dnt_scale.model.block import Block
from dnt_scale.model.dnt import DNT
from dnt_scale.model.linear_cross_entropy import linear_cross_entropy
from dnt_scale.tools.planner.estimate import estimate
from dnt_scale.tools.planner.goodput import GPU_HOURS_A_FAILURE, goodput
from dnt_scale.tools.planner.machine import Machine, gpu_machine
from dnt_scale.tools.planner.search import best, choices, evaluate, fewest
from dnt_scale.tools.planner.step_time import step_time
from testbed.measure import answers, print_costs, run_config
from testbed.run import call

PRESETS = ("dnt_124m", "dnt_774m", "dnt_1.4b", "dnt_llama_7b")  # the larger ones last
SMALL = ["model.width=128", "model.heads=4", "model.layers=2"]


@cache
def planned(*overrides: str) -> RunConfig:
    given = ["run.name=plan", "data.path=none", "train.dtype=bf16", "optim=msgdw"]
    return config.load([*given, *overrides])


def with_batch(run: RunConfig, rows: int, micro_batch: int) -> RunConfig:
    update = {"global_batch": rows, "micro_batch": micro_batch}
    return run.model_copy(update={"train": run.train.model_copy(update=update)})


def h100s(nodes: int = 1, gpus: int = 8) -> Machine:
    return gpu_machine(load_hardware("h100"), nodes, gpus, "bf16", compiled=False)


# --- counted --------------------------------------------------------------------------------------


def kept_by(module: nn.Module, work: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for a backward, weights left out; each storage once."""
    own = {weight.untyped_storage()._cdata for weight in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "overrides",
    [
        ["model.setting=S5"],
        ["model.setting=S4", "model.kv_heads=2"],
        ["model.setting=S1", "model.norm=layernorm"],
        ["model.setting=S5", "model.activation=swiglu"],
        ["model.setting=peri", "model.activation=relu"],
    ],
)
def test_a_block_keeps_what_is_counted(overrides: list[str], dtype: torch.dtype) -> None:
    model = run_config([*SMALL, *overrides]).model
    assert isinstance(model, ModelConfig)
    block = Block(model).to(dtype)
    for weight in block.parameters():
        nn.init.ones_(weight)
    x_BTD = torch.randn(2, 64, model.width, dtype=dtype, requires_grad=True)
    expected = 2 * 64 * block_bytes(model, dtype.itemsize)
    # relu keeps its result, which the next product keeps too, and not what it was given
    if model.activation == "relu":
        expected -= 2 * 64 * dtype.itemsize * model.sizes.ffn
    assert kept_by(block, lambda: block(x_BTD)) == pytest.approx(expected, rel=0.01)


def test_a_model_keeps_what_is_counted() -> None:
    """The gradients of the head and of its input too, which the loss makes in fp32."""
    run = run_config([*SMALL, "model.vocab_size=512", "train.dtype=fp32"])
    model = run.model
    assert isinstance(model, ModelConfig)
    built = DNT(model)
    for weight in built.parameters():
        nn.init.normal_(weight)
    rows = torch.randint(0, 512, (2, 65))
    expected = activation_bytes(run, 128, 4) + 4 * (128 + 512) * 128
    assert kept_by(built, lambda: built.loss_sum(rows)) == pytest.approx(expected, rel=0.02)


def most_in_use(work: Callable[[], object]) -> int:
    """Bytes of tensors that are in use at a time, beyond those from before."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiled:
        work()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profiled.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    return max(accumulate(size for _, size in sorted(changes, key=lambda change: change[0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overrides", [[], ["model.logit_cap=30.0"]])
@pytest.mark.parametrize("tokens", [100, 2000])
def test_the_loss_takes_what_is_counted(
    tokens: int, overrides: list[str], dtype: torch.dtype
) -> None:
    """Less its own input, which is made before it."""
    model = run_config([*SMALL, "model.vocab_size=3000", *overrides]).model
    assert isinstance(model, ModelConfig)
    x_ND, head_VD = (
        torch.randn(rows, model.width, dtype=dtype, requires_grad=True) for rows in (tokens, 3000)
    )
    targets_N = torch.zeros(tokens, dtype=torch.int64)
    found = most_in_use(
        lambda: linear_cross_entropy(x_ND, head_VD, targets_N, 3000, model.logit_cap)[0].backward()
    )
    c = dtype.itemsize
    expected = loss_bytes(model, tokens, c, gpus=False)
    assert found <= expected * 1.02
    assert found == pytest.approx(expected, abs=c * tokens * model.width + 0.02 * expected)


def test_products_are_six_flops_a_weight_and_a_token() -> None:
    run = planned("model=dnt_124m")
    work = work_of(run, 2, 1024, 2, gpus=True)
    model = run.model
    assert isinstance(model, ModelConfig)
    weights = 12 * (12 * 768**2) + 50304 * 768
    assert work.matmul == pytest.approx(6 * 2048 * weights)
    again = run.model_copy(
        update={"engine": TorchEngineConfig(name="fsdp", activation_checkpointing="full")}
    )
    more = work_of(again, 2, 1024, 2, gpus=True).matmul - work.matmul
    assert more == pytest.approx(2 * 2048 * 12 * 12 * 768**2)


UNTIED = ["model.tied_head=false", "model.vocab_size=16384", "model.layers=3"]
PEAKS: dict[str, tuple[int, list[str]]] = {
    "fsdp": (2, ["engine=fsdp", "train.dtype=bf16", "optim=msgdw"]),
    "ddp": (2, ["engine=ddp", "train.dtype=fp32", "optim=adamw"]),
    # of which the head's gradient in its reduce-scatter is the highest moment
    "untied": (2, ["engine=fsdp", "train.dtype=fp32", "optim=msgdw", *UNTIED]),
    # short rows, of which the update is the highest moment
    "zero1": (2, ["engine=zero1", "train.dtype=bf16", "optim=msgdw", "model.context=32"]),
    "zero2": (2, ["engine=zero2", "train.dtype=bf16", "optim=msgdw"]),
    "zero3": (2, ["engine=zero3", "train.dtype=bf16", "optim=msgdw"]),
}


@pytest.mark.parametrize("case", PEAKS)
def test_the_peak_is_within_a_tenth_of_what_is_measured(case: str) -> None:
    """Activations, the loss, gathered weights and buckets too; benchmarks/plan_accuracy.py has more
    ranks and shapes.
    """
    ranks, overrides = PEAKS[case]
    shape = ["model.width=256", "model.context=128", "model.vocab_size=4096"]
    batch = ["train.micro_batch=2", f"train.global_batch={4 * ranks}"]
    asked = [*shape, "model.heads=4", *batch, *overrides]
    found = answers(call(print_costs, asked, (1, 6), ranks=ranks))
    run = run_config([*asked, "model.layers=6"])
    assert isinstance(run.model, ModelConfig)
    expected = peak(run, ranks, 1, run.model.context, gpus=False).total()
    assert max(each[0]["peak"] for each in found) == pytest.approx(expected, rel=0.1)


# --- monotone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["fsdp", "ddp", "zero1", "zero2", "zero3"])
@settings(max_examples=10, deadline=None)
@given(power=st.integers(0, 8), more=st.integers(1, 3))
def test_more_gpus_are_faster_and_hold_no_more_each(engine: str, power: int, more: int) -> None:
    """With a batch that grows as they do, from 8 to 4,096 and beyond. What each computes stays;
    only the optimizer's work and the casts of shards become less.
    """
    small, large = 1 << power, 1 << (power + more)
    found = []
    for nodes in (small, large):
        run = with_batch(planned("model=dnt_774m", f"engine={engine}"), 8 * 8 * nodes, 8)
        found.append(evaluate(run, h100s(nodes), 1024))
    assert found[1].units_per_s > found[0].units_per_s
    assert found[1].peak.held.total() <= found[0].peak.held.total()
    shared = ("optimizer", "copies")
    before, after = (
        math.fsum(seconds for part, seconds in each.time.parts.items() if part not in shared)
        for each in found
    )
    assert after >= before * (1 - 1e-9)


@pytest.mark.parametrize("nodes", [1, 8, 64, 512])
def test_larger_presets_are_slower_and_take_more(nodes: int) -> None:
    rows = 8 * nodes
    runs = [with_batch(planned(f"model={preset}"), rows, 1) for preset in PRESETS]
    found = [evaluate(run, h100s(nodes), 1024) for run in runs]
    speeds = [choice.units_per_s for choice in found]
    assert speeds == sorted(speeds, reverse=True)
    totals = [choice.peak.total() for choice in found]
    assert totals == sorted(totals)


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(0, 5), layers=st.integers(1, 8), width=st.integers(1, 8))
def test_more_of_anything_takes_longer_and_more_memory(rows: int, layers: int, width: int) -> None:
    def one(rows: int, layers: int, width: int) -> tuple[float, int]:
        run = with_batch(planned("model=dnt_124m"), 8 << rows, 1 << rows)
        shape = {"layers": layers, "width": 64 * width, "heads": 4}
        run = run.model_copy(update={"model": run.model.model_copy(update=shape)})
        choice = evaluate(run, h100s(), 1024)
        return choice.time.seconds, choice.peak.total()

    base = one(rows, layers, width)
    for more in (
        one(rows + 1, layers, width),
        one(rows, layers + 1, width),
        one(rows, layers, width + 1),
    ):
        assert more[0] >= base[0] and more[1] >= base[1]


@given(
    interval=st.floats(1, 1e6),
    waits=st.floats(0, 1e3),
    ranks=st.integers(1, 1 << 16),
    save=st.floats(0, 1e4),
)
def test_goodput_is_a_share_and_falls_with_ranks(
    interval: float, waits: float, ranks: int, save: float
) -> None:
    few = goodput(ranks, GPU_HOURS_A_FAILURE, interval, waits, save)
    many = goodput(2 * ranks, GPU_HOURS_A_FAILURE, interval, waits, save)
    assert 0 < many.share < few.share <= 1
    best = goodput(ranks, GPU_HOURS_A_FAILURE, few.best_interval or 1.0, waits, save)
    if few.best_interval > save > 0:  # near the best, nothing much is better
        assert best.share >= few.share * 0.98


# --- engines, meshes, the fewest ranks ------------------------------------------------------------


def test_the_best_choice_fits_and_is_no_slower_than_any_that_does() -> None:
    run = planned("model=dnt_1.4b", "train.global_batch=512")
    machine = h100s(2)
    found = best(run, machine, 1024)
    assert found is not None and found.fits
    others = [evaluate(each, machine, 1024) for each in choices(run, machine, "none")]
    assert {choice.run.engine.name for choice in others} == {
        *("ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")
    }
    assert found.units_per_s == max(each.units_per_s for each in others if each.fits)


def test_without_a_gradient_buffer_there_is_no_deepspeed() -> None:
    run = planned("optim.gradient_buffer=false", "optim.clip=previous")
    names = {each.engine.name for each in choices(run, h100s(2), "none")}
    assert names == {"ddp", "fsdp", "hsdp"}


def test_one_buffer_fits_on_fewer_ranks_than_two() -> None:
    ranks = {}
    for optimizer in ("msgdw", "adamw"):
        run = planned("model=dnt_llama_70b", "train.micro_batch=1", f"optim={optimizer}")
        machine = gpu_machine(load_hardware("h200"), 1, 8, "bf16", compiled=False)
        found = fewest(run, machine, 8192)
        assert found is not None
        ranks[optimizer] = found.ranks
        if found.nodes > 1:
            assert fewest(run, found.of_nodes(found.nodes - 1), 8192) is not None
    assert ranks == {"msgdw": 8, "adamw": 16}


def test_the_step_is_the_sum_of_its_parts_and_communication_is_hidden_at_most() -> None:
    run = planned("model=dnt_774m", "train.global_batch=256")
    time = step_time(run, h100s(4), 1024)
    assert time.seconds == pytest.approx(math.fsum(time.parts.values()))
    assert 0 <= time.parts["communication"] <= time.communication
    alone = step_time(run, h100s(1, 1), 1024)
    assert alone.communication == 0 == alone.sent


# --- what cannot be -------------------------------------------------------------------------------

IMPOSSIBLE = {
    "an engine that does not fit": (
        ["model=dnt_llama_7b", "engine=ddp", "train.global_batch=64"],
        1,
        r"engine=ddp train.micro_batch=8 on 8 ranks needs .* GB a rank, and an NVIDIA H100 has 78 "
        r"GB free for it; nearest that fits: engine=\w+ .*train.micro_batch=\d+",
    ),
    "a model that needs more ranks": (
        ["model=dnt_llama_70b", "train.global_batch=64"],
        1,
        r"model dnt_llama_70b with msgdw: .* by any engine it needs at least \d+ ranks, \d+ nodes",
    ),
    "a width that no number of ranks holds": (
        ["model=dnt_llama_70b", "model.width=131072", "train.global_batch=64"],
        1,
        r"model.width: .*nearest that fits: model.width=\d+$",
    ),
    "a batch that ranks do not share": (
        ["train.global_batch=100"],
        1,
        r"train.global_batch is 100 rows, which 8 ranks do not share equally; nearest: "
        r"train.global_batch=96, or 5 ranks",
    ),
    "copies that do not share the ranks": (
        ["engine=hsdp", "engine.replicas=3", "train.global_batch=96"],
        2,
        r"engine.replicas is 3, which 16 ranks do not share equally; nearest: engine.replicas=2",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_is_one_line_with_the_nearest_that_can(case: str) -> None:
    overrides, nodes, expected = IMPOSSIBLE[case]
    run = planned(*overrides)
    with pytest.raises(ConfigError, match=expected) as found:
        estimate(run, h100s(nodes), 1024)
    assert "\n" not in str(found.value)


# --- hardware -------------------------------------------------------------------------------------


def test_every_gpu_file_is_found_by_its_name_and_by_cudas() -> None:
    for name in hardware_names():
        hardware = load_hardware(name)
        assert hardware_of(hardware.name) == hardware
    found = hardware_of("nvidia_h100_80gb_hbm3")
    assert found is not None and found.name == "NVIDIA H100"
    assert hardware_of("gtx_1080") is None
