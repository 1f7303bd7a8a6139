"""The loop on real ranks: loss curves, signals, steps that are not finite."""

import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dnt_scale import config
from dnt_scale.config import DataConfig
from dnt_scale.data.token_sets import load_sets
from dnt_scale.data.tokens import open_tokens, token_stream
from dnt_scale.distributed.heartbeat import main_thread
from dnt_scale.model.batch import IGNORED
from dnt_scale.model.dnt import DNT
from dnt_scale.model.init import init_weights
from dnt_scale.train.progress import TrainProgress
from dnt_scale.train.rank import main
from dnt_scale.train.validation import watched
from testbed.ports import free_port
from testbed.run import (
    STEPS,
    call,
    metrics,
    python,
    same_tensors,
    steps_written,
    stop_midway,
    synthetic_set,
    tensors,
    tiny,
    train,
)

LAST = f"checkpoints/step-{STEPS:08d}"
GOLDEN = Path(__file__).parents[2] / "golden" / "loss_curve.txt"


def curve(run_dir: Path, field: str) -> list[float]:
    return [line[field] for line in metrics(run_dir) if field in line]


@pytest.mark.parametrize("ranks", [1, 4])
def test_ranks_and_accumulation_do_not_change_the_loss_curve(corpus, reference, tmp_path, ranks):
    """8 rows a step, 2 a forward: 1 rank accumulates 4 times, 4 ranks not at all; as 2 ranks
    with 4 a forward.
    """
    run_dir = tmp_path / "run"
    train(tiny(corpus, run_dir, "train.micro_batch=2"), ranks).ok()
    ours, theirs = metrics(run_dir), metrics(reference)
    assert len(curve(run_dir, "train/loss")) == STEPS and len(curve(run_dir, "val/loss")) == 5
    for field in ("train/loss", "val/loss", "val/bits_per_byte"):
        np.testing.assert_allclose(
            curve(run_dir, field), curve(reference, field), rtol=0, atol=1e-5
        )
    np.testing.assert_allclose(
        curve(run_dir, "grad_norm"), curve(reference, "grad_norm"), rtol=1e-4
    )
    exact = ("step", "tokens", "lr", "skipped")
    assert [{k: line.get(k) for k in exact} for line in ours] == [
        {k: line.get(k) for k in exact} for line in theirs
    ]
    states = [
        json.loads((folder / "checkpoints/latest/state.json").read_text())
        for folder in (run_dir, reference)
    ]
    assert states[0]["consumed_rows"] == states[1]["consumed_rows"] == 8 * STEPS
    assert states[0]["tokens"] == states[1]["tokens"] == 8 * 64 * STEPS


def test_the_reference_learns(reference):
    losses = curve(reference, "train/loss")
    assert losses[-1] < losses[0] - 1
    assert curve(reference, "val/loss")[-1] < curve(reference, "val/loss")[0] - 1
    assert abs(curve(reference, "val/loss")[0] - math.log(512)) < 0.2


def test_torchrun_and_plain_python_are_the_same_ranks(corpus, reference, tmp_path):
    overrides = [
        "train.steps=3",
        "optim.schedule.name=constant",
        "checkpoint.every=0",
        "eval.every=0",
    ]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    python(
        *torchrun, "-m", "dnt_scale.train", *tiny(corpus, tmp_path / "torchrun", *overrides)
    ).ok()
    train(tiny(corpus, tmp_path / "ours", *overrides), ranks=2).ok()
    assert metrics(tmp_path / "torchrun") == metrics(tmp_path / "ours")
    python("-m", "dnt_scale.train", *tiny(corpus, tmp_path / "one", *overrides)).ok()
    np.testing.assert_allclose(
        curve(tmp_path / "one", "train/loss"),
        curve(tmp_path / "ours", "train/loss"),
        rtol=0,
        atol=1e-5,
    )


