"""The formulas of memory_plan.py against bytes measured on real ranks, and against the real
recipe on made-up ones.
"""

import pytest

from dnt_scale import config
from dnt_scale.costs import memory_plan
from testbed.measure import answers, print_costs, print_simulated, run_config
from testbed.run import call

DEPTHS = (1, 4)
SHAPE = [
    "model.width=320",  # less, and ZeRO-3 would not cut matrices of width x width
    "model.heads=8",
    "model.context=16",
    "train.global_batch=4",
    "train.micro_batch=1",
]
BF16 = "train.dtype=bf16"
UNBUFFERED = ["optim.gradient_buffer=false", "optim.clip=previous", "optim.momentum_dtype=bf16"]
CASES: dict[str, tuple[int, list[str]]] = {
    "fsdp, average": (2, ["engine=fsdp", "optim=msgdw", "train.ema=0.9"]),
    "fsdp, no gradient buffer, bf16 momentum": (2, ["engine=fsdp", "optim=msgdw_r", *UNBUFFERED]),
    "fsdp, adamw, weights kept": (
        2,
        ["engine=fsdp", "optim=adamw", BF16, "engine.reshard_after_forward=false"],
    ),
    "hsdp": (4, ["engine=hsdp", "engine.replicas=2", "optim=msgdw", BF16]),
    "ddp, no gradient buffer": (2, ["engine=ddp", "optim=msgdw", *UNBUFFERED]),
    "zero0": (2, ["engine=zero0", "optim=msgdw"]),
    "zero1": (2, ["engine=zero1", "optim=msgdw", BF16]),
    "zero2, average": (
        2,
        ["engine=zero2", "optim=msgdw_r", BF16, "optim.momentum_dtype=bf16", "train.ema=0.9"],
    ),
    "zero3": (2, ["engine=zero3", "optim=adamw", BF16]),
}


@pytest.mark.parametrize("case", CASES)
def test_formulas_are_within_two_percent_of_what_is_measured(case: str) -> None:
    """On every rank, by how much a deeper model takes more: gathered blocks, buckets and imports
    are in both.
    """
    world_size, overrides = CASES[case]
    runs = [run_config([*SHAPE, *overrides, f"model.layers={depth}"]) for depth in DEPTHS]
    shallow, deep = (
        (memory_plan.memory(run, world_size), memory_plan.traffic(run, world_size)) for run in runs
    )
    for small, large in answers(
        call(print_costs, [*SHAPE, *overrides], (1, *DEPTHS), ranks=world_size)
    ):
        assert large["held"] - small["held"] == pytest.approx(
            deep[0].total() - shallow[0].total(), rel=0.02
        )
        for kind in ("all_gather", "reduce_scatter", "all_reduce"):
            expected = getattr(deep[1], kind)
            assert large["traffic"].get(kind, 0) == pytest.approx(expected, rel=0.02, abs=10_000), (
                kind
            )
        shards = dict(large["shards"])
        assert shards.pop("model") == pytest.approx(deep[0].weights, rel=0.001)
        assert shards.pop("ema", 0) == pytest.approx(deep[0].average, rel=0.001)
        assert sum(shards.values()) == pytest.approx(deep[0].buffers, rel=0.001)


UNEVEN = [
    "model.width=200",
    "model.heads=4",
    "model.vocab_size=1003",
    "model.context=30",
    "model.layers=3",
]
SIMULATED: dict[str, tuple[int, list[str]]] = {
    "fsdp on 8": (8, ["engine=fsdp", "optim=msgdw_r", BF16]),
    "fsdp on 1024": (1024, ["engine=fsdp", "optim=adamw", "train.dtype=fp32"]),
    "hsdp on 1024": (
        1024,
        ["engine=hsdp", "engine.replicas=16", "optim=msgdw", "optim.momentum_dtype=bf16"],
    ),
}


@pytest.mark.parametrize("case", SIMULATED)
def test_simulated_ranks_hold_what_the_formulas_say(case: str) -> None:
    """More ranks than rows, and rows that they do not share equally: padding is in the formulas."""
    world_size, overrides = SIMULATED[case]
    expected = memory_plan.memory(run_config([*UNEVEN, *overrides]), world_size)
    (found,) = answers(call(print_simulated, [*UNEVEN, *overrides], world_size))
    for field, size in found.items():
        assert size == pytest.approx(getattr(expected, field), rel=0.02), field


def test_bytes_fall_as_one_over_n_but_for_padding() -> None:
    for engine in ("fsdp", "zero3"):
        run = config.load(
            [
                "model=dnt_1.4b",
                f"engine={engine}",
                "optim=msgdw",
                "run.name=none",
                "data.path=none",
                BF16,
            ]
        )
        alone = memory_plan.memory(run, 1).total()
        for ranks, padding in ((2, 1e-5), (8, 1e-5), (256, 1e-3), (1024, 0.25)):
            share = memory_plan.memory(run, ranks).total() * ranks / alone
            assert 1 <= share < 1 + padding, (engine, ranks, share)


def test_fp8_holds_and_sends_what_bf16_does() -> None:
    bf16, fp8 = (run_config(["engine=fsdp", f"train.dtype={dtype}"]) for dtype in ("bf16", "fp8"))
    assert memory_plan.memory(fp8, 8) == memory_plan.memory(bf16, 8)
    assert memory_plan.traffic(fp8, 8) == memory_plan.traffic(bf16, 8)


def test_one_buffer_takes_three_quarters_of_two_and_without_gradients_half() -> None:
    def total(*overrides: str) -> int:
        return memory_plan.memory(run_config(["engine=fsdp", *overrides]), 8).total()

    adamw = total("optim=adamw")
    assert total("optim=msgdw") / adamw == 12 / 16
    assert (
        total("optim=msgdw", "optim.gradient_buffer=false", "optim.clip=tensor") / adamw == 8 / 16
    )
    assert total("optim=msgdw", *UNBUFFERED) / adamw == 6 / 16
