import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_prep.shards import load_manifest, read_block
from dnt_scale.checkpoint.tensor_shards import TensorShard
from dnt_scale.config import DataConfig, HealthSection
from dnt_scale.data.token_sets import load_sets
from dnt_scale.data.tokens import open_tokens, token_stream
from dnt_scale.train.spike_guard import Guard, HopelessRun, Snapshot, limit
from testbed.run import call
from tests.helpers import engines

VALUES = st.floats(0, float(np.finfo(np.float32).max), width=32)
ANY = st.one_of(VALUES, st.sampled_from([math.nan, math.inf]))
STREAM = st.lists(st.tuples(ANY, ANY), max_size=60)
REACTIONS = st.sampled_from(["off", "skip", "clip", "rollback"])
CLIP_NORMS = st.one_of(st.none(), st.floats(0.01, 100))


def guard(spike="skip", window=16, sigmas=6.0, clip_norm=None, max_skipped=10) -> Guard:
    return Guard(
        HealthSection(spike=spike, spike_window=window, spike_sigmas=sigmas), clip_norm, max_skipped
    )


def noisy(count: int, seed: int = 0) -> list[tuple[float, float]]:
    draws = np.random.default_rng(seed).uniform(-1, 1, (count, 2))
    return [(4 + 0.1 * float(a), 1 + 0.2 * float(b)) for a, b in draws]


def judged(one: Guard, stream) -> list[tuple[float, object]]:
    return [(one.judge(loss, norm), one.bad) for loss, norm in stream]


@settings(deadline=None)
@given(STREAM, st.integers(0, 60), REACTIONS, CLIP_NORMS, st.integers(8, 20), st.floats(0.1, 6))
def test_the_same_decisions_after_a_checkpoint_at_any_step(
    stream, cut, spike, clip_norm, window, sigmas
):
    whole = guard(spike, window, sigmas, clip_norm)
    expected = judged(whole, stream)

    before, after = guard(spike, window, sigmas, clip_norm), guard(spike, window, sigmas, clip_norm)
    found = judged(before, stream[:cut])
    after.restore(json.loads(json.dumps(before.state())))  # as state.json does
    found += judged(after, stream[cut:])
    assert repr(found) == repr(expected)  # nan equals itself there
    assert after.state() == whole.state()


@given(VALUES, VALUES, st.integers(1, 60), st.floats(0.01, 6))
def test_no_spike_in_a_constant_stream(loss, norm, count, sigmas):
    one = guard(window=8, sigmas=sigmas)
    assert all(bad is None for _, bad in judged(one, [(loss, norm)] * count))


@given(STREAM, REACTIONS, CLIP_NORMS)
def test_a_factor_is_between_0_and_1_and_0_where_a_value_is_not_finite(stream, spike, clip_norm):
    for (factor, bad), (loss, norm) in zip(
        judged(guard(spike, 8, 1.0, clip_norm), stream), stream, strict=True
    ):
        assert 0 <= factor <= 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            assert factor == 0 and bad.why == "not finite" and bad.action != "clip"
        elif clip_norm is not None:
            assert factor * norm <= clip_norm * (1 + 1e-12)
        if bad and bad.action in ("skip", "rollback"):
            assert factor == 0


@settings(deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(8, 50),
    st.floats(1, 6),
    st.sampled_from(["loss", "gradient"]),
)
def test_an_injected_spike_is_caught_once_half_the_window_is_there(seed, place, sigmas, which):
    stream = noisy(60, seed)
    good = guard(window=16, sigmas=sigmas)
    judged(good, stream[:place])
    assume(len(good.losses) >= 8)
    limits = limit(good.losses, sigmas), limit(good.norms, sigmas)
    spiked = (limits[0] * 1.001, 0.5) if which == "loss" else (2.0, limits[1] * 1.001)
    assert good.judge(*spiked) == 0.0
    assert (good.bad.why, good.bad.action) == (f"{which} spike", "skip")
    assert (good.bad.limits["loss"], good.bad.limits["grad_norm"]) == limits

    just_below = guard(window=16, sigmas=sigmas)
    judged(just_below, stream[:place])
    assert just_below.judge(*(value * 0.999 for value in limits)) == 1.0 and just_below.bad is None


def test_no_spike_before_half_the_window():
    one = guard(window=16)
    for loss, norm in noisy(7):
        one.judge(loss, norm)
    assert one.judge(1e9, 1e9) == 1.0 and one.bad is None


def test_a_spike_does_not_enter_the_window():
    one, other = guard(window=8), guard(window=8)
    for loss, norm in noisy(20):
        one.judge(loss, norm)
        other.judge(loss, norm)
    for _ in range(3):
        assert other.judge(100.0, 1.0) == 0.0
    assert one.state()["losses"] == other.state()["losses"]
    assert (one.lost_in_a_row, other.lost_in_a_row) == (0, 3)


