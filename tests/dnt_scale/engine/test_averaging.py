"""The moving average of the weights: torch's own, on any engine and any ranks, and measured
without a trace.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dnt_scale import checkpoint
from dnt_scale.distributed import process_group
from dnt_scale.engine.averaging import average_of
from dnt_scale.engine.base import Engine
from dnt_scale.tools.convert_weights import from_file, to_file
from testbed.run import call, synthetic_set, tensors, tiny, train
from tests.helpers.engines import built, load, losses, save

DECAY = 0.9
EMA = f"train.ema={DECAY}"


class Held(nn.Module):
    """What a rank holds of the weights, as the parameters of a module."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        weights = [each.data for each in engine.shards() if each.name.startswith("model.")]
        self.weights = nn.ParameterList([nn.Parameter(weight.clone()) for weight in weights])


def averages(engine: Engine) -> list[torch.Tensor]:
    return [each.data.clone() for each in engine.shards() if each.name.startswith("ema.")]


def follow(data: Path, labels: list[str], out: Path) -> None:
    """Compare each engine's average with torch's, and what is measured with its weights."""
    me = process_group.start("cpu")
    for label in labels:
        with built(label, me, data, EMA, "train.dtype=fp32") as (run, engine):
            theirs = AveragedModel(Held(engine), multi_avg_fn=get_ema_multi_avg_fn(DECAY))
            for step in range(4):
                losses(run, engine, me, step, 1)
                theirs.update_parameters(Held(engine))
                for ours, other in zip(averages(engine), theirs.module.weights, strict=True):
                    assert torch.equal(ours, other), label
            before = [shard.data.clone() for shard in engine.shards()]
            rows = torch.arange(3 * 33).reshape(3, 33) % run.model.vocab_size
            measured = engine.evaluate([rows])["loss"]
            for shard, value in zip(engine.shards(), before, strict=True):
                assert torch.equal(shard.data, value), (label, shard.name)
            path = save(engine, me, out / label)
            after = losses(run, engine, me, 4, 2)
        with built(label, me, data, "train.dtype=fp32") as (run, plain):
            load(plain, me, path)
            assert plain.evaluate([rows])["loss"] != measured
            assert losses(run, plain, me, 4, 2) == after, label  # the average changes nothing
            weights = [each for each in plain.shards() if each.name.startswith("model.")]
            averaged = [replace(each, name=average_of(each.name)) for each in weights]
            checkpoint.read_tensors(path, averaged, me)
            plain.refresh(plain.scalars())
            assert plain.evaluate([rows])["loss"] == measured, label
    process_group.stop()


def test_it_is_torchs_on_every_engine(corpus: Path, tmp_path: Path) -> None:
    call(follow, corpus, ["fsdp", "ddp", "zero2", "zero3"], tmp_path, ranks=2).ok()


def test_a_skipped_step_leaves_it(corpus: Path, tmp_path: Path) -> None:
    call(_skip, corpus, ranks=1).ok()


def _skip(data: Path) -> None:
    me = process_group.start("cpu")
    with built("fsdp", me, data, EMA) as (run, engine):
        losses(run, engine, me, 0, 2)
        before = averages(engine)
        rows = torch.arange(12 * 33).reshape(12, 33) % run.model.vocab_size
        assert engine.train_step(rows, lambda loss, norm: 0.0).skipped
        assert all(map(torch.equal, averages(engine), before))
    process_group.stop()


def test_a_run_may_begin_and_end_it(tmp_path: Path) -> None:
    """The average begins with the weights that the run goes on from; without it none is kept."""
    data = synthetic_set(tmp_path / "set")
    chosen = tiny(data, tmp_path / "run", "checkpoint.keep=9", "eval.every=0")
    chosen.append("optim.schedule.warmup_steps=0")
    train([*chosen, "train.steps=2"]).ok()
    train([*chosen, "train.steps=4", EMA]).ok()
    to_file(str(tmp_path / "run"), tmp_path / "weights.safetensors", full=False)
    train([*chosen, "train.steps=5", "train.ema=null"]).ok()
    folder = tmp_path / "run" / "checkpoints"
    second, fourth, last = (tensors(folder / f"step-0000000{step}") for step in (2, 4, 5))
    assert not any(name.startswith("ema.") for name in [*second, *last])
    for name, weight in second.items():
        if name.startswith("model."):
            kept = fourth[name.replace("model.", "ema.")]
            # two updates of a tenth each, the second of them of the step's own weights
            assert (kept - weight).norm() < 0.4 * (fourth[name] - weight).norm()
            assert not torch.equal(kept, weight)
    # What is written for others is the average, and what begins from weights begins it with them.
    from_file(tmp_path / "weights.safetensors", tiny(data, tmp_path / "new", EMA))
    begun = tensors(tmp_path / "new" / "checkpoints" / "step-00000000")
    averaged = [name for name in fourth if name.startswith("ema.")]
    assert averaged
    for name in averaged:
        assert torch.equal(begun[name], fourth[name])
        assert torch.equal(begun[name.replace("ema.", "model.")], fourth[name])
