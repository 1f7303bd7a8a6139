"""Runs whose numbers come a step late, as on CUDA: what they leave is what others leave."""

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dnt_scale.train.rank import main
from testbed.run import call, metrics, synthetic_set, tiny, train

STEPS = 16
NAN, SPIKE = float("nan"), 1000.0
BAD = {5: NAN, 11: SPIKE}
RUN = [
    f"train.steps={STEPS}",
    "health.spike=skip",
    "health.spike_window=8",
    "health.spike_sigmas=20",
    "eval.every=6",
    "checkpoint.every=4",
    "checkpoint.keep=99",
    "measure.every=3",
    "diagnose.every=7",
    "train.ema=0.9",
    "optim.momentum_dtype=bf16",
]
# those after which something waits for the device: the first, for the average
WAITED_FOR = {1, 4, 6, 7, 8, 12, 14, 16}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    return synthetic_set(tmp_path_factory.mktemp("made_up") / "set")


def train_late(
    overrides: list[str], bad: Mapping[int, float], late: bool, stop_in: int = 0, fail_in: int = 0
) -> None:
    """Train with losses multiplied in some steps; prints how often somebody waits in a step.

    Args:
        late: whether the host has the numbers of a step late.
        stop_in: step in which a signal comes.
        fail_in: step whose batch cannot be read.
    """
    from dnt_scale.checkpoint import Saver
    from dnt_scale.engine.fsdp import FSDPEngine
    from dnt_scale.engine.late import Late
    from dnt_scale.model import dnt
    from dnt_scale.model.dnt import DNT
    from dnt_scale.train import loop
    from dnt_scale.train.hooks import agreement
    from dnt_scale.train.stages import Batches
    from tests.helpers.waits import uncounted, waits, with_the_devices_root

    with_the_devices_root()
    beat, make, following = loop.beat, FSDPEngine.__init__, Batches.__next__
    now, counts = [0], {}

    def marked(where: str) -> None:
        beat(where)
        counts[now[0]] = dict(seen)
        seen.clear()
        now[0] = int(where.removeprefix("step ")) if where.startswith("step ") else 0
        if stop_in and now[0] == stop_in:
            os.kill(os.getpid(), signal.SIGUSR2)

    def make_late(self, *args, **kwargs) -> None:
        make(self, *args, **kwargs)
        self.judges_late = late and self.gradients.skips_on_device

    def failing(self):
        if fail_in and now[0] == fail_in:
            raise ValueError("a shard is gone")
        return following(self)

    class Bad(DNT):
        def forward(self, tokens_BT, targets_BT=None):
            loss = super().forward(tokens_BT, targets_BT)
            last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
            return loss * bad.get(now[0], 1.0) if last else loss

    dnt.DNT, loop.beat, FSDPEngine.__init__, Batches.__next__ = Bad, marked, make_late, failing
    with waits() as seen:
        # what hosts tell each other is their own, and the device goes on meanwhile: of signals, and
        # of a checkpoint that all have written
        Saver.commit = uncounted(seen, Saver.commit)
        agreement.highest = uncounted(seen, agreement.highest)
        Late.read = uncounted(seen, Late.read)
        status = main(overrides)
    print(json.dumps(counts))
    sys.exit(status)


def left_by(run_dir: Path) -> list[object]:
    """What a run leaves, without times: lines with their keys in order, and all of checkpoints."""
    lines = [list(line.items()) for line in metrics(run_dir)]
    log = run_dir / "logs" / "bad_steps.jsonl"
    bad = log.read_text().splitlines() if log.exists() else []
    found: list[object] = [lines, [{**json.loads(line), "time": 0} for line in bad]]
    for path in sorted((run_dir / "checkpoints").glob("step-*")):
        state = json.loads((path / "state.json").read_text())
        kept = ("step", "skipped", "consumed_rows", "tokens", "engine", "health", "files")
        found.append([state[name] for name in kept])
    return found