def test_clip_brings_the_norm_to_the_windows_mean():
    one = guard("clip", window=8, clip_norm=3.0)
    stream = noisy(8)
    for loss, norm in stream:
        one.judge(loss, norm)
    mean = math.fsum(norm for _, norm in stream) / 8
    assert one.judge(4.0, 50.0) == pytest.approx(mean / 50, rel=1e-12)
    assert one.metrics() == {"health/clip": 1, "health/rollback": 0}
    assert one.judge(100.0, mean / 2) == 1.0  # a loss spike of a small gradient
    assert one.lost_in_a_row == 0
    assert one.judge(4.0, mean) == 1.0
    assert one.metrics() == {"health/clip": 0, "health/rollback": 0}


def test_off_leaves_the_ordinary_clip():
    one = guard("off", window=8, clip_norm=2.0)
    for loss, norm in noisy(20):
        one.judge(loss, norm)
    assert one.judge(1e6, 1e6) == 2e-6
    assert one.judge(math.nan, 1.0) == 0.0


class Line:
    """An engine of one weight and one momentum, of different dtypes, that goes down by 1 every
    step.
    """

    def __init__(self) -> None:
        self.weight = torch.full((2, 3), 10.0)
        self.momentum = torch.zeros(2, 3, dtype=torch.bfloat16)
        self.counts = {"step": 0.0, "updates": 0.0}
        self.refreshed = 0

    def train(self) -> None:
        self.weight -= 1
        self.momentum += 0.5
        self.counts = {name: count + 1 for name, count in self.counts.items()}

    def shards(self) -> list[TensorShard]:
        return [
            TensorShard("model.w", (2, 3), (0, 0), self.weight),
            TensorShard("momentum_buffer.w", (2, 3), (0, 0), self.momentum),
        ]

    def scalars(self) -> dict[str, float]:
        return dict(self.counts)

    def refresh(self, scalars: Mapping[str, float]) -> None:
        self.counts = dict(scalars)
        self.refreshed += 1


def nothing() -> dict[str, object]:
    return {}


def test_a_rollback_goes_back_to_the_snapshot_while_the_step_goes_on():
    engine, one = (
        Line(),
        Guard(HealthSection(spike="rollback", spike_window=8, snapshot_every=4), None, 10),
    )
    one.keep(0, engine)
    for step, (loss, norm) in enumerate(noisy(10), 1):
        assert one.judge(loss, norm) == 1.0
        engine.train()
        one.undo(engine)
        one.keep(step, engine)
    assert one.judge(100.0, 1.0) == 0.0
    engine.counts["step"] += 1
    one.undo(engine)  # the last snapshot is of step 8
    assert torch.equal(engine.weight, torch.full((2, 3), 2.0))
    assert torch.equal(engine.momentum, torch.full((2, 3), 4.0, dtype=torch.bfloat16))
    assert engine.counts == {"step": 11.0, "updates": 8.0}
    assert engine.refreshed == 1
    assert one.metrics()["health/rollback"] == 1


def test_a_snapshot_is_taken_at_the_start_and_at_checkpoints_and_for_rollback_only():
    engine = Line()
    one = Guard(HealthSection(spike="rollback", snapshot_every=4), None, 10)
    one.keep(7, engine)  # resumed at 7
    assert one.snapshot.scalars["updates"] == 0
    engine.train()
    one.keep(9, engine)
    assert one.snapshot.scalars["updates"] == 0
    one.keep(9, engine, at_checkpoint=True)
    assert one.snapshot.scalars["updates"] == 1
    other = guard("skip")
    other.keep(0, engine, at_checkpoint=True)
    assert other.snapshot.copies is None


def test_a_snapshot_is_a_copy():
    engine, snapshot = Line(), Snapshot()
    snapshot.take(engine)
    engine.train()
    snapshot.take(engine)
    engine.train()
    snapshot.restore(engine)
    assert engine.weight[0, 0] == 9 and engine.counts["updates"] == 1


def test_too_many_lost_steps_in_a_row_end_the_run():
    one = guard(max_skipped=3)
    for step, loss in enumerate((1.0, math.nan, math.nan, 1.0, math.nan, math.inf), 1):
        one.judge(loss, 2.0)
        one.after(step, nothing, None)
    one.judge(math.nan, 2.0)
    with pytest.raises(
        HopelessRun,
        match=r"step 7: 3 steps in a row had a non-finite loss or gradient \(loss nan, grad",
    ):
        one.after(7, nothing, None)


