"""The DeepSpeed engine in every stage, on one rank and two, against FSDP2 on one."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from dnt_scale import engine
from dnt_scale.checkpoint.tensor_shards import TensorShard
from dnt_scale.config import ConfigError, RunConfig
from dnt_scale.config.deepspeed_json import ZERO
from dnt_scale.distributed import process_group
from dnt_scale.distributed.errors import AgreedError
from dnt_scale.model.dnt import DNT
from dnt_scale.model.init import init_weights, initial_tensor
from testbed.configs import composed
from testbed.run import TINY_MODEL, call

STEPS = 5
OPTIMIZERS = {
    "msgdw": ["optim=msgdw", "optim.lr=0.1"],
    "rows": ["optim=msgdw_r", "optim.lr=0.1"],
    "adamw": ["optim=adamw", "optim.lr=1e-3"],
}
PLAIN = ["zero0", "zero1", "zero2", "zero3"]
# every key that acts, with another value than its default
FLAT = [
    "round_robin_gradients: true, parameter_alignment: true, overlap_comm: true, "
    "reduce_bucket_size: 10000, use_multi_rank_bucket_allreduce: false",
    "contiguous_gradients: false, reduce_scatter: false",
]
JSON = {
    1: FLAT,
    2: FLAT,
    3: [
        "sub_group_size: 20000, stage3_param_persistence_threshold: 0, overlap_comm: false, "
        "reduce_bucket_size: 10000, enable_sanity_checks: true",
        "contiguous_gradients: false, reduce_scatter: false, stage3_allgather_sequential: true, "
        "stage3_max_live_parameters: 10, stage3_max_reuse_distance: 10, "
        "stage3_prefetch_bucket_size: 10",
        "stage3_model_persistence_threshold: 1000, stage3_module_granularity_threshold: 100, "
        "stage3_use_all_reduce_for_fetch_params: true",
    ],
}
ENGINES = {
    **{name: [f"engine={name}"] for name in PLAIN},
    "zero1+offload": ["engine=zero1", "engine.offload_optimizer=true"],
    "zero2+offload": ["engine=zero2", "engine.offload_optimizer=true"],
    "zero3+offload": ["engine=zero3_offload"],
    "zero3+weights": ["engine=zero3", "engine.offload_parameters=true"],
    **{
        f"zero{stage}, own JSON {number}": [
            f"engine=zero{stage}",
            f"engine.deepspeed={{zero_optimization: {{{keys}}}}}",
        ]
        for stage, given in JSON.items()
        for number, keys in enumerate(given)
    },
    "zero1, recomputing": ["engine=zero1", "engine.activation_checkpointing=selective"],
    # of one shape
    "zero1, compiled": ["engine=zero1", "engine.compile=true", "train.micro_batch=6"],
    "zero3, recomputing": [
        "engine=zero3",
        "engine.activation_checkpointing=full",
        "engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}",
    ],
}
ROWS = 12  # on two ranks: micro-batches of 4 and 2


class Case(NamedTuple):
    label: str
    optimizer: str
    ranks: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.label}-{self.optimizer}-{self.ranks}-{self.dtype}"


CASES = [
    *(Case(label, "rows", 2, "fp32") for label in ENGINES),
    *(Case(label, "rows", 1, "fp32") for label in PLAIN),
    *(Case(label, "rows", 2, "bf16") for label in [*PLAIN, "zero1+offload", "zero3+offload"]),
    *(Case(label, optimizer, 2, "fp32") for optimizer in ("msgdw", "adamw") for label in PLAIN),
]


def run_of(*overrides: str) -> RunConfig:
    """A tiny run of constant learning rate."""
    return composed(
        *TINY_MODEL,
        "run.name=deepspeed",
        "run.device=cpu",
        "data.path=unused",
        f"train.steps={STEPS}",
        f"train.global_batch={ROWS}",
        "train.micro_batch=4",
        "train.dtype=fp32",
        "optim.schedule.name=constant",
        "optim.schedule.warmup_steps=0",
        *overrides,
    )


def build(run: RunConfig, me: process_group.Ranks):
    return engine.build(run, lambda: DNT(run.model), me, STEPS)


def batch_of(step: int, me: process_group.Ranks) -> torch.Tensor:
    """This rank's rows of a made-up global batch of few tokens, which can be learnt; some
    targets do not count.
    """
    tokens = torch.randint(0, 16, (ROWS, 33), generator=torch.Generator().manual_seed(step))
    tokens[0, 20:] = -1
    return tokens.chunk(me.world_size)[me.rank]


def clip(loss: float, norm: float) -> float:
    assert math.isfinite(loss) and math.isfinite(norm)
    return min(1.0, 0.5 / norm)


def skip(loss: float, norm: float) -> float:
    return 0.0


def step(engine, number: int, me: process_group.Ranks, judge=clip):
    return engine.train_step(batch_of(number, me), judge)


def contents(engine) -> list[torch.Tensor]:
    return [shard.data.clone() for shard in engine.shards()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def check_start(run: RunConfig, engine, me: process_group.Ranks) -> None:
    """The shards of all ranks tile each tensor; weights are bit for bit as they must be, buffers
    are zero.
    """
    with torch.device("meta"):
        shapes = {
            name: tuple(parameter.shape) for name, parameter in DNT(run.model).named_parameters()
        }
    buffers = ["exp_avg", "exp_avg_sq"] if run.optim.algorithm == "adamw" else ["momentum_buffer"]
    mine = []
    for shard in engine.shards():
        kind, _, name = shard.name.partition(".")
        assert shard.shape == shapes[name] and shard.data.dtype == torch.float32
        place = window(shard)
        if kind == "model":
            full = initial_tensor(name, torch.Size(shard.shape), run.model, run.run.seed)
            assert torch.equal(shard.data, full[place]), name
        else:
            assert not shard.data.any(), shard.name
        mine.append((shard.name, place, shard.replica, shard.replicas))
    everyone: list[list] = [[] for _ in range(me.world_size)]
    dist.all_gather_object(everyone, mine)
    copies = me.world_size if run.engine.stage == 0 else 1
    held = {
        f"{kind}.{name}": torch.zeros(copies, *shapes[name])
        for kind in ["model", *buffers]
        for name in shapes
    }
    elements = [0] * me.world_size
    for rank, shards in enumerate(everyone):
        for name, place, replica, replicas in shards:
            assert replicas == copies
            held[name][replica][place] += 1
            elements[rank] += held[name][replica][place].numel()
    assert all((count == 1).all() for count in held.values())
    total = sum(count.numel() for count in held.values())
    assert max(elements) < 1.01 * total / me.world_size


def record_losses(out: Path, cases: list[Case]) -> None:
    """The losses of every engine, one after the other in one process."""
    me = process_group.start("cpu")
    for case in cases:
        run = run_of(*OPTIMIZERS[case.optimizer], *ENGINES[case.label], f"train.dtype={case.dtype}")
        engine = build(run, me)
        check_start(run, engine, me)
        found = record(engine, me)
        assert engine.scalars() == {"step": STEPS, "updates": STEPS}
        close(engine)
        if me.first:
            (out / f"{case}.json").write_text(json.dumps(found))
    process_group.stop()


def close(engine) -> None:
    """Nothing that was trained is left, although the engine's object is."""
    held = [StorageWeakRef(shard.data.untyped_storage()) for shard in engine.shards()]
    engine.close()
    assert held and all(storage.expired() for storage in held)


