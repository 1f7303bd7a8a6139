"""Metrics measured on the device: means over micro-batches and ranks that come with the step's
loss.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dnt_scale import config, engine
from dnt_scale.data.sources import load_source
from dnt_scale.distributed import device_metrics, process_group
from dnt_scale.distributed.device_metrics import ignored, record, take
from dnt_scale.model.batch import IGNORED
from dnt_scale.model.dnt import DNT
from testbed.configs import composed
from testbed.run import call, metrics, synthetic_set, tensors, tiny, train
from tests.helpers import engines

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    return synthetic_set(tmp_path_factory.mktemp("made_up") / "set")


@pytest.fixture(autouse=True)
def nothing_is_left():
    take(CPU)  # of tests of other files
    yield
    assert take(CPU)[0] == []


def test_what_is_recorded_adds_up_by_name_until_it_is_taken():
    record("b", torch.tensor(3.0), 2)
    record("a", torch.tensor(1.0, requires_grad=True))
    record("b", torch.tensor(5.0, dtype=torch.bfloat16), torch.tensor(4))
    names, sums = take(CPU)
    assert names == ["a", "b"] and sums.tolist() == [[1, 1], [8, 6]]
    assert sums.dtype == torch.float64 and not sums.requires_grad
    names, sums = take(CPU)
    assert names == [] and sums.shape == (0, 2)


def test_what_a_validation_records_is_dropped_and_nothing_else():
    record("kept", torch.tensor(1.0))
    with ignored():
        record("kept", torch.tensor(7.0))
        record("validation", torch.tensor(7.0))
    names, sums = take(CPU)
    assert names == ["kept"] and sums.tolist() == [[1, 1]]


class Recording(DNT):
    """Records in each forward pass what the engine computes of all: the mean loss."""

    def forward(self, tokens_BT, targets_BT=None):
        loss = super().forward(tokens_BT, targets_BT)
        record("again", loss, (targets_BT != IGNORED).sum())
        return loss


def record_in_steps(data: Path, label: str, *more: str) -> None:
    """Two steps of an engine, the second of which is skipped; prints its loss and what was
    recorded.
    """
    me = process_group.start("cpu")
    overrides = [*engines.overrides_of(label, me.world_size), *more, "train.micro_batch=2"]
    run = composed(*tiny(data, Path("unused"), *overrides))
    built = engine.build(run, lambda: Recording(run.model), me, 20)

    def judge(loss: float, grad_norm: float) -> float:
        # the host has waited for the loss by now
        record("judged", torch.tensor(loss + me.rank, dtype=torch.float64))
        return 0.0 if built.scalars()["step"] else 0.5

    order = {"seed": 1, "global_batch": 8, "rank": me.rank, "world_size": me.world_size}
    with load_source(run).stream(**order) as batches:
        for _ in range(2):
            stats = built.train_step(next(batches)[0], judge)
            found = {name: value.item() for name, value in stats.metrics.items()}
            print(json.dumps([stats.loss, found]))
        with ignored():
            built.evaluate([next(batches)[0]])
    assert not device_metrics._recorded
    built.close()
    process_group.stop()


@pytest.mark.parametrize(
    ("label", "more"),
    [
        ("ddp", []),
        ("fsdp", ["engine.activation_checkpointing=full"]),
        ("fsdp", ["optim.gradient_buffer=false", "optim.clip=previous"]),
        ("zero1", []),
        ("zero3", ["engine.activation_checkpointing=full"]),
    ],
)
def test_a_models_metric_is_the_mean_over_micro_batches_and_ranks(made_up, label, more):
    out = call(record_in_steps, made_up, label, *more, ranks=2).ok().out
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 4
    for loss, found in lines:
        assert found.keys() == {"again", "judged"}
        assert found["again"] == pytest.approx(loss, rel=1e-12)
        assert found["judged"] == pytest.approx(loss + 0.5, rel=1e-12)


def rms(checkpoint: Path, kind: str) -> float:
    """The root mean square of a checkpoint's tensors of a kind, in float64."""
    parts = [
        value.double() for name, value in tensors(checkpoint).items() if name.startswith(f"{kind}.")
    ]
    return float(torch.cat([part.flatten() for part in parts]).square().mean().sqrt())


@pytest.mark.parametrize(
    ("ranks", "chosen"), [(2, "engine=fsdp"), (3, "engine=ddp"), (2, "engine=zero2")]
)
def test_the_rms_of_weights_and_momentum(made_up, tmp_path, ranks, chosen):
    """Measured before a step, it is that of the checkpoint before it; and no other number
    changes by it.
    """
    fields = [
        chosen,
        "train.global_batch=12",
        "train.micro_batch=2",
        "eval.every=0",
        "checkpoint.every=1",
    ]
    fields += ["train.steps=5", "checkpoint.keep=9"]
    overrides = tiny(made_up, tmp_path / "run", *fields)
    train([*overrides, "measure.every=2"], ranks).ok()
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "rms/weights" in line] == [2, 4]
    for line in lines[1::2]:
        before = tmp_path / "run" / "checkpoints" / f"step-{line['step'] - 1:08d}"
        assert line["rms/weights"] == pytest.approx(rms(before, "model"), rel=1e-6)
        assert line["rms/momentum_buffer"] == pytest.approx(
            rms(before, "momentum_buffer"), rel=1e-6
        )
    train([*overrides, f"run.dir={tmp_path / 'plain'}"], ranks).ok()
    plain = metrics(tmp_path / "plain")
    without = [{k: v for k, v in line.items() if not k.startswith("rms/")} for line in lines]
    assert [line.keys() for line in without] == [line.keys() for line in plain]
    for name in ("train/loss", "grad_norm", "lr"):
        found, expected = ([line[name] for line in each] for each in (without, plain))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_what_was_recorded_before_a_step_outlives_a_pass_that_only_measures(made_up, tmp_path):
    fields = ["optim.gradient_buffer=false", "optim.clip=previous", "train.steps=4", "eval.every=0"]
    train(tiny(made_up, tmp_path / "run", *fields, "measure.every=1")).ok()
    assert ["rms/weights" in line for line in metrics(tmp_path / "run")] == [True] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_waits_no_more_often_for_what_is_recorded(made_up):
    out = call(count_waits, made_up).ok().out
    without, with_metrics = json.loads(out)
    assert without == with_metrics > 0


def count_waits(data: Path) -> None:
    """Print how often the host waits for the device in a step, without and with recorded
    metrics.
    """
    import os
    import warnings

    os.environ.pop("CUDA_VISIBLE_DEVICES")
    me = process_group.start("cuda")
    run = config.load(tiny(data, Path("unused"), "run.device=cuda", "engine=fsdp"))
    counts = []
    for model in (DNT, Recording):
        built = engine.build(run, lambda model=model: model(run.model), me, 20)
        order = {"seed": 1, "global_batch": 8, "rank": me.rank, "world_size": me.world_size}
        with load_source(run).stream(**order) as batches:
            for step in range(3):
                torch.cuda.set_sync_debug_mode("warn" if step == 2 else "default")
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    built.train_step(next(batches)[0], lambda loss, norm: 1.0)
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in seen))
        built.close()
    print(json.dumps(counts))
    process_group.stop()
