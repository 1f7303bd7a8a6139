"""A step that is judged on the device and read late: the same step, of which nobody waits."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from dnt_scale import engine
from dnt_scale.config import HealthSection
from dnt_scale.data.sources import load_source
from dnt_scale.distributed import process_group
from dnt_scale.distributed.device_metrics import record
from dnt_scale.engine.averaging import AveragingEngine
from dnt_scale.engine.base import Engine
from dnt_scale.engine.fsdp import FSDPEngine
from dnt_scale.engine.late import Late, Limits
from dnt_scale.model.dnt import DNT
from dnt_scale.train.spike_guard import Guard, Snapshot
from testbed.configs import composed
from testbed.run import call, synthetic_set, tiny
from tests.dnt_scale.train.test_spike_guard import CLIP_NORMS, STREAM
from tests.helpers import engines
from tests.helpers.waits import uncounted, waits, with_the_devices_root


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    return synthetic_set(tmp_path_factory.mktemp("made_up") / "set")


@settings(deadline=None)
@given(
    STREAM,
    st.sampled_from(["off", "skip", "clip", "rollback"]),
    CLIP_NORMS,
    st.integers(8, 20),
    st.floats(0.1, 6),
)
def test_the_device_judges_as_the_guard_does_to_the_last_bit(
    stream, spike, clip_norm, window, sigmas
):
    health = HealthSection(spike=spike, spike_window=window, spike_sigmas=sigmas)
    guard = Guard(health, clip_norm, 10)
    for loss, norm in stream:
        both = torch.tensor([loss, norm], dtype=torch.float64)
        found = guard.limits().factor(*both)
        assert found.dtype == torch.float64
        assert found.item() == guard.judge(loss, norm)


class Limited:
    """A judge that knows its limits, and records when it is asked."""

    def __init__(self, limits: Limits, step: int, roll_back: Callable[[], None] | None) -> None:
        self.own = limits
        self.step = step
        self.roll_back = roll_back  # what is found to be done in the middle of the step

    def __call__(self, loss: float, grad_norm: float) -> float:
        both = torch.tensor([loss, grad_norm], dtype=torch.float64)
        self.limits()
        return self.own.factor(*both).item()

    def catch_up(self) -> bool:
        if self.roll_back is None:
            return False
        self.roll_back()
        record("before", torch.tensor(float(self.step)))
        return True

    def limits(self) -> Limits:
        record("after", torch.tensor(float(self.step)))
        return self.own


# of each step: let through, clipped, spikes of either kind that are skipped and one that is
# clipped, not finite, and let through again
JUDGES = [
    Limits(),
    Limits(clip_norm=0.3),
    Limits(loss=0.1),
    Limits(clip_norm=0.3, grad_norm=0.01),
    Limits(clip_norm=0.3, grad_norm=0.01, usual=0.02),
    Limits(),
    Limits(),
]
POISONED = 5
KEPT, REDONE = 1, 6  # before which a snapshot is taken, and in which it is gone back to
SKIPPED = {2, 3, POISONED}
LABELS = [
    ("fsdp", []),
    ("fsdp", ["train.dtype=bf16", "optim=muon_normalized"]),
    ("ddp", ["optim=adamw", "optim.lr=0.001"]),
    ("hsdp", ["optim.momentum_dtype=bf16", "train.ema=0.9"]),
    ("fsdp", ["optim.groups.embedding.clip=group", "optim.groups.embedding.clip_norm=0.05"]),
]


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Count waits, but for the numbers that are read late."""
    read = Late.read
    with waits() as seen:
        Late.read = uncounted(seen, read)  # type: ignore[method-assign]
        try:
            yield seen
        finally:
            Late.read = read  # type: ignore[method-assign]


def inner(built: Engine) -> FSDPEngine:
    found = built.engine if isinstance(built, AveragingEngine) else built
    assert isinstance(found, FSDPEngine)
    return found


def poison(built: FSDPEngine) -> RemovableHandle:
    """Put a NaN into a gradient of this rank when it arrives, until the handle is removed."""

    def hook(parameter: torch.Tensor) -> None:
        assert isinstance(parameter.grad, DTensor)
        parameter.grad.to_local().view(-1)[:1] = torch.nan

    return built.parts[3].parameter.register_post_accumulate_grad_hook(hook)