def test_the_golden_loss_curve(tmp_path):
    """Tokens, initial weights, order, model, loss and optimizer together: none of them changed
    unnoticed.
    """
    data = synthetic_set(tmp_path / "set")
    for optim in ("msgdw_r", "msgdw", "adamw"):
        lr = {"msgdw_r": 0.1, "msgdw": 0.01, "adamw": 0.001}[optim]
        overrides = [
            f"optim={optim}",
            f"optim.lr={lr}",
            "train.steps=10",
            "eval.every=0",
            "checkpoint.every=0",
        ]
        train(tiny(data, tmp_path / optim, *overrides)).ok()
    found = list(
        zip(
            *(curve(tmp_path / optim, "train/loss") for optim in ("msgdw_r", "msgdw", "adamw")),
            strict=True,
        )
    )
    lines = [line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    np.testing.assert_allclose(
        found, [[float(word) for word in line.split()] for line in lines], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(corpus, reference, tmp_path, number):
    run_dir = tmp_path / "run"
    overrides = tiny(corpus, run_dir, "checkpoint.every=0")
    stopped = stop_midway(overrides, run_dir, lambda group: group.kill(number, rank=1))
    assert stopped.codes == [128 + number] * 2, stopped.err
    step = steps_written(run_dir)
    latest = run_dir / "checkpoints" / "latest"
    assert latest.resolve().name == f"step-{step:08d}"
    begun = f"{signal.Signals(number).name}: stopping, with a checkpoint of step {step}\n"
    assert stopped.err.count(begun) == 1
    assert f"stopped at step {step} with a checkpoint" in stopped.err.partition(begun)[2]
    assert "Traceback" not in stopped.err
    train(overrides, ranks=2).ok()
    assert metrics(run_dir) == metrics(reference)
    assert same_tensors(run_dir / LAST, reference / LAST)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR2])
def test_a_signal_to_all_ranks_stops_them_with_a_checkpoint(corpus, reference, tmp_path, number):
    run_dir = tmp_path / "run"
    stopped = stop_midway(tiny(corpus, run_dir), run_dir, lambda group: group.kill(number))
    assert stopped.codes == [128 + number] * 2, stopped.err
    assert "Traceback" not in stopped.err
    step = steps_written(run_dir)
    assert (run_dir / "checkpoints" / "latest").resolve().name == f"step-{step:08d}"
    assert metrics(run_dir) == [line for line in metrics(reference) if line["step"] <= step]


def test_a_run_that_diverges_skips_its_steps_and_ends(corpus, tmp_path):
    run_dir = tmp_path / "run"
    wild = ["optim.lr=1e38", "optim.clip_norm=null", "optim.schedule.warmup_steps=0"]
    overrides = tiny(
        corpus, run_dir, *wild, "train.max_skipped=3", "checkpoint.every=1", "checkpoint.keep=99"
    )
    error = train(overrides, ranks=2).error()
    lines = [line for line in metrics(run_dir) if line["step"] > 0]
    last = lines[-1]["step"]
    assert f"step {last}: 3 steps in a row had a non-finite loss or gradient" in error
    assert "lower optim.lr" in error
    assert [line["skipped"] for line in lines] == [0] * (last - 3) + [1] * 3
    assert all(line["train/loss"] is None or line["grad_norm"] is None for line in lines[-3:])
    # the checkpoint of the last good step and those of the skipped steps: only the count of steps
    # differs
    good, *after = [
        tensors(run_dir / "checkpoints" / f"step-{step:08d}") for step in range(last - 3, last)
    ]
    for later in after:
        assert later.keys() == good.keys()
        for name, value in later.items():
            assert np.array_equal(
                value.numpy().view(np.uint32), good[name].numpy().view(np.uint32)
            ), name
    states = [
        json.loads(path.read_text())
        for path in sorted(run_dir.glob("checkpoints/step-*/state.json"))
    ]
    assert [state["skipped"] for state in states][-3:] == [0, 1, 2]
    assert [(state["engine"]["step"], state["engine"]["updates"]) for state in states][-3:] == [
        (last - 3, last - 3),
        (last - 2, last - 3),
        (last - 1, last - 3),
    ]
    assert [state["consumed_rows"] for state in states] == [8 * state["step"] for state in states]


def test_a_run_whose_every_step_was_skipped_says_so(corpus, tmp_path):
    overrides = ["model.init_std=1e38", "train.steps=3", "eval.every=0"]
    said = train(tiny(corpus, tmp_path / "run", *overrides)).ok().err
    assert (
        "done: 3 steps, 1,536 tokens, every step was skipped, so the weights are as they were at "
        "the start; " in said
    )
    assert "no plot" not in said


def test_a_run_that_never_has_a_loss_says_why(corpus, tmp_path):
    overrides = ["model.init_std=1e38", "train.max_skipped=1", "eval.every=0"]
    error = train(tiny(corpus, tmp_path / "run", *overrides)).error()
    assert "step 1: 1 steps in a row had a non-finite loss or gradient" in error