def record(engine, me: process_group.Ranks) -> dict[str, list[float]]:
    before = engine.evaluate([batch_of(99, me)])["loss"]
    stats = [step(engine, number, me) for number in range(STEPS)]
    assert not any(s.skipped for s in stats)
    return {
        "loss": [s.loss for s in stats],
        "norm": [s.grad_norm for s in stats],
        "lr": [s.lr for s in stats],
        "eval": [before, engine.evaluate([batch_of(99, me)])["loss"]],
    }


def record_reference(out: Path) -> None:
    me = process_group.start("cpu")
    for optimizer, chosen in OPTIMIZERS.items():
        engine = build(run_of(*chosen, "engine=fsdp"), me)
        (out / f"{optimizer}.json").write_text(json.dumps(record(engine, me)))
        close(engine)
    process_group.stop()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    out = tmp_path_factory.mktemp("records")
    call(record_reference, out).ok()
    call(record_losses, out, [case for case in CASES if case.ranks == 1]).ok()
    return out, call(record_losses, out, [case for case in CASES if case.ranks == 2], ranks=2).ok()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trains_as_fsdp_does_on_one_rank(records, case):
    found = json.loads((records[0] / f"{case}.json").read_text())
    expected = json.loads((records[0] / f"{case.optimizer}.json").read_text())
    assert expected["eval"][0] - expected["eval"][1] > 0.01  # it learns
    tolerance = {"fp32": 1e-5, "bf16": 1e-2}[case.dtype]
    assert found.keys() == expected.keys()
    for key in found:
        np.testing.assert_allclose(
            found[key], expected[key], rtol=tolerance, atol=tolerance, err_msg=key
        )


