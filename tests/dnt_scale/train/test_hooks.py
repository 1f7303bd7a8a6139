"""Hooks on real ranks: their order and moments, garbage collection, the profiler's window."""

import gc
import gzip
import json
import signal
import sys
from pathlib import Path

import pytest
import torch

from dnt_scale.data.sources import load_source
from dnt_scale.distributed import process_group
from dnt_scale.record import timeline
from dnt_scale.train.hooks import HOOKS, Hook
from dnt_scale.train.rank import main
from testbed.run import (
    PLOTS,
    call,
    complete_checkpoints,
    metrics,
    stop_midway,
    synthetic_set,
    tiny,
    train,
)
from testbed.stores import runs, sqlite_store
from testbed.waiting import until
from tests.helpers import engines

DESIGN = Path(__file__).parents[3] / "docs" / "design.md"
SHORT = ["train.steps=4", "eval.every=2", "checkpoint.every=2", "optim.schedule.warmup_steps=1"]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A set that takes no time to make, to be read only."""
    return synthetic_set(tmp_path_factory.mktemp("made_up") / "set")


def names() -> list[str]:
    return [hook.__name__ for hook in HOOKS]


def test_what_a_hook_needs_comes_before_it():
    order = "Diagnose Rollback Validation Records BadSteps Agreement Saving Snapshots Timeline"
    assert [name for name in names() if name in order.split()] == order.split()
    # the files of a profile are there, and the timeline's end is told, when MLflow is
    assert names().index("Records") < names().index("ProfilerWindow") < names().index("Timeline")


def test_the_design_names_the_hooks_in_their_order():
    table = DESIGN.read_text().partition("**Hooks.**")[2].partition("\n\n**")[0]
    listed = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert listed == names()


class Traced(Hook):
    """Prints its moments."""

    name = "first"

    def before_training(self, run):
        print(self.name, "before_training", run.state.step)

    def before_step(self, run):
        print(self.name, "before_step", run.state.step)

    def after_step(self, run, step):
        print(self.name, "after_step", step.number, run.state.step, step.last, step.saved)

    def after_training(self, run):
        print(self.name, "after_training", run.state.step, run.outcome)

    def close(self, run):
        print(self.name, "close", run.outcome)


class Last(Traced):
    name = "last"


class Raising(Hook):
    """Raises after step 3, and as it closes."""

    def after_step(self, run, step):
        if step.number == 3:
            raise ValueError("a hook of somebody's is at fault")

    def close(self, run):
        raise OSError("and once more")


def train_with_hooks(overrides: list[str], *more: type[Hook]) -> None:
    """`dnt_scale.train` with ``Traced`` before all hooks, and ``more`` behind them."""
    from dnt_scale.train import loop

    loop.HOOKS = (Traced, *loop.HOOKS, *more)
    sys.exit(main(overrides))


def test_the_moments_of_a_run(made_up, tmp_path):
    overrides = tiny(made_up, tmp_path / "run", *SHORT, "train.steps=2")
    out = call(train_with_hooks, overrides, Last).ok().out
    assert out.splitlines() == [
        "first before_training 0",
        "last before_training 0",
        "first before_step 0",
        "last before_step 0",
        "first after_step 1 1 False False",
        "last after_step 1 1 False False",
        "first before_step 1",
        "last before_step 1",
        "first after_step 2 2 True False",
        "last after_step 2 2 True True",
        "first after_training 2 FAILED",
        "last after_training 2 FAILED",
        "last close FINISHED",
        "first close FINISHED",
    ]


def test_all_hooks_are_closed_whatever_one_of_them_raises(made_up, tmp_path):
    run_dir = tmp_path / "run"
    finished = call(train_with_hooks, tiny(made_up, run_dir, *SHORT), Raising, env=PLOTS)
    assert finished.code == 2 and "error: and once more" in finished.err
    assert finished.out.splitlines()[-1] == "first close FAILED"
    end = timeline.read(run_dir)[-1]
    assert (end["event"], end["outcome"], end["step"]) == ("end", "FAILED", 3)
    assert (run_dir / "plots" / "loss.png").exists()


# --- garbage collection


def train_and_tell_of_garbage(overrides: list[str]) -> None:
    """`dnt_scale.train`; prints the step before each collection, and how it leaves the
    collector.
    """
    from dnt_scale.train import loop

    at, gone = [], []

    class Watching(Hook):
        def before_training(self, run):
            gone.append(gc.get_freeze_count() > 0)
            gc.callbacks.append(
                lambda phase, info: at.append(run.state.step) if phase == "start" else None
            )

        def after_step(self, run, step):
            for _ in range(3000):  # circles enough for Python to look for them by itself
                circle = []
                circle.append(circle)

        def close(self, run):
            gc.callbacks.clear()

    gc.unfreeze()  # what the server of ranks has frozen
    loop.HOOKS = (*loop.HOOKS, Watching)
    status = main(overrides)
    print(json.dumps([sorted({*at}), gone, gc.isenabled(), gc.get_freeze_count()]))
    sys.exit(status)


def test_garbage_is_collected_at_fixed_steps_only(made_up, tmp_path):
    fields = [*SHORT, "train.steps=7", "eval.every=0", "checkpoint.every=0"]
    overrides = tiny(made_up, tmp_path / "fixed", *fields, "garbage.every=3")
    out = call(train_and_tell_of_garbage, overrides).ok().out
    assert json.loads(out) == [[3, 6], [True], True, 0]
    overrides = tiny(made_up, tmp_path / "python", *fields, "garbage.every=0")
    at, frozen, enabled, left = json.loads(call(train_and_tell_of_garbage, overrides).ok().out)
    assert {1, 2, 4, 5} <= {*at} and (frozen, enabled, left) == ([False], True, 0)


def find_tensors_in_garbage(data: Path, label: str, *overrides: str) -> None:
    """Print how many tensors are left to the collector by some steps and a validation of an
    engine.
    """
    me = process_group.start("cpu")
    with engines.built(label, me, data, *overrides) as (run, engine):
        stream = {"seed": 1, "global_batch": 8, "rank": me.rank, "world_size": me.world_size}
        with load_source(run).stream(**stream) as batches:
            for step in range(6):
                if step == 3:  # what the first steps set up is garbage once
                    gc.collect()
                    gc.disable()
                engine.train_step(next(batches)[0], lambda loss, norm: 0.5)
                engine.evaluate([next(batches)[0]])
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        print(sum(isinstance(found, torch.Tensor) for found in gc.garbage))
    process_group.stop()


@pytest.mark.parametrize(
    ("label", "more"),
    [
        ("ddp", []),
        ("fsdp", ["engine.activation_checkpointing=full"]),
        ("fsdp", ["optim.gradient_buffer=false", "optim.clip=previous"]),
        ("zero0", []),
        ("zero2", ["engine.activation_checkpointing=full"]),
        ("zero3", []),
    ],
)
def test_no_tensor_waits_for_the_collector(made_up, label, more):
    """Else memory would grow between collections."""
    out = call(find_tensors_in_garbage, made_up, label, *more, ranks=2).ok().out
    assert out.split() == ["0", "0"]


# --- the profiler's window


def test_a_window_of_steps_is_profiled_and_changes_no_number(made_up, tmp_path):
    run_dir, plain = tmp_path / "run", tmp_path / "plain"
    uri = sqlite_store(tmp_path / "mlflow.db")
    tracked = ["tracking.enabled=true", f"tracking.uri={uri}"]
    overrides = [*SHORT, *tracked, "train.steps=6", "profile.steps=3..4"]
    finished = train(tiny(made_up, run_dir, *overrides), ranks=2).ok()
    assert f"profile.steps: see {run_dir}/profile/steps-3-4.summary.txt" in finished.err
    train(tiny(made_up, plain, *SHORT, "train.steps=6"), ranks=2).ok()
    assert metrics(run_dir) == metrics(plain)

    files = {path.name: path for path in (run_dir / "profile").iterdir()}
    assert files.keys() == {"steps-3-4.summary.txt", "steps-3-4.trace.json.gz"}
    trace = json.loads(gzip.decompress(files["steps-3-4.trace.json.gz"].read_bytes()))
    events = [event.get("name", "") for event in trace["traceEvents"]]
    assert {name for name in events if name.startswith("step ")} == {"step 3", "step 4"}
    assert events.count("aten::mm") > 20
    page = files["steps-3-4.summary.txt"].read_text().splitlines()
    assert page[0] == "tiny, dnt_nano, steps 3 to 4: 8 rows a step, 4 a micro-batch"
    assert page[1].startswith("fsdp on 2 x cpu in fp32, torch 2.")
    assert len(page) < 30 and any(line.endswith("  aten::mm") for line in page)
    shares = [float(line.split("%")[0]) for line in page[4:-1]]
    assert shares == sorted(shares, reverse=True) and 50 < sum(shares) < 100.5

    from mlflow import MlflowClient

    until(lambda: "tiny" in (found := runs(uri)) and found["tiny"].info.status == "FINISHED")
    sent = MlflowClient(uri).list_artifacts(runs(uri)["tiny"].info.run_id, "profile")
    assert {file.path for file in sent} == {f"profile/{name}" for name in files}


def test_a_window_that_a_signal_cuts_short_is_written(made_up, tmp_path):
    run_dir = tmp_path / "run"
    overrides = tiny(made_up, run_dir, "profile.steps=1..20", "eval.every=0")
    stop_midway(overrides, run_dir, lambda group: group.kill(signal.SIGTERM), ranks=1)
    (page,) = (run_dir / "profile").glob("*.summary.txt")
    last = complete_checkpoints(run_dir)[-1].removeprefix("step-").lstrip("0")
    assert page.name == f"steps-1-{last}.summary.txt"


def test_a_profile_that_cannot_be_written_ends_no_run(made_up, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "profile").write_text("in the way")
    finished = train(tiny(made_up, run_dir, *SHORT, "profile.steps=2..2")).ok()
    assert f"profile.steps: {run_dir}/profile/steps-2-2.* could not be written (" in finished.err
    assert metrics(run_dir)[-1]["step"] == 4


def test_a_window_that_cannot_be_is_refused_in_one_line(made_up, tmp_path):
    run_dir = tmp_path / "run"
    error = train(tiny(made_up, run_dir, "profile.steps=12..10"), ranks=2).error()
    assert "profile.steps: the window ends before it begins; expected FIRST..LAST" in error
    for budget in (["train.steps=20"], ["train.steps=null", "train.tokens=10000"]):
        error = train(tiny(made_up, run_dir, *budget, "profile.steps=10..21"), ranks=2).error()
        assert error == (
            "error: profile.steps: the window 10..21 ends after the run's last step, 20; "
            "give steps of the run, or profile.steps=null"
        )
    assert not run_dir.exists()