def poison_one_rank(data: Path, label: str) -> None:
    """One step with a NaN among the weights that rank 1 computes with, then the same step
    without.
    """
    from dnt_scale.data.token_sets import load_sets
    from dnt_scale.data.tokens import token_stream
    from dnt_scale.distributed import process_group
    from dnt_scale.train.spike_guard import Guard
    from tests.helpers import engines

    me = process_group.start("cpu")
    with engines.built(label, me, data) as (run, engine):
        judge = Guard(run.health, run.optim.judged_clip_norm, run.train.max_skipped).judge
        with token_stream(
            load_sets(run.data), seed=1, global_batch=8, rank=me.rank, world_size=me.world_size
        ) as stream:
            first, second = next(stream)[0], next(stream)[0]

        def snapshot() -> list[torch.Tensor]:
            return [shard.data.clone() for shard in engine.shards()]

        def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
            return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

        engine.train_step(first, judge)
        before = snapshot()
        weight = next(
            shard.data
            for shard in engine.shards()
            if re.fullmatch(r"model.blocks.*weight", shard.name)
        )
        kept = weight[0, 5].clone()
        if me.rank == 1:
            weight[0, 5] = math.nan
        engine.refresh(engine.scalars())
        poisoned = engine.train_step(second, judge)
        counted = [engine.scalars()[name] for name in ("step", "updates")]
        weight[0, 5] = kept
        engine.refresh(engine.scalars())
        unchanged = same(before, snapshot())
        good = engine.train_step(second, judge)
        found = [
            poisoned.skipped,
            unchanged,
            counted,
            good.skipped,
            math.isfinite(good.loss),
            same(before, snapshot()),
        ]
        print(json.dumps(found))
    process_group.stop()


@pytest.mark.parametrize("label", ["ddp", "fsdp", "zero1", "zero3"])
def test_a_nan_on_one_rank_skips_the_step_on_all(corpus, label):
    out = call(poison_one_rank, corpus, label, ranks=2).ok().out
    assert [json.loads(line) for line in out.splitlines()] == 2 * [
        [True, True, [2, 1], False, True, False]
    ]


def test_each_batch_of_a_validation_moves_the_watchdog():
    before = main_thread.moves
    assert [main_thread.moves - before for _ in watched([torch.zeros(1)] * 3)] == [1, 2, 3]


def test_validation_of_a_mixture_is_the_weighted_mean(corpus, packed):
    source = open_tokens(
        DataConfig.model_validate(
            {
                "mixture": {
                    "docs": {"path": corpus, "weight": 3},
                    "packed": {"path": packed, "weight": 1},
                }
            }
        )
    )
    splits = [found.manifest.splits["val"] for found in source.sets]
    found = source.validation_metrics({"docs": {"loss": 2.0}, "packed": {"loss": 4.0}})
    assert found["val/loss"] == pytest.approx(2.5) and found["val/perplexity"] == pytest.approx(
        math.exp(2.5)
    )
    # four tokens, three of them of docs: 3 * 2 + 4 nats, over the bytes that such tokens stand for
    bytes_of_four = (
        3 * splits[0].text_bytes / splits[0].tokens + splits[1].text_bytes / splits[1].tokens
    )
    assert found["val/bits_per_byte"] == pytest.approx(10 / math.log(2) / bytes_of_four)
    assert (found["val/docs/loss"], found["val/packed/loss"]) == (2, 4)
    assert found["val/packed/perplexity"] == pytest.approx(math.exp(4))
    bits = [
        loss / math.log(2) * split.tokens / split.text_bytes
        for loss, split in zip((2, 4), splits, strict=True)
    ]
    assert [found[f"val/{name}/bits_per_byte"] for name in ("docs", "packed")] == pytest.approx(
        bits
    )
    alone = open_tokens(DataConfig(path=packed)).validation_metrics({"": {"loss": 4.0}})
    assert alone == {
        key.replace("/packed", ""): value for key, value in found.items() if "/packed" in key
    }


def test_a_run_on_a_mixture_validates_on_each_set(mixed_run):
    lines = metrics(mixed_run)
    measured = [line for line in lines if "val/loss" in line]
    assert [line["step"] for line in measured] == [0, 2, 3, 4, 6]
    for line in measured:
        docs, packed = line["val/docs/loss"], line["val/packed/loss"]
        assert docs != packed and line["val/loss"] == pytest.approx((2 * docs + packed) / 3)
    assert measured[-1]["val/loss"] < measured[0]["val/loss"]


def test_no_metric_stands_in_the_way_of_another(mixed_run):
    """A file-backed MLflow store has a file for a metric, and folders for the parts of its name."""
    names = {name for line in metrics(mixed_run) for name in line}
    assert "val/docs/loss" in names
    assert not [(a, b) for a in names for b in names if b.startswith(f"{a}/")]


def test_the_line_of_a_validation_has_each_sets_loss(corpus, capsys):
    progress = TrainProgress(10, 0, open_tokens(DataConfig(path=corpus)), silent=False)
    losses = {"val/loss": 2.0, "val/perplexity": 7.4, "val/bits_per_byte": 1.1}
    progress.update(5, losses)
    progress.update(
        5, {**losses, "val/wiki/loss": 1.5, "val/wiki/perplexity": 4.5, "val/code/loss": 2.25}
    )
    one, several = capsys.readouterr().err.splitlines()
    assert one == "step 5: validation loss 2.0000, perplexity 7.40, 1.1000 bits per byte"
    assert several == f"{one} (wiki 1.5000, code 2.2500)"


