"""One line of config chooses the engine and nothing else changes: weights, losses and
checkpoints of all of them.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dnt_scale import config
from dnt_scale.config import RunConfig
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.engine.base import Engine
from dnt_scale.model.rotary import table
from dnt_scale.optim.groups import buffer_shapes
from testbed.run import call, same_tensors, tensors, tiny
from tests.helpers import engines
from tests.helpers.engines import ENGINES, STEPS

# What is run on other than two ranks too: mSGDW, with every rule of updates/, with AdamW on a group
# and with every way of clipping.
RANKS = {("msgdw", "fp32"): (1, 2, 4)}
# An optimizer is run here if its test has a `reference_update`. Its OVERRIDES choose it, BF16
# and UNBUFFERED, where there are any, in bf16 and where there is no gradient buffer; CHANGES says
# how much of a tensor's change in all steps may differ, for each dtype that it is run in, and ERROR
# by how much a weight may in fp32.
OPTIMIZERS = {
    path.stem.removeprefix("test_"): import_module(f"tests.dnt_scale.optim.{path.stem}")
    for path in sorted((Path(__file__).parent / "optim").glob("test_*.py"))
    if "def reference_update" in path.read_text()
}
DTYPES = {"fp32": 1e-5, "bf16": 1e-2}  # of a loss
CASES = [(name, dtype) for name, module in OPTIMIZERS.items() for dtype in module.CHANGES]


def run_all(data: Path, out: Path, dtype: str, overrides: list[str]) -> None:
    """Each engine in turn on this group of ranks: its first weights, its losses, its last
    weights.
    """
    from dnt_scale.distributed import process_group

    me = process_group.start("cpu")
    for label in ENGINES:
        chosen = [*overrides, f"train.dtype={dtype}", "train.micro_batch=4"]
        with engines.built(label, me, data, *chosen) as (run, engine):
            folder = out / f"{label}-{me.world_size}-{dtype}"
            engines.save(engine, me, folder)
            found = engines.losses(run, engine, me, 0, STEPS)
            engines.save(engine, me, folder)
            if me.first:
                (folder / "losses.json").write_text(json.dumps(found))
    process_group.stop()


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def matrix(request, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("matrix")
    optimizer, dtype = request.param
    module = OPTIMIZERS[optimizer]
    overrides = getattr(module, dtype.upper(), module.OVERRIDES)
    numbers = RANKS.get((optimizer, dtype), (2,))
    for ranks in numbers:
        call(run_all, corpus, out, dtype, overrides, ranks=ranks).ok()
    found = {}
    for each in {dtype, "fp32"}:
        chosen = [*overrides, f"train.steps={STEPS}", f"train.dtype={each}"]
        run = config.load(tiny(corpus, out, *chosen))
        found[each] = engines.reference_losses(run, module.reference_update)
    buffers = buffer_shapes(
        {name: tuple(w.shape) for name, w in found[dtype][1].items()}, run.optim
    )
    return out, module, numbers, buffers, dtype, *found[dtype], found["fp32"][0]


@pytest.mark.parametrize("label", ENGINES)
def test_every_engine_on_any_ranks_is_plain_pytorch(matrix, label):
    out, module, numbers, buffers, dtype, losses, weights, exact = matrix
    first = out / f"fsdp-{numbers[0]}-{dtype}" / "step-00000000"
    initial = tensors(first)
    for ranks in numbers:
        folder = out / f"{label}-{ranks}-{dtype}"
        assert same_tensors(folder / "step-00000000", first), f"initial weights on {ranks} ranks"
        found = json.loads((folder / "losses.json").read_text())
        np.testing.assert_allclose(
            found, losses, rtol=0, atol=DTYPES[dtype], err_msg=f"on {ranks} ranks"
        )
        assert (np.abs(np.subtract(found, exact)).max() > 1e-4) == (dtype == "bf16"), (
            "computed in another dtype"
        )
        last = tensors(folder / f"step-{STEPS:08d}")
        check_weights(last, weights, initial, module, dtype)
        assert buffers.keys() <= last.keys()
        dtypes = {tensor.dtype for tensor in last.values()}
        assert dtypes == {torch.float32}


def check_weights(last, weights, initial, module, dtype):
    """The weights of a checkpoint are those of the reference, as nearly as the optimizer's test
    says.
    """
    assert {key for key in last if key.startswith("model.")} == {
        f"model.{name}" for name in weights
    }
    for name, weight in weights.items():
        change = weight - initial[f"model.{name}"]
        error = last[f"model.{name}"] - weight
        assert error.norm() <= module.CHANGES[dtype] * change.norm(), name
        assert dtype != "fp32" or error.abs().max() <= module.ERROR, name


# --- a decoder with every choice beside the norms -------------------------------------------------

DECODER = [
    "model.setting=S5",
    "model.positions=rope",
    "model.rope={theta: 100, scaling: llama3, factor: 2, original_context: 32}",
    "model.heads=4",
    "model.kv_heads=2",
    "model.head_size=24",
    "model.activation=swiglu",
    "model.ffn_size=96",
    "model.vocab_multiple=96",
    "model.tied_head=false",
    "model.z_loss=1e-3",
    "model.logit_cap=5",
    "data.document_mask=true",
    # row steps, with the factor of tall matrices on w_1 and w_3
    "optim=rmnp",
    "optim.nesterov=false",
    "optim.lr=2e-3",
]
DECODER_ENGINES = ("ddp", "fsdp", "zero2")
HALF = 3  # steps before the checkpoint, and after it


def run_decoder(data: Path, out: Path) -> None:
    """Each engine in turn: its losses, those after a checkpoint once more after a resume, and what
    blocks are given in bf16.
    """
    from dnt_scale.distributed import process_group

    me = process_group.start("cpu")
    chosen = [*DECODER, "train.micro_batch=4"]
    for label in DECODER_ENGINES:
        folder, found = out / f"{label}-{me.world_size}", {}
        with engines.built(label, me, data, *chosen) as (run, engine):
            check_rotary(run, engine)
            found["losses"] = engines.losses(run, engine, me, 0, HALF)
            saved = engines.save(engine, me, folder)
            found["losses"] += engines.losses(run, engine, me, HALF, HALF)
            engines.save(engine, me, folder)
        with engines.built(label, me, data, *chosen) as (run, engine):
            engines.load(engine, me, saved)
            check_rotary(run, engine)
            found["resumed"] = engines.losses(run, engine, me, HALF, HALF)
            engines.save(engine, me, folder / "resumed")
        if me.world_size == 1:
            with engines.built(label, me, data, *chosen, "train.dtype=bf16") as (run, engine):
                found["given"] = given_to_a_block(run, engine, me)
        if me.first:
            (folder / "found.json").write_text(json.dumps(found))
    process_group.stop()


def task_of(engine: Engine) -> Any:
    return engine.task if hasattr(engine, "task") else engine.model.task


def check_rotary(run: RunConfig, engine: Engine) -> None:
    expected = table(run.model.rope, run.model.sizes.head, run.model.context).float()
    assert torch.equal(task_of(engine).rotary, expected)


def given_to_a_block(run: RunConfig, engine: Engine, me: Ranks) -> list[str]:
    """The dtypes of activations and rotary table that a block is given in a step."""
    seen: list[str] = []

    def see(module: torch.nn.Module, given: tuple[Any, ...]) -> None:
        x, documents, _, rotary, _ = given
        positions_BT = documents.positions_BT
        assert torch.equal(rotary[:, :, 0], task_of(engine).rotary[positions_BT])
        # not each row is one document
        assert (positions_BT != torch.arange(positions_BT.shape[1])).any()
        seen.extend([str(x.dtype), str(rotary.dtype)])

    check_rotary(run, engine)
    task_of(engine).blocks[1].register_forward_pre_hook(see)
    engines.losses(run, engine, me, 0, 1)
    return seen[:2]


@pytest.fixture(scope="module")
def decoders(packed, tmp_path_factory):
    out = tmp_path_factory.mktemp("decoders")
    for ranks in (1, 2, 4):
        call(run_decoder, packed, out, ranks=ranks).ok()
    run = config.load(tiny(packed, out, *DECODER, f"train.steps={STEPS}"))
    return out, *engines.reference_losses(run, OPTIMIZERS["msgdw"].reference_update)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("label", DECODER_ENGINES)
def test_a_decoder_with_everything_is_the_same_on_any_engine_and_resumes(decoders, label, ranks):
    out, losses, weights = decoders
    assert weights["blocks.0.ffn.w_3.weight"].shape == (96, 64)
    folder = out / f"{label}-{ranks}"
    found = json.loads((folder / "found.json").read_text())
    np.testing.assert_allclose(found["losses"], losses[: 2 * HALF], rtol=0, atol=1e-5)
    assert found["resumed"] == found["losses"][HALF:]
    last = folder / f"step-{2 * HALF:08d}"
    assert same_tensors(folder / "resumed" / last.name, last)
    assert found.get("given", []) == (["torch.bfloat16", "torch.float32"] if ranks == 1 else [])
    for name, tensor in tensors(last).items():
        if name.endswith(("tok_emb.weight", "head.weight")):
            assert tensor.shape == (576, 64) and not tensor[512:].any(), name


# --- without a gradient buffer --------------------------------------------------------------------

UNCLIPPED = ["optim.clip_norm=1e9", "train.micro_batch=2"]  # 2 ranks have 2 micro-batches each
UNBUFFERED = [*UNCLIPPED, "optim.gradient_buffer=false", "optim.clip=previous"]


def run_unbuffered(data: Path, out: Path, runs: dict[str, list[str]]) -> None:
    from dnt_scale.distributed import process_group

    me = process_group.start("cpu")
    for name, overrides in runs.items():
        with engines.built("fsdp", me, data, *overrides) as (run, engine):
            engines.save(engine, me, out / name)
            engines.losses(run, engine, me, 0, STEPS)
            engines.save(engine, me, out / name)
    process_group.stop()


def test_without_a_gradient_buffer_an_optimizer_that_can_is_plain_pytorch_too(corpus, tmp_path):
    runs, weights = {}, {}
    for name, module in OPTIMIZERS.items():
        chosen = getattr(module, "UNBUFFERED", module.OVERRIDES)
        run = config.load(tiny(corpus, tmp_path, *chosen, *UNCLIPPED, f"train.steps={STEPS}"))
        if run.optim.needs_gradient_buffer() is None:
            runs[name] = [*chosen, *UNBUFFERED]
            weights[name] = engines.reference_losses(run, module.reference_update)[1]
    assert "msgdw" in runs
    call(run_unbuffered, corpus, tmp_path, runs, ranks=2).ok()
    for name in runs:
        initial, last = (tensors(tmp_path / name / f"step-{step:08d}") for step in (0, STEPS))
        check_weights(last, weights[name], initial, OPTIMIZERS[name], "fp32")


# --- checkpoints ----------------------------------------------------------------------------------

SAVERS = {"ddp": 2, "fsdp": 2, "hsdp": 4, "zero1": 2, "zero3": 2}
LOADERS = ["ddp", "fsdp", "zero1", "zero3"]
# (saver, loader, ranks): every saver with every loader and with hsdp, every loader on every number
# of ranks
EXCHANGES = [
    (saved, label, ranks)
    for number, saved in enumerate(SAVERS)
    for place, label in enumerate(LOADERS)
    for ranks in (1, 2, 3)
    if (number + place + ranks) % 3 == 0
] + [(saved, "hsdp", 4) for saved in SAVERS]
BEFORE, AFTER = 4, 5
BATCH = [
    "train.global_batch=12",  # divides by 1, 2, 3 and 4 ranks
    "train.micro_batch=6",
    "+optim.groups.rows={pattern: 'w_[12]', update: row_adaptive, lr: 1e-3}",
    "+optim.groups.gains={pattern: 'gain', lr: 1e-3, optimizer: {algorithm: adamw}}",
]


def save_each(data: Path, out: Path, labels: list[str]) -> None:
    from dnt_scale.distributed import process_group

    me = process_group.start("cpu")
    for label in labels:
        with engines.built(label, me, data, *BATCH) as (run, engine):
            engines.losses(run, engine, me, 0, BEFORE)
            engines.save(engine, me, out / label)
            after = engines.losses(run, engine, me, BEFORE, AFTER)
            if me.first:
                (out / label / "losses.json").write_text(json.dumps(after))
    process_group.stop()


def load_each(data: Path, out: Path) -> None:
    from dnt_scale.distributed import process_group

    me = process_group.start("cpu")
    for saved, label, on_ranks in EXCHANGES:
        if on_ranks == me.world_size:
            folder = out / f"{saved}-{label}-{me.world_size}"
            with engines.built(label, me, data, *BATCH) as (run, engine):
                engines.load(engine, me, out / saved / f"step-{BEFORE:08d}")
                engines.save(engine, me, folder)
                after = engines.losses(run, engine, me, BEFORE, AFTER)
                if me.first:
                    (folder / "losses.json").write_text(json.dumps(after))
    process_group.stop()


@pytest.fixture(scope="module")
def exchange(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("exchange")
    for ranks in sorted(set(SAVERS.values())):
        call(
            save_each,
            corpus,
            out,
            [label for label in SAVERS if SAVERS[label] == ranks],
            ranks=ranks,
        ).ok()
    for ranks in (1, 2, 3, 4):
        call(load_each, corpus, out, ranks=ranks).ok()
    return out


@pytest.mark.parametrize(("saved", "label", "ranks"), EXCHANGES)
def test_a_checkpoint_of_any_engine_goes_on_in_any_other(exchange, saved, label, ranks):
    folder = exchange / f"{saved}-{label}-{ranks}"
    step = f"step-{BEFORE:08d}"
    for kind in ("momentum_buffer", "row_square", "exp_avg", "exp_avg_sq"):
        assert any(name.startswith(f"{kind}.") for name in tensors(folder / step))
    assert any(
        value.abs().max() > 0
        for name, value in tensors(folder / step).items()
        if "momentum" in name
    )
    assert same_tensors(folder / step, exchange / saved / step)
    expected = json.loads((exchange / saved / "losses.json").read_text())
    np.testing.assert_allclose(
        json.loads((folder / "losses.json").read_text()), expected, rtol=0, atol=1e-6
    )
