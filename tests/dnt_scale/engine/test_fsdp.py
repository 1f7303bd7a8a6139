"""The FSDP2 engine on real ranks: against one rank, against sums written out, and bit for bit
where that is due.
"""

import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from dnt_scale.config import RunConfig
from dnt_scale.distributed import process_group
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.engine import fsdp
from dnt_scale.engine.fsdp import FSDPEngine
from dnt_scale.engine.momentum_in_backward import MomentumInBackward
from dnt_scale.model.dnt import DNT
from dnt_scale.model.init import init_weights, initial_tensor
from testbed.configs import composed
from testbed.run import call, tiny

STEPS, ROWS = 5, 12  # 12 rows a step divide by 1, 2, 3 and 4 ranks
# where rounding hardly grows: sums are compared that are made in another order
SLOW = ["optim=msgdw", "optim.lr=0.01"]
NO_CLIP = [*SLOW, "optim.clip_norm=null"]
UNBUFFERED = [*SLOW, "optim.gradient_buffer=false"]
ROW_GROUP = ["optim.groups.embedding={pattern: '^tok_emb', update: row_normalized}"]
ADAMW = ["optim=adamw", "optim.lr=1e-3"]
FLAT = ["optim.schedule.name=constant", "optim.schedule.warmup_steps=0"]


def chosen(*overrides: str) -> RunConfig:
    """A tiny run of 2 layers, never trained by the loop: data and folder are not looked at."""
    given = ["train.global_batch=12", "train.micro_batch=3", "train.steps=20", *overrides]
    return composed(*tiny(Path("no-data"), Path("no-folder"), *given))


def global_batch(step: int) -> torch.Tensor:
    """(ROWS, 33) tokens; some rows end in padding."""
    rows = torch.randint(0, 512, (ROWS, 33), generator=torch.Generator().manual_seed(step))
    rows[::5, 20:] = -1
    return rows


def rows_of(step: int, me: Ranks) -> torch.Tensor:
    return global_batch(step).chunk(me.world_size)[me.rank]


@contextmanager
def built(me: Ranks, *overrides: str) -> Iterator[FSDPEngine]:
    run = chosen(*overrides)
    engine = fsdp.build(run, lambda: DNT(run.model), me, total_steps=20)
    try:
        yield engine
    finally:
        engine.close()


def clip(loss: float, grad_norm: float) -> float:
    return min(1.0, 1.0 / grad_norm) if math.isfinite(loss + grad_norm) else 0.0


def keep(loss: float, grad_norm: float) -> float:
    return 1.0