def train_on_a_set_of_its_own(overrides: list[str], folders: list[Path]) -> None:
    """`dnt_scale.train` with another folder in the place of FOLDER on each rank."""

    folder = folders[int(os.environ["RANK"])]
    sys.exit(main([override.replace("FOLDER", str(folder)) for override in overrides]))


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (["data.path=FOLDER"], "data.path"),
        (
            [
                "data.path=null",
                "data.mixture.a={path: FOLDER, weight: 1}",
                "data.mixture.b={path: ONE, weight: 2}",
            ],
            "data.mixture.a.path",
        ),
    ],
)
def test_a_rank_that_sees_another_set_is_named(tmp_path, data, field):
    one, other = synthetic_set(tmp_path / "one"), synthetic_set(tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["options"]["shard_bytes"] += 1  # as fitting as the first, and not the same
    (other / "manifest.json").write_text(json.dumps(manifest))
    overrides = tiny(Path(), tmp_path / "run", *(line.replace("ONE", str(one)) for line in data))
    error = call(train_on_a_set_of_its_own, overrides, [one, one, other], ranks=3).error()
    assert f"rank 2: {field}: {other} has another manifest here" in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    call(train_on_a_set_of_its_own, [*overrides, "train.steps=3"], [one, one], ranks=2).ok()


def test_a_rank_with_other_weights_is_named(tmp_path):
    one = synthetic_set(tmp_path / "one")
    data = [f"data.mixture.{name}={{path: {one}, weight: 1}}" for name in "ab"]
    overrides = tiny(
        Path(), tmp_path / "run", "data.path=null", *data, "data.mixture.a.weight=FOLDER"
    )
    error = call(train_on_a_set_of_its_own, overrides, [Path("1"), Path("2")], ranks=2).error()
    assert (
        "data.mixture.a.weight is 2.0 on rank 1, but 1.0 on rank 0; start every rank with the same "
        "command" in error
    )


def test_masked_documents_resume_bitwise_and_are_another_model(mixed, mixed_run, tmp_path):
    """`mixed_run` was stopped at step 3 and went on."""
    fields = [*mixed, "train.steps=6", "eval.every=2", "optim.schedule.name=constant"]
    train(tiny(Path(), tmp_path / "whole", *fields, "data.document_mask=true")).ok()
    whole = metrics(tmp_path / "whole")
    last = f"checkpoints/step-{6:08d}"
    assert same_tensors(tmp_path / "whole" / last, mixed_run / last)
    assert curve(tmp_path / "whole", "train/loss") == curve(mixed_run, "train/loss")
    assert whole[-1] == metrics(mixed_run)[-1]
    train(tiny(Path(), tmp_path / "off", *fields)).ok()
    off = metrics(tmp_path / "off")
    assert (
        max(abs(a["train/loss"] - b["train/loss"]) for a, b in zip(whole[1:], off[1:], strict=True))
        > 1e-4
    )


def test_the_mask_of_a_run_stays(mixed, mixed_run, tmp_path):
    run_dir = shutil.copytree(mixed_run, tmp_path / "run", symlinks=True)
    error = train(tiny(Path(), run_dir, *mixed, "train.steps=9")).error()
    assert (
        "data.document_mask: " in error
        and "was trained with true, this run asks for false" in error
    )


def test_padding_counts_in_no_loss(packed, tmp_path):
    """The first loss, before anything is learnt, is the mean over the rows' tokens that are not
    padding.
    """
    overrides = tiny(
        packed, tmp_path / "run", "train.steps=3", "eval.every=0", "checkpoint.every=0"
    )
    train(overrides, ranks=4).ok()
    run = config.load(overrides)
    model = DNT(run.model)
    init_weights(model, run.run.seed)
    with token_stream(
        load_sets(run.data), seed=run.run.seed, global_batch=8, rank=0, world_size=1
    ) as stream:
        batch = next(stream)[0]
    inputs, targets = batch[:, :-1].clamp(min=0), batch[:, 1:]
    counted = targets != IGNORED
    assert (~counted).any()
    losses = F.cross_entropy(
        model(inputs).flatten(0, 1), targets.clamp(min=0).flatten(), reduction="none"
    )
    first = metrics(tmp_path / "run")[0]
    assert first["train/loss"] == pytest.approx(
        float(losses[counted.flatten()].mean().detach()), abs=1e-5
    )
    assert first["tokens"] == 8 * 64  # positions in rows, padding too
