"""`dnt sweep` on this machine: killed and gone on with, halved, with a run that diverges."""

import json
import os
import random
import signal
from pathlib import Path

import pytest

from dnt_scale.record import run_lock, timeline
from dnt_scale.sweep import sweep_file
from testbed.run import Finished, dnt, metrics, steps_written, synthetic_set, tiny
from testbed.stores import runs as mlflow_runs
from testbed.stores import sqlite_store
from testbed.waiting import until
from tests.helpers.sweeps import start_sweep

GRID = ("optim.lr=0.03,0.1", "run.seed=1,2")
NAMES = ["0-lr_0.03-seed_1", "1-lr_0.03-seed_2", "2-lr_0.1-seed_1", "3-lr_0.1-seed_2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_set(tmp_path_factory.mktemp("data") / "set")


def words(data: Path, folder: Path, *more: str) -> list[str]:
    return tiny(data, folder, "run.name=lr", *more)


def sweep(*arguments: str) -> Finished:
    return start_sweep(*arguments).wait()


@pytest.fixture(scope="module")
def grid(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a grid of four that nobody disturbed. To be read only."""
    folder = tmp_path_factory.mktemp("grid") / "lr"
    sweep(*words(data, folder, *GRID)).ok()
    return folder


def values(folder: Path) -> dict[str, dict[int, float]]:
    return {name: each.values for name, each in sweep_file.read_results(folder).items()}


def weights(run_dir: Path) -> dict[str, str]:
    """The hashes of the last checkpoint's files."""
    state = json.loads((run_dir / "checkpoints" / "latest" / "state.json").read_text())
    return {name: record["sha256"] for name, record in state["files"].items()}


def starts(run_dir: Path) -> int:
    return sum(event["event"] == "start" for event in timeline.read(run_dir))


def test_a_grid_is_trained_and_told_of(grid: Path) -> None:
    found = sweep_file.read_sweep(grid)
    assert [run.name for run in found.runs] == NAMES
    assert found.runs[1].values == {"optim.lr": "0.03", "run.seed": "2"}
    last = {name: metrics(grid / name)[-1] for name in NAMES}
    assert values(grid) == {name: {20: last[name]["val/loss"]} for name in NAMES}
    assert [starts(grid / name) for name in NAMES] == [1] * 4


def test_a_sweep_that_is_killed_goes_on_and_ends_as_one_that_was_not(
    grid: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "lr"
    done: dict[str, int] = {}
    for alone in (True, False):  # the sweep's process, then that of its run too
        group = start_sweep(*words(data, folder, *GRID))
        moment = sum(steps(folder)) + random.randrange(3, 30)
        until(lambda moment=moment, group=group: sum(steps(folder)) >= moment or not group.running)
        pids = [holder.pid for name in NAMES if (holder := run_lock.current_holder(folder / name))]
        group.kill(signal.SIGKILL)
        for pid in [] if alone else pids:
            os.kill(pid, signal.SIGKILL)
        group.wait()
        done = {name: starts(folder / name) for name in sweep_file.read_results(folder)}
    ended = sweep(*words(data, folder, *GRID)).ok()
    assert f"`dnt report {folder}`" in ended.out
    for name in NAMES:
        assert metrics(folder / name) == metrics(grid / name)
        assert weights(folder / name) == weights(grid / name)
    assert values(folder) == values(grid)
    assert {name: starts(folder / name) for name in done} == done  # no finished run again
    again = sweep(*words(data, folder, *GRID)).ok()
    assert {name: starts(folder / name) for name in done} == done
    assert again.out == ended.out


def steps(folder: Path) -> list[int]:
    return [max(0, steps_written(folder / name)) for name in NAMES]


def test_halving_goes_on_with_the_best_as_if_they_had_not_stopped(
    grid: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "lr"
    sweep(*words(data, folder, *GRID), "--halving", "2").ok()
    at = {
        name: {
            line["step"]: line["val/loss"] for line in metrics(grid / name) if "val/loss" in line
        }
        for name in NAMES
    }
    two = sorted(NAMES, key=lambda name: at[name][5])[:2]
    best = min(two, key=lambda name: at[name][10])
    last = {name: 20 if name == best else 10 if name in two else 5 for name in NAMES}
    assert {name: steps_written(folder / name) for name in NAMES} == last
    for name in NAMES:
        assert metrics(folder / name) == metrics(grid / name)[: last[name] + 1]
    assert weights(folder / best) == weights(grid / best)
    assert values(folder) == {
        name: {step: at[name][step] for step in (5, 10, 20) if step <= last[name]} for name in NAMES
    }


def test_a_run_that_diverges_is_written_down_and_the_others_go_on(
    data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "lr"
    asked = words(data, folder, "optim.lr=1e9,0.1", "train.steps=6", "train.max_skipped=3")
    ended = sweep(*asked)
    assert ended.code == 1
    results = sweep_file.read_results(folder)
    bad, good = sorted(results)
    assert "non-finite loss" in results[bad].failed
    assert list(results[good].values) == [6]
    assert "failed: 1 of 2 runs; --retry-failed goes on with them" in ended.out
    assert sweep(*asked).code == 1
    assert starts(folder / bad) == 1
    assert sweep(*asked, "--retry-failed").code == 1
    assert (starts(folder / bad), starts(folder / good)) == (2, 1)


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lr"
    asked = words(data, folder, "optim.lr=0.03,0.1", "train.steps=2000", "checkpoint.every=0")
    group = start_sweep(*asked)
    until(lambda: steps_written(folder / "0-lr_0.03") > 2)
    group.kill(signal.SIGINT)
    ended = group.wait()
    assert ended.code == 130
    assert "stopped; the same command goes on with it" in ended.out
    assert weights(folder / "0-lr_0.03")
    assert not (folder / "1-lr_0.1").exists()
    assert values(folder) == {"0-lr_0.03": {}}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["optim.lr=0.1"], "no override has several values"),
        (["optim.lr=0.1,0.2", "run.dir=$GRID"], "is another sweep: it has optim.lr=0.03,0.1"),
        (["optim.lr=0.1,0.2", "run.dir=$GRID/0-lr_0.03-seed_1"], "is the folder of a run"),
        (["optim.lr=0.1,0.2", "eval.every=0"], "eval.every is 0, so no run has a val/loss"),
        (["optim.lr=0.1,0.2", "run.stop_at=3"], "run.stop_at: a sweep sets it by itself"),
        (["optim.lr=0.1,0.2", "optim.lrr=1"], "optim.lrr"),
        (["optim.lr=0.1,0.2", "--halving", "3"], "--halving 3: 2 runs of 20 steps have no"),
        (["train.steps=20,30", "--halving", "2"], "--halving compares runs at the same steps"),
        (["optim.lr=0.1,0.2", "--trials", "3"], "--trials: how many runs a sampler makes"),
        (["optim.lr=0.1,0.2", "--sampler", "tpe"], "say how many runs to make, --trials N"),
        (["optim.lr=interval(0.1,1)"], "a grid needs single values"),
        (["optim.lr=0.1,0.2", "cluster=gpu", "--halving", "2"], "a sweep on SLURM is a grid"),
    ],
)
def test_what_is_refused(
    grid: Path, data: Path, tmp_path: Path, more: list[str], says: str
) -> None:
    asked = [word.replace("$GRID", str(grid)) for word in more]
    assert says in dnt("sweep", *words(data, tmp_path / "lr", *asked)).error()
    assert not (tmp_path / "lr").exists()


def test_an_early_end_leaves_the_schedule_alone(grid: Path, data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    asked = tiny(data, run_dir, "run.seed=1", "optim.lr=0.03")
    ended = dnt("train", *asked, "run.stop_at=7").ok()
    assert "stopped at step 7 with a checkpoint, as run.stop_at asks" in ended.err
    dnt("train", *asked, "run.stop_at=7").ok()  # nothing is left to do
    assert steps_written(run_dir) == 7
    refused = dnt("train", *asked, "run.stop_at=6").error()
    assert "run.stop_at: this start is to end after step 6" in refused
    dnt("train", *asked).ok()
    assert metrics(run_dir) == metrics(grid / NAMES[0])
    assert weights(run_dir) == weights(grid / NAMES[0])


@pytest.mark.slow
def test_its_runs_are_one_family_in_mlflow(data: Path, tmp_path: Path) -> None:
    """With processes as `dnt sweep` starts them."""
    folder = tmp_path / "lr"
    uri = sqlite_store(tmp_path / "mlflow.db")
    asked = words(data, folder, "optim.lr=0.03,0.1", "train.steps=3", "tracking.enabled=true")
    dnt("sweep", *asked).ok()
    family = mlflow_runs(uri)
    assert set(family) == {"lr", "0-lr_0.03", "1-lr_0.1"}
    assert {run.info.status for run in family.values()} == {"FINISHED"}
    parent = family.pop("lr").info.run_id
    assert {run.data.tags["mlflow.parentRunId"] for run in family.values()} == {parent}