@pytest.fixture(scope="module")
def usual(made_up, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("usual") / "run"
    out = call(train_late, tiny(made_up, run_dir, *RUN), BAD, False, ranks=2).ok().out
    for line in out.splitlines():  # one wait a step at least
        assert all(json.loads(line)[str(step)] for step in range(1, STEPS))
    return run_dir


def test_a_run_leaves_the_same_and_its_steps_wait_for_nothing(made_up, usual, tmp_path):
    overrides = tiny(made_up, tmp_path / "run", *RUN)
    finished = call(train_late, overrides, BAD, True, ranks=2).ok()
    assert left_by(tmp_path / "run") == left_by(usual)
    lines = metrics(usual)
    assert [line["step"] for line in lines if line.get("skipped")] == sorted(BAD)
    assert "step 11: a loss and gradient spike" in finished.err
    for line in finished.out.splitlines():
        counts = {int(step): count for step, count in json.loads(line).items()}
        plain = {step: counts[step] for step in set(range(1, STEPS)) - WAITED_FOR}
        assert not any(plain.values()), counts


@pytest.mark.parametrize("stop_at", [5, 11])
def test_a_run_goes_on_right_after_a_step_that_was_skipped(made_up, usual, tmp_path, stop_at):
    overrides = tiny(made_up, tmp_path / "run", *RUN)
    call(train_late, [*overrides, f"run.stop_at={stop_at}"], BAD, True, ranks=2).ok()
    assert metrics(tmp_path / "run")[-1]["step"] == stop_at
    call(train_late, overrides, BAD, True, ranks=2).ok()
    lines, log, *checkpoints = left_by(tmp_path / "run")
    expected = left_by(usual)
    assert [lines, log] == expected[:2]
    assert [one for one in checkpoints if one[0] != stop_at] == expected[2:]


@pytest.mark.parametrize("stop_in", [5, 9])
def test_a_signal_stops_a_run_with_a_checkpoint_of_what_is_on_record(
    made_up, usual, tmp_path, stop_in
):
    overrides = tiny(made_up, tmp_path / "run", *RUN)
    stopped = call(train_late, overrides, BAD, True, stop_in, ranks=2)
    assert stopped.code == 128 + signal.SIGUSR2, stopped.err
    assert metrics(tmp_path / "run")[-1]["step"] == stop_in
    expected = [line for line in metrics(usual) if line["step"] <= stop_in]
    assert metrics(tmp_path / "run") == expected
    state = json.loads((tmp_path / "run/checkpoints/latest/state.json").read_text())
    assert (state["step"], state["skipped"]) == (stop_in, 1)
    assert state["engine"] == {"step": stop_in, "updates": stop_in - 1}
    train(overrides, ranks=2).ok()  # without further bad steps, and read in time


@pytest.mark.parametrize("spike", ["skip", "rollback"])
def test_too_many_bad_steps_end_a_run_as_ever(made_up, tmp_path, spike):
    found = []
    for name, late in (("usual", False), ("late", True)):
        more = ["train.max_skipped=3", f"health.spike={spike}"]
        overrides = tiny(made_up, tmp_path / name, *RUN, *more)
        finished = call(train_late, overrides, dict.fromkeys((9, 10, 11, 12), NAN), late)
        found.append([finished.error().replace(name, ""), *left_by(tmp_path / name)])
    assert "step 11: 3 steps in a row had a non-finite loss or gradient" in found[0][0]
    assert found[0] == found[1]


def test_an_error_leaves_the_line_of_the_step_before(made_up, tmp_path):
    overrides = tiny(made_up, tmp_path / "run", *RUN)
    error = call(train_late, overrides, {}, True, 0, 10).error()
    assert "a shard is gone" in error
    assert metrics(tmp_path / "run")[-1]["step"] == 9


def test_where_a_verdict_cannot_be_late_it_is_not(made_up, tmp_path):
    """With no gradient buffer the host waits in each step."""
    more = ["health.spike=off", "optim.gradient_buffer=false", "optim.clip=previous"]
    for late in (False, True):
        overrides = tiny(made_up, tmp_path / str(late), *RUN, "train.steps=12", *more)
        call(train_late, overrides, BAD, late).ok()
    assert left_by(tmp_path / "True") == left_by(tmp_path / "False")


ROLLBACK = ["health.spike=rollback", "health.snapshot_every=15"]


@pytest.mark.parametrize("bad", [BAD, {9: NAN, 10: NAN, 11: NAN, 13: SPIKE, 16: NAN}])
def test_a_rollback_is_done_in_the_middle_of_the_next_step(made_up, tmp_path, bad):
    """That step is done anew, also where it is bad itself, measured, or the last."""
    for late in (False, True):
        overrides = tiny(made_up, tmp_path / str(late), *RUN, *ROLLBACK)
        finished = call(train_late, overrides, bad, late, ranks=2).ok()
    assert left_by(tmp_path / "True") == left_by(tmp_path / "False")
    lines = metrics(tmp_path / "True")
    assert [line["step"] for line in lines if line.get("health/rollback")] == sorted(bad)
    counts = {int(step): count for step, count in json.loads(finished.out.splitlines()[0]).items()}
    # a snapshot; and after a bad step it is written down where its rows lie
    apart = WAITED_FOR | {15} | {step + 1 for step in bad}
    assert not any(counts[step] for step in set(range(1, STEPS)) - apart), counts


@pytest.mark.parametrize("late", [False, True])
def test_validation_measures_what_a_rollback_leaves(made_up, tmp_path, late):
    overrides = tiny(made_up, tmp_path / "run", *RUN, *ROLLBACK, "train.steps=12", "eval.every=4")
    call(train_late, overrides, {12: SPIKE}, late).ok()
    losses = {
        line["step"]: line["val/loss"] for line in metrics(tmp_path / "run") if "val/loss" in line
    }
    assert losses[12] == losses[8] != losses[4]  # the snapshot is of step 8, a checkpoint's


@pytest.mark.parametrize("stop_in", [5, 6])
def test_a_signal_in_or_after_a_step_that_is_undone(made_up, tmp_path, stop_in):
    for late in (False, True):
        overrides = tiny(made_up, tmp_path / str(late), *RUN, *ROLLBACK)
        stopped = call(train_late, overrides, BAD, late, stop_in)
        assert stopped.code == 128 + signal.SIGUSR2, stopped.err
    assert left_by(tmp_path / "True") == left_by(tmp_path / "False")


def test_a_later_stage_is_judged_without_the_steps_before_it(made_up, tmp_path):
    for name, late in (("usual", False), ("late", True)):
        overrides = [*RUN, "train.stages.second.after_step=10", "train.stages.second.lr_factor=0.5"]
        bad = {9: NAN, 10: NAN, 11: SPIKE, 15: SPIKE}
        call(train_late, tiny(made_up, tmp_path / name, *overrides), bad, late).ok()
    assert left_by(tmp_path / "late") == left_by(tmp_path / "usual")
    skipped = [line["step"] for line in metrics(tmp_path / "late") if line.get("skipped")]
    assert skipped == [9, 10]  # a window with a spike in it finds no other