def late_beside_waiting(data: Path, label: str, *overrides: str) -> None:
    """Do steps with an engine that judges on the device, beside one that waits."""
    me = process_group.start("cpu")
    chosen = [*engines.overrides_of(label, me.world_size), *overrides, "train.micro_batch=2"]
    run = composed(*tiny(data, Path("unused"), "train.steps=10", *chosen))
    with_the_devices_root()
    late, waiting = (engine.build(run, lambda: DNT(run.model), me, 10) for _ in range(2))
    assert not inner(late).judges_late  # on a CPU there is nothing to wait for
    inner(late).judges_late = True
    order = {"seed": 1, "global_batch": 8, "rank": me.rank, "world_size": me.world_size}
    with load_source(run).stream(**order) as batches:
        for step, limits in enumerate(JUDGES):
            batch = next(batches)[0]
            bad = step == POISONED and me.rank == 0
            handles = [poison(inner(one)) for one in (late, waiting)] if bad else []
            if step == KEPT:
                snapshots = Snapshot(), Snapshot()
                for snapshot, one in zip(snapshots, (late, waiting), strict=True):
                    snapshot.take(one)
            back = partial(snapshots[0].restore, late) if step == REDONE else None
            record("before", torch.tensor(float(step)))
            with counted_waits() as seen:
                stats = late.train_step(batch, Limited(limits, step, back))
            assert not seen, f"step {step}: {seen}"
            assert stats.go is not None
            if step == REDONE:
                snapshots[1].restore(waiting)
            record("before", torch.tensor(float(step)))
            with counted_waits() as usual:
                expected = waiting.train_step(batch, Limited(limits, step, None))
            assert usual
            for handle in handles:
                handle.remove()
            if step % 2:  # else the engine itself has to find out, in the next step
                assert late.scalars() == waiting.scalars(), step
            for ours, theirs in zip(stats.numbers[:3], expected.numbers[:3], strict=True):
                assert repr(ours) == repr(theirs)  # nan equals itself there
            assert stats.lr == expected.lr
            assert {name: float(value) for name, value in stats.metrics.items()} == {
                "before": step,
                "after": step,
            }
            assert stats.skipped == (step in SKIPPED), (step, stats.numbers)
            for ours, theirs in zip(late.shards(), waiting.shards(), strict=True):
                bits = [one.data.reshape(-1).view(torch.uint8) for one in (ours, theirs)]
                assert torch.equal(*bits), (step, ours.name)
    print(json.dumps(late.scalars()))
    for one in (late, waiting):
        one.close()
    process_group.stop()


@pytest.mark.parametrize(("label", "overrides"), LABELS)
def test_a_step_that_is_read_late_is_the_same_and_nobody_waits(made_up, label, overrides):
    out = call(late_beside_waiting, made_up, label, *overrides, ranks=2).ok().out
    assert [json.loads(line) for line in out.splitlines()] == [{"step": 7, "updates": 2}] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optim", ["msgdw_r", "muon_normalized", "adamw"])
def test_on_cuda_a_step_waits_for_nothing(made_up, optim):
    call(steps_on_cuda, made_up, f"optim={optim}").ok()


def steps_on_cuda(data: Path, *overrides: str) -> None:
    """Do steps of which torch refuses to wait for any."""
    import os

    os.environ.pop("CUDA_VISIBLE_DEVICES")
    me = process_group.start("cuda")
    chosen = ["run.device=cuda", "engine=fsdp", "train.dtype=bf16", *overrides]
    run = composed(*tiny(data, Path("unused"), *chosen))
    built = engine.build(run, lambda: DNT(run.model), me, 20)
    order = {"seed": 1, "global_batch": 8, "rank": me.rank, "world_size": me.world_size}
    with load_source(run).stream(**order) as batches:
        for step in range(5):
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
            stats = built.train_step(next(batches)[0], Limited(Limits(clip_norm=0.3), step, None))
            assert stats.go is not None
        torch.cuda.set_sync_debug_mode("default")
    assert built.scalars() == {"step": 5, "updates": 5}
    built.close()
    process_group.stop()
