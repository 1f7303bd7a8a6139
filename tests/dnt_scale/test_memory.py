"""The formulas of memory.py against bytes measured on real ranks, and against the real recipe on made-up ones."""

from typing import Any

import pytest

from dnt_scale import config, memory
from dnt_scale.memory import Memory, Traffic
from tests.helpers.measure import answers, print_costs, run_config
from tests.helpers.run import call

DEPTHS = (1, 4)
SHAPE = ["model.width=512", "model.heads=8", "model.context=16", "train.global_batch=8", "train.micro_batch=2"]
BF16 = "train.dtype=bf16"
UNBUFFERED = ["optim.gradient_buffer=false", "optim.clip=previous", "optim.momentum_dtype=bf16"]
CASES: dict[str, tuple[int, list[str]]] = {
    "fsdp": (2, ["engine=fsdp", "optim=msgdw"]),
    "fsdp, no gradient buffer, bf16 momentum": (2, ["engine=fsdp", "optim=msgdw_r", *UNBUFFERED]),
    "fsdp, adamw, weights kept": (2, ["engine=fsdp", "optim=adamw", BF16, "engine.reshard_after_forward=false"]),
    "hsdp": (4, ["engine=hsdp", "engine.replicas=2", "optim=msgdw", BF16]),
    "ddp, no gradient buffer": (2, ["engine=ddp", "optim=msgdw", *UNBUFFERED]),
    "zero0": (2, ["engine=zero0", "optim=msgdw"]),
    "zero1": (2, ["engine=zero1", "optim=msgdw", BF16]),
    "zero2": (2, ["engine=zero2", "optim=msgdw_r", BF16, "optim.momentum_dtype=bf16"]),
    "zero2, offloaded": (2, ["engine=zero2", "optim=msgdw", BF16, "engine.offload_optimizer=true"]),
    "zero3": (2, ["engine=zero3", "optim=adamw", BF16]),
}


def elements(run: Any) -> int:
    return sum(memory._elements(shape) for shape in memory.shapes_of(run.model).values())


@pytest.mark.parametrize("case", CASES)
def test_formulas_are_within_two_percent_of_what_is_measured(case: str) -> None:
    """On every rank, by how much a deeper model takes more: gathered blocks, buckets and imports are in both."""
    world_size, overrides = CASES[case]
    runs = [run_config([*SHAPE, *overrides, f"model.layers={depth}"]) for depth in DEPTHS]
    shallow, deep = ((memory.memory(run, world_size), memory.traffic(run, world_size)) for run in runs)
    for small, large in answers(call(print_costs, [*SHAPE, *overrides], DEPTHS, ranks=world_size)):
        assert large["held"] - small["held"] == pytest.approx(deep[0].total() - shallow[0].total(), rel=0.02)
        for kind in ("all_gather", "reduce_scatter", "all_reduce"):
            expected = getattr(deep[1], kind)
            assert large["traffic"].get(kind, 0) == pytest.approx(expected, rel=0.02, abs=10_000), kind
        boxes = dict(large["boxes"])
        assert boxes.pop("model") == pytest.approx(deep[0].weights, rel=0.001)
        assert sum(boxes.values()) == pytest.approx(deep[0].buffers, rel=0.001)