@pytest.mark.parametrize("stage", JSON)
def test_every_key_that_is_let_through_is_tried(stage):
    tried = {pair.partition(":")[0] for keys in JSON[stage] for pair in keys.split(", ")}
    offload = {"offload_optimizer", "offload_param"}
    assert tried == {key for key, stages in ZERO.items() if stage in stages} - offload


def test_says_nothing(records):
    assert records[1].out == "" and records[1].err == ""


def skip_and_refresh() -> None:
    me = process_group.start("cpu")
    for label, dtype in [
        ("zero0", "fp32"),
        ("zero1", "fp32"),
        ("zero1", "bf16"),
        ("zero2", "bf16"),
        ("zero2+offload", "fp32"),
        ("zero2+offload", "bf16"),
        ("zero3", "bf16"),
        ("zero3, own JSON 0", "fp32"),
        ("zero3+offload", "bf16"),
    ]:
        where = f"{label} in {dtype}"
        run = run_of(*OPTIMIZERS["rows"], *ENGINES[label], f"train.dtype={dtype}")
        engine = build(run, me)
        step(engine, 0, me)
        once, scalars = contents(engine), engine.scalars()
        step(engine, 1, me)
        twice, loss = contents(engine), engine.evaluate([batch_of(99, me)])["loss"]

        overwrite(engine, once)
        engine.refresh(scalars)
        assert engine.scalars() == {"step": 1, "updates": 1}
        stats = step(engine, 7, me, judge=skip)
        assert stats.skipped and math.isfinite(stats.grad_norm), where
        assert same(contents(engine), once), f"{where}: a skipped step changed something"
        assert engine.scalars() == {"step": 2, "updates": 1}
        step(engine, 1, me)
        assert same(contents(engine), twice), f"{where}: the step after going back and skipping one"
        assert engine.evaluate([batch_of(99, me)])["loss"] == loss, where

        model = DNT(run.model)
        init_weights(model, seed=77)
        overwrite(engine, [part_of(model, shard) for shard in engine.shards()])
        engine.refresh({"step": 0, "updates": 0})
        tokens = batch_of(99, process_group.Ranks(0, 0, 1, me.device))
        expected = float(model(tokens[:, :-1].clamp(min=0), tokens[:, 1:])) / int(
            (tokens[:, 1:] != -1).sum()
        )
        found = engine.evaluate([batch_of(99, me)])["loss"]
        assert abs(found - expected) < {"fp32": 1e-5, "bf16": 1e-2}[dtype] and found != loss, where
        engine.close()
    process_group.stop()


def overwrite(engine, values: list[torch.Tensor]) -> None:
    for shard, value in zip(engine.shards(), values, strict=True):
        shard.data.copy_(value)


def part_of(model: DNT, shard: TensorShard) -> torch.Tensor:
    """What ``model`` has in the shard's place; zero in that of a buffer."""
    kind, _, name = shard.name.partition(".")
    if kind != "model":
        return torch.zeros_like(shard.data)
    return model.get_parameter(name).detach()[window(shard)]


def window(shard: TensorShard) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(shard.offset, shard.data.shape, strict=True))


def test_skipped_steps_change_nothing_and_boxes_can_be_overwritten():
    call(skip_and_refresh, ranks=2).ok()