def contents(engine: FSDPEngine) -> dict[str, torch.Tensor]:
    return {shard.name: shard.data.clone() for shard in engine.shards()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def write(engine: FSDPEngine, path: Path, me: Ranks) -> None:
    """This rank's shards, to be put together by `whole`."""
    path.mkdir(exist_ok=True)
    shards = engine.shards()
    save_file(
        {shard.name: shard.data.contiguous() for shard in shards}, path / f"{me.rank}.safetensors"
    )
    places = {
        shard.name: [shard.shape, shard.offset, shard.replica, shard.replicas] for shard in shards
    }
    (path / f"{me.rank}.json").write_text(json.dumps(places))


def whole(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of all ranks, after a check that every replica tiles each of them with equal
    bits.
    """
    copies: dict[tuple[str, int], torch.Tensor] = {}
    numbers: dict[str, int] = {}
    for file in sorted(path.glob("*.safetensors")):
        data, places = load_file(file), json.loads(file.with_suffix(".json").read_text())
        for name, (shape, offset, replica, replicas) in places.items():
            copy = copies.setdefault((name, replica), torch.full(shape, torch.nan))
            window = tuple(slice(o, o + s) for o, s in zip(offset, data[name].shape, strict=True))
            assert copy[window].isnan().all(), f"{name} of replica {replica}: written twice"
            copy[window] = data[name]
            numbers[name] = replicas
    for (name, replica), copy in copies.items():
        assert not copy.isnan().any(), f"{name} of replica {replica}: not whole"
        assert torch.equal(copy, copies[name, 0]), f"{name}: replica {replica} differs"
    assert {(name, r) for name, number in numbers.items() for r in range(number)} == set(copies)
    return {name: copy for (name, replica), copy in copies.items() if replica == 0}


# --- every mesh and option trains as one rank does ------------------------------------------------

UNTIED = ["model.tied_head=false"]  # embedding and head are units of their own
NARROW = ["model.heads=16"]  # QK gains of 4 elements, 2 a rank: nothing is left for the third
VARIANTS: dict[int, dict[str, list[str]]] = {
    1: {
        "plain": [],
        "narrow": NARROW,
        "adamw": ADAMW,
        "bf16": ["train.dtype=bf16"],
        "untied": UNTIED,
        "full": ["engine.activation_checkpointing=full"],
        "selective": ["engine.activation_checkpointing=selective"],
        "second": ["engine.activation_checkpointing=2"],
    },
    2: {
        "ddp": ["engine=ddp"],
        "offload": ["engine.cpu_offload=true"],
        "prefetch0": ["engine.prefetch=0"],
        "prefetch2": ["engine.prefetch=2", "engine.reshard_after_forward=false"],
        "compiled": [
            "engine.compile=true",
            "engine.activation_checkpointing=selective",
            "train.micro_batch=6",
        ],
        "adamw": ADAMW,
        "bf16": ["train.dtype=bf16"],
        "bf16_momentum": ["optim.momentum_dtype=bf16"],
        "untied": UNTIED,
        "untied_ddp": [*UNTIED, "engine=ddp"],
        "untied_offload": [*UNTIED, "engine.cpu_offload=true"],
        "untied_prefetch0": [*UNTIED, "engine.prefetch=0"],
        "untied_prefetch2": [
            *UNTIED,
            "engine.prefetch=2",
            "engine.reshard_after_forward=false",
            "engine.activation_checkpointing=full",
        ],
    },
    3: {
        "fsdp": [],
        "untied": UNTIED,
        "full": ["engine.activation_checkpointing=full"],
        "narrow": NARROW,
    },
    4: {
        "hsdp": ["engine=hsdp", "engine.replicas=2"],
        "untied_hsdp": [*UNTIED, "engine=hsdp", "engine.replicas=2"],
    },
}
# by how a variant's name begins; else plain
REFERENCE = {"narrow": "narrow", "adamw": "adamw", "bf16": "bf16", "untied": "untied"}


def run_variants(out: Path) -> None:
    me = process_group.start("cpu")
    for label, overrides in VARIANTS[me.world_size].items():
        with built(me, *overrides) as engine:
            folder = out / f"{me.world_size}-{label}"
            write(engine, folder, me)
            losses = [engine.train_step(rows_of(step, me), clip).loss for step in range(STEPS)]
            losses.append(engine.evaluate(rows_of(99, me).split(6))["loss"])
            losses.append(engine.train_step(rows_of(STEPS, me), clip).loss)
            if me.first:
                (folder / "losses.json").write_text(json.dumps(losses))
    process_group.stop()


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    out = tmp_path_factory.mktemp("variants")
    for world in VARIANTS:
        finished = call(run_variants, out, ranks=world).ok()
        assert finished.out == "" and finished.err == ""
    return out


def losses_of(curves: Path, folder: str) -> list[float]:
    return json.loads((curves / folder / "losses.json").read_text())


@pytest.mark.parametrize(
    "folder", [f"{world}-{label}" for world in VARIANTS for label in VARIANTS[world]]
)
def test_starts_from_the_initial_tensors_and_trains_as_one_rank(curves, folder):
    label = folder.partition("-")[2]
    run = chosen(*VARIANTS[int(folder[0])][label])
    tensors = whole(curves / folder)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in DNT(run.model).named_parameters()}
    assert {name.removeprefix("model.") for name in tensors if name.startswith("model.")} == set(
        shapes
    )
    for name, shape in shapes.items():
        assert torch.equal(
            tensors[f"model.{name}"], initial_tensor(name, shape, run.model, run.run.seed)
        ), name
    buffers = {"exp_avg", "exp_avg_sq"} if label == "adamw" else {"momentum_buffer"}
    assert {name.partition(".")[0] for name in tensors} == {"model", *buffers}

    found, wanted = (
        losses_of(curves, folder),
        losses_of(curves, f"1-{REFERENCE.get(label.partition('_')[0], 'plain')}"),
    )
    assert len(set(wanted)) == len(wanted)
    assert found == pytest.approx(wanted, rel=0, abs=1e-2 if "bf16" in label else 1e-5)


@pytest.mark.parametrize("label", ["full", "selective", "second"])
def test_recomputing_activations_changes_no_bit(curves, label):
    assert losses_of(curves, f"1-{label}") == losses_of(curves, "1-plain")


# --- skipping, restoring, and what stays in memory ------------------------------------------------


def run_skips(me: Ranks, *overrides: str) -> None:
    with built(me, *FLAT, *overrides) as engine, built(me, *FLAT, *overrides) as straight:
        for one in (engine, straight):
            one.train_step(rows_of(0, me), clip)
        before = contents(engine)
        stats = engine.train_step(rows_of(1, me), lambda loss, grad_norm: 0.0)
        assert stats.skipped and same(before, contents(engine))
        assert all(part.parameter.grad is None and part.rows.grad is None for part in engine.parts)
        assert engine.scalars() == {"step": 2.0, "updates": 1.0}
        assert engine.train_step(rows_of(1, me), clip) == straight.train_step(rows_of(1, me), clip)
        assert same(contents(engine), contents(straight)), "a skipped step left something behind"


def run_halved(me: Ranks) -> None:
    """The factor multiplies the whole gradient: the momentum of a first step is the gradient."""
    with built(me, *NO_CLIP) as engine, built(me, *NO_CLIP) as straight:
        engine.train_step(rows_of(0, me), lambda loss, grad_norm: 0.25)
        straight.train_step(rows_of(0, me), keep)
        halved, plain = contents(engine), contents(straight)
        for name in plain:
            if name.startswith("momentum_buffer"):
                assert torch.equal(halved[name], 0.25 * plain[name]), name
        assert plain["momentum_buffer.blocks.1.ffn.w_1.weight"].any()


def run_restores(me: Ranks, *overrides: str) -> None:
    def steps(engine: FSDPEngine) -> list[float]:
        return [engine.train_step(rows_of(step, me), clip).loss for step in (2, 3)]

    with built(me, *overrides) as engine, built(me, *overrides) as other:
        for step in (0, 1):
            engine.train_step(rows_of(step, me), clip)
        saved, scalars = contents(engine), engine.scalars()
        losses = steps(engine)
        for one in (engine, other):
            one.evaluate([rows_of(7, me)])  # leaves nothing of the old weights
            for shard in one.shards():
                shard.data.copy_(saved[shard.name])
            one.refresh(scalars)
            assert steps(one) == losses, overrides
            assert one.scalars() == scalars | {"step": 4.0, "updates": 4.0, **previous_norm(one)}


def previous_norm(engine: FSDPEngine) -> dict[str, float]:
    return {name: value for name, value in engine.scalars().items() if name == "previous_norm"}


def run_poisoned(me: Ranks) -> None:
    """A gradient of one rank's rows that is not finite is every rank's bad step."""
    with built(me, "engine=hsdp", "engine.replicas=2") as engine:
        if me.rank == 1:
            poison(engine, "blocks.1.attn.w_q.weight")
        before = contents(engine)
        stats = engine.train_step(rows_of(0, me), clip)
        assert stats.skipped and math.isnan(stats.grad_norm) and math.isfinite(stats.loss)
        assert same(before, contents(engine))


def poison(engine: FSDPEngine, name: str) -> None:
    """This rank's rows of a gradient become nan when they arrive, before the engine sees them."""
    parameter = next(part.parameter for part in engine.parts if part.name == name)

    def hook(parameter: torch.Tensor) -> None:
        parameter.grad.to_local().fill_(torch.nan)

    handle = parameter.register_post_accumulate_grad_hook(hook)
    parameter._post_accumulate_grad_hooks.move_to_end(handle.id, last=False)


def run_counts(me: Ranks, *overrides: str) -> None:
    """Steps leave no host objects behind (torchtitan #3790)."""

    def specs() -> int:
        gc.collect()
        return sum(isinstance(thing, DTensorSpec) for thing in gc.get_objects())

    with built(me, *overrides) as engine:
        engine.train_step(rows_of(0, me), clip)
        before = specs()
        for step in range(1, 6):
            engine.train_step(rows_of(step, me), clip)
        assert 0 < specs() == before
        assert all(
            not isinstance(p, type(engine.parts[0].parameter)) for p in engine.optimizer.state
        )


def run_behaviour() -> None:
    me = process_group.start("cpu")
    for overrides in ([], UNTIED, ["engine=ddp", *ADAMW], ["engine.cpu_offload=true", *ADAMW]):
        run_skips(me, *overrides)
        run_restores(me, *overrides)
    run_restores(me, *UNBUFFERED, "optim.clip=previous")
    run_halved(me)
    run_counts(me)
    run_counts(me, *ADAMW)
    process_group.stop()


def test_skipping_scaling_restoring_and_host_objects():
    call(run_behaviour, ranks=2).ok()


def run_one_bad_rank() -> None:
    me = process_group.start("cpu")
    run_poisoned(me)
    run_unbuffered_poisoned(me)
    process_group.stop()


def test_one_bad_rank_is_every_ranks_bad_step():
    call(run_one_bad_rank, ranks=4).ok()


# --- no gradient buffer ---------------------------------------------------------------------------


def run_unbuffered_poisoned(me: Ranks) -> None:
    """The weights stay, and of that tensor only the rows of the bad rank have not been taken."""
    name = "blocks.1.attn.w_q.weight"
    for how in ("previous", "tensor"):
        overrides = ["engine=hsdp", "engine.replicas=2", *UNBUFFERED, f"optim.clip={how}", *FLAT]
        with built(me, *overrides) as engine, built(me, *overrides) as straight:
            for one in (engine, straight):
                one.train_step(rows_of(0, me), clip)
            if me.rank == 1:
                poison(engine, name)
            before = contents(engine)
            stats = engine.train_step(rows_of(1, me), clip)
            straight.train_step(rows_of(1, me), clip)
            after, taken = contents(engine), contents(straight)
            assert stats.skipped and math.isnan(stats.grad_norm)
            assert engine.scalars() | previous_norm(straight) == {
                **straight.scalars(),
                "updates": 1.0,
            }
            for key, value in before.items():
                if key.startswith("model."):
                    assert torch.equal(after[key], value), key
                elif key == f"momentum_buffer.{name}" and (
                    me.rank == 1 or (how == "tensor" and me.rank == 0)
                ):
                    assert torch.equal(after[key], value * 0.9), key
                else:
                    assert torch.equal(after[key], taken[key]), key


def run_unbuffered(out: Path, overrides: list[str]) -> None:
    """Five steps with a buffer and without, with either clipping and none."""
    me = process_group.start("cpu")
    for label in runs_on(me.world_size):
        with built(me, *overrides, *UNBUFFERED_RUNS[label]) as engine:
            norms = [step_freeing_gradients(engine, rows_of(step, me)) for step in range(STEPS)]
            write(engine, out / label, me)
            (out / label / "norms.json").write_text(json.dumps(norms))
            assert engine.optimizer.updates == STEPS - 1
    process_group.stop()


UNBUFFERED_RUNS = {
    "buffer": NO_CLIP,
    "none": [*UNBUFFERED, "optim.clip_norm=null"],
    "dampened-buffer": [*NO_CLIP, "optim.dampening=0.9"],
    "dampened": [*UNBUFFERED, "optim.clip_norm=null", "optim.dampening=0.9"],
    "rows-buffer": [*NO_CLIP, *ROW_GROUP],
    "rows": [*UNBUFFERED, "optim.clip_norm=null", *ROW_GROUP],
    "bf16": [*UNBUFFERED, "optim.clip_norm=null", "optim.momentum_dtype=bf16"],
    "tensor": [*UNBUFFERED, "optim.clip=tensor", "optim.clip_norm=0.3"],
    "previous": [*UNBUFFERED, "optim.clip=previous", "optim.clip_norm=0.5"],
}


def runs_on(world: int) -> list[str]:
    """All on 1 and 4 ranks; on 2 and 3 those in which a rank computes with more than its own
    elements.
    """
    return [
        label
        for label in UNBUFFERED_RUNS
        if world in (1, 4) or not label.startswith(("dampened", "bf16"))
    ]


def step_freeing_gradients(engine: FSDPEngine, rows: torch.Tensor) -> float:
    """A step; without a buffer, no gradient is left when backward ends, although references to
    all are kept here.
    """
    arrived: list[torch.Tensor] = []
    handles = []
    for part in engine.parts:
        handles.append(
            part.parameter.register_post_accumulate_grad_hook(
                lambda p: arrived.append(p.grad.to_local())
            )
        )
        part.parameter._post_accumulate_grad_hooks.move_to_end(handles[-1].id, last=False)

    def judge(loss: float, grad_norm: float) -> float:
        there = [part.parameter.grad is not None for part in engine.parts]
        held = [grad.untyped_storage().size() > 0 for grad in arrived]
        if isinstance(engine.gradients, MomentumInBackward):
            assert not any(there) and not any(held)
        else:
            assert all(there) and any(held)
        return 1.0

    stats = engine.train_step(rows, judge)
    assert arrived
    for handle in handles:
        handle.remove()
    return stats.grad_norm


def written_out(world: int, *overrides: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Momentum SGD as the clippings define it, in plain PyTorch: the last tensors, and each
    step's reported norm.
    """
    run = chosen(*overrides)
    how, clip_norm = run.optim.clip, run.optim.clip_norm
    model = DNT(run.model)
    init_weights(model, run.run.seed)
    names, weights = zip(*model.named_parameters(), strict=True)
    momentum = [torch.zeros_like(weight) for weight in weights]
    schedule = fsdp.Schedule(run.optim.schedule, 20)
    norms: list[float] = []
    for step in range(STEPS):
        rows = global_batch(step)
        tokens = int((rows[:, 1:] != -1).sum())
        # the i-th micro-batch is every rank's i-th
        each = [part.split(run.train.rows_a_forward) for part in rows.chunk(world)]
        micros = [torch.cat(parts) for parts in zip(*each, strict=True)]
        grads = []
        for micro in micros:
            loss = model(micro[:, :-1].clamp(min=0), micro[:, 1:]) / tokens
            grads.append(torch.autograd.grad(loss, weights))
        norms.append(sum(float(torch.stack([g.norm() for g in grad]).norm()) for grad in grads))
        previous = norms[-2] if step else norms[0]
        lr = run.optim.lr * schedule.factor(step)
        with torch.no_grad():
            for place, (weight, v) in enumerate(zip(weights, momentum, strict=True)):
                v.mul_(run.optim.momentum)
                for grad in grads:
                    own = len(grads) * float(grad[place].norm())
                    v += grad[place] * min(1.0, clip_norm / (own if how == "tensor" else previous))
                weight.mul_(1 - lr * (run.optim.weight_decay if weight.ndim > 1 else 0.0)).sub_(
                    lr * v
                )
    found = {f"model.{name}": weight.detach() for name, weight in zip(names, weights, strict=True)}
    return found | {
        f"momentum_buffer.{name}": v for name, v in zip(names, momentum, strict=True)
    }, norms


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, []),
        (2, ["engine=ddp"]),
        (2, UNTIED),
        (3, [*NARROW, "engine.cpu_offload=true"]),
        (4, ["engine=hsdp", "engine.replicas=2", "engine.activation_checkpointing=full"]),
    ],
    ids=["one rank", "ddp", "a head of its own", "an empty shard, offloaded", "hsdp"],
)
def test_without_a_gradient_buffer(world, overrides, tmp_path):
    call(run_unbuffered, tmp_path, overrides, ranks=world).ok()
    pairs = {"none": "buffer", "dampened": "dampened-buffer", "rows": "rows-buffer"}
    for label, same_as in [(label, pairs[label]) for label in runs_on(world) if label in pairs]:
        found, wanted = whole(tmp_path / label), whole(tmp_path / same_as)
        for name, tensor in wanted.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=0, atol=1e-6, msg=f"{label}: {name}"
            )
    exact = whole(tmp_path / "buffer")
    rounded = whole(tmp_path / "bf16") if "bf16" in runs_on(world) else {}
    for name, tensor in exact.items():
        if name in rounded and name.startswith("momentum_buffer."):
            assert torch.equal(rounded[name].bfloat16().float(), rounded[name]), name
            assert 0 < (rounded[name] - tensor).norm() < 0.02 * tensor.norm(), name
    for label in ("tensor", "previous"):
        found, norms = (
            whole(tmp_path / label),
            json.loads((tmp_path / label / "norms.json").read_text()),
        )
        wanted, wanted_norms = written_out(world, *overrides, *UNBUFFERED_RUNS[label])
        assert norms == pytest.approx(wanted_norms, rel=1e-4)
        for name, tensor in wanted.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=0, atol=1e-6, msg=f"{label}: {name}"
            )