def test_what_was_bad_and_what_was_done_is_a_sentence():
    said = {}
    for spike in ("off", "skip", "clip", "rollback"):
        engine, one = Line(), guard(spike, window=8, max_skipped=2)
        for step, (loss, norm) in enumerate(noisy(8), 1):
            one.judge(loss, norm)
            engine.train()
            one.keep(step, engine)
            assert one.told() is None
        one.judge(100.0, 0.5)
        spiked = one.told()
        one.judge(100.0, math.inf)
        said[spike] = spiked, one.told()
        if spike in ("skip", "rollback"):
            left = (
                "the weights are unchanged" if spike == "skip" else "back to the weights of step 1"
            )
            with pytest.raises(
                HopelessRun, match=rf"^step 9: 2 steps in a row .*; {left}: lower optim.lr"
            ):
                one.after(9, nothing, None)
    broken = "a loss or gradient that is not finite (loss 100, gradient norm inf): left out, "
    spike = "a loss spike (loss 100, gradient norm 0.5): "
    assert said == {
        "off": (None, f"{broken}the weights are unchanged"),
        "skip": (
            f"{spike}left out, the weights are unchanged",
            f"{broken}the weights are unchanged",
        ),
        "clip": (f"{spike}gradient multiplied by 1", f"{broken}the weights are unchanged"),
        "rollback": (
            f"{spike}left out, back to the weights of step 1",
            f"{broken}back to the weights of step 1",
        ),
    }


def test_a_bad_step_is_written_down_with_its_rows(corpus, tmp_path):
    source = open_tokens(DataConfig(path=corpus))
    log = tmp_path / "logs" / "bad_steps.jsonl"
    one = guard(window=8)
    for step, (loss, norm) in enumerate([*noisy(12), (90.0, 1.0), (math.nan, math.inf)], 1):
        one.judge(loss, norm)
        one.after(step, lambda step=step: source.rows_behind(5, 4 * step - 4, 4 * step), log)
    spike, broken = (json.loads(line) for line in log.read_text().splitlines())
    assert (spike["step"], spike["loss"], spike["why"], spike["action"]) == (
        13,
        90.0,
        "loss spike",
        "skip",
    )
    assert spike["window"] == 8 and 4 < spike["limits"]["loss"] < 90
    assert (broken["step"], broken["loss"], broken["why"]) == (
        14,
        None,
        "not finite: loss nan, gradient norm inf",
    )

    # the rows named are those that were trained on
    assert spike["positions"] == [48, 52]
    with source.stream(seed=5, global_batch=4, rank=0, world_size=1, consumed_rows=48) as stream:
        trained, consumed = next(stream)
    assert consumed == 52
    manifest = load_manifest(corpus)
    members = [
        (shard.file, part.name)
        for shard in manifest.splits["train"].shards
        for part in shard.members
    ]
    named = []
    for place in spike["rows"]:
        assert place["set"] == str(corpus)
        block = read_block(
            corpus, manifest, "train", members.index((place["shard"], place["member"]))
        )
        named += block[place["rows"]].tolist()
    assert sorted(named) == sorted(trained.tolist())


ROLLED = {
    **{
        label: [label, "train.dtype=bf16"]
        for label in ("fsdp", "hsdp", "zero0", "zero1", "zero2", "zero3", "zero3+offload")
    },
    "no gradient buffer": [
        "fsdp",
        "optim.gradient_buffer=false",
        "optim.clip=previous",
        "optim.momentum_dtype=bf16",
    ],
    "adamw": ["fsdp", "optim=adamw", "optim.lr=0.001"],
    "adamw on zero1": ["zero1", "optim=adamw", "optim.lr=0.001"],
}


def roll_each(data: Path) -> None:
    """Engine by engine: a snapshot, three steps of which the last is skipped, back, and the
    first of them again.
    """
    from dnt_scale.distributed import process_group

    def judge(loss: float, norm: float) -> float:
        return min(1.0, 0.7 / norm)

    me = process_group.start("cpu")
    for name, (label, *overrides) in ROLLED.items():
        with (
            engines.built(label, me, data, *overrides) as (run, engine),
            token_stream(
                load_sets(run.data), seed=1, global_batch=8, rank=me.rank, world_size=me.world_size
            ) as stream,
        ):
            batches = [next(stream)[0] for _ in range(4)]
            engine.train_step(batches[0], judge)
            snapshot = Snapshot()
            snapshot.take(engine)
            before = [shard.data.clone() for shard in engine.shards()]
            first = engine.train_step(batches[1], judge).loss
            engine.train_step(batches[2], judge)
            engine.train_step(batches[3], lambda loss, norm: 0.0)
            moved = all(
                not torch.equal(shard.data, data)
                for shard, data in zip(engine.shards(), before, strict=True)
            )
            snapshot.restore(engine)
            back = all(
                torch.equal(shard.data, data)
                for shard, data in zip(engine.shards(), before, strict=True)
            )
            counts = [engine.scalars()["step"], engine.scalars()["updates"]]
            print(
                json.dumps(
                    [name, moved, back, counts, first, engine.train_step(batches[1], judge).loss]
                )
            )
    process_group.stop()


@pytest.fixture(scope="module")
def rolled(corpus):
    found: dict[str, list[list]] = {}
    for line in call(roll_each, corpus, ranks=2).ok().out.splitlines():
        name, *results = json.loads(line)
        found.setdefault(name, []).append(results)
    return found


@pytest.mark.parametrize("name", ROLLED)
def test_every_engine_goes_back_to_a_snapshot_exactly(rolled, name):
    assert len(rolled[name]) == 2
    for moved, back, counts, first, again in rolled[name]:
        assert moved and back
        assert counts == [4, 1]
        assert again == first