REFUSED = {
    "{optimiser: {}}": "engine.deepspeed.optimiser",
    "{optimizer: {type: Adam}}": "engine.deepspeed.optimizer",
    "{scheduler: {type: WarmupLR}}": "optim.schedule",
    "{gradient_clipping: 1.0}": "optim.clip_norm",
    "{fp16: {enabled: true}}": "train.dtype",
    "{train_batch_size: 8}": "train.global_batch",
    "{tensorboard: {enabled: true}}": "tracking",
    "{hybrid_engine: {enabled: true}}": "engine.deepspeed.hybrid_engine",
    "{log_level: loud}": "engine.deepspeed.log_level",
    "{wall_clock_breakdown: 1}": "true or false",
    "{zero_optimization: true}": "a section",
    "{zero_optimization: {stage: 3}}": "engine=zero0",
    "{zero_optimization: {reduce_bucket_sise: "
    "5}}": "no such key; did you mean reduce_bucket_size? There are: ",
    "{zero_optimization: {reduce_bucket_size: auto}}": "Hugging Face",
    "{zero_optimization: {sub_group_size: 5}}": "zero3 only",
    "{zero_optimization: {stage3_prefetch_bucket_size: 5}}": "zero3 only",
    "{zero_optimization: {elastic_checkpoint: "
    "true}}": "engine.deepspeed.zero_optimization.elastic_checkpoint",
    "{zero_optimization: {cpu_offload: true}}": "engine.offload_optimizer",
    "{zero_optimization: {offload_optimizer: {device: nvme}}}": "engine.offload_optimizer",
    "{zero_optimization: {offload_optimizer: {pin_memory: true}}}": "engine.offload_optimizer=true",
    "{zero_optimization: {offload_optimizer: {ratio: "
    "0.5}}}": "zero_optimization.offload_optimizer.ratio",
}


@pytest.mark.parametrize("raw", REFUSED)
def test_json_that_deepspeed_would_ignore_or_that_contradicts_is_refused(raw):
    with pytest.raises(
        ConfigError, match=r"engine\.deepspeed\.\w+.*: (found|no such key; )"
    ) as error:
        run_of("engine=zero2", f"engine.deepspeed={raw}")
    assert REFUSED[raw] in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (["engine=zero0", "engine.deepspeed={zero_optimization: {reduce_bucket_size: 5}}"], True),
        (["engine=zero1", "engine.deepspeed={zero_optimization: {reduce_bucket_size: 5}}"], False),
        (
            [
                "engine=zero1",
                "engine.deepspeed={zero_optimization: {reduce_bucket_size: 5}}",
                "train.dtype=bf16",
            ],
            True,
        ),
        (
            ["engine=zero2", "engine.deepspeed={zero_optimization: {allgather_bucket_size: 6}}"],
            True,
        ),
        (
            ["engine=zero1", "engine.deepspeed={zero_optimization: {round_robin_gradients: true}}"],
            False,
        ),
        (
            ["engine=zero3", "engine.deepspeed={zero_optimization: {round_robin_gradients: true}}"],
            True,
        ),
        (
            [
                "engine=zero3_offload",
                "engine.deepspeed={zero_optimization: {offload_param: {pin_memory: true}}}",
            ],
            False,
        ),
    ],
)
def test_what_acts_depends_on_the_stage(overrides, refused):
    if refused:
        with pytest.raises(ConfigError, match="expected nothing"):
            run_of(*overrides)
    else:
        run_of(*overrides)


def refuse_at_build() -> None:
    me = process_group.start("cpu")
    with pytest.raises(
        AgreedError, match=r"engine\.deepspeed\.zero_optimization\.reduce_bucket_size: found -5"
    ):
        build(
            run_of(
                "engine=zero2", "engine.deepspeed={zero_optimization: {reduce_bucket_size: -5}}"
            ),
            me,
        )
    for name in ("zero2", "fsdp"):
        with pytest.raises(AgreedError, match=r"optim\.groups\.x\.pattern"):
            build(run_of(f"engine={name}", "optim.groups.x.pattern=nothing"), me)

        def found_here_alone() -> DNT:
            raise ValueError("of this rank")

        with pytest.raises(ValueError, match="of this rank") as error:
            engine.build(run_of(f"engine={name}"), found_here_alone, me, STEPS)
        assert not isinstance(error.value, AgreedError)
    build(run_of("engine=zero2"), me).close()
    process_group.stop()


def test_what_cannot_be_is_refused_when_the_engine_is_built():
    call(refuse_at_build).ok()


def step_rounded_apart() -> None:
    """What one rank reads of the gradient is another in its last bits, as after sums in another
    order.
    """
    me = process_group.start("cpu")
    engine = build(run_of("engine=zero0"), me)
    whole = engine.zero.gradients
    if not me.first:
        engine.zero.gradients = lambda: [gradient * (1 + 1e-6) for gradient in whole()]
    found = step(engine, 0, me, judge=skip).grad_norm
    everyone = [found] * 2
    dist.all_gather_object(everyone, found)
    assert everyone[0] == everyone[1], everyone
    engine.close()
    process_group.stop()


def test_ranks_that_hold_the_whole_gradient_find_one_norm():
    call(step_rounded_apart, ranks=2).ok()
