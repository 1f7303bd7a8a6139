"""`eval.tasks`: tasks of the harness on checkpoints while a run trains, on real ranks."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import psutil
import pytest

from dnt_scale.cli.main import main
from dnt_scale.train import rank
from dnt_scale.train.hooks import eval_tasks
from testbed.run import IDLING, Finished, call, start, tiny, train
from testbed.waiting import until
from tests.helpers.harness_tasks import CHOICE, QUESTIONS, write_task

LIMIT = 3


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_task(tmp_path / "tasks", "own_choice", CHOICE, QUESTIONS)


def overrides(corpus: Path, run_dir: Path, task: Path, *more: str) -> list[str]:
    asked = [f"eval.tasks.names=[{task}]", "eval.tasks.every=2", f"eval.tasks.limit={LIMIT}"]
    short = ["train.steps=6", "checkpoint.every=2", "eval.every=0"]
    return tiny(corpus, run_dir, *short, *asked, *more)


def steps_told(finished: Finished, what: str) -> set[int]:
    """The steps of lines on eval.tasks that begin so."""
    return {int(step) for step in re.findall(rf"eval\.tasks: step (\d+): {what}", finished.err)}


def results(run_dir: Path, step: int) -> dict:
    """What was found of a step, without when."""
    found = json.loads((run_dir / "lm_eval" / f"step-{step:08d}.json").read_text())
    for each in found["tasks"].values():
        del each["time"]
    return found


def train_beside_others(overrides: list[str]) -> None:
    """`dnt_scale.train`, whose measurements get as much time as other tests: else they would wait
    for these.
    """
    eval_tasks.NICENESS = 0
    sys.exit(rank.main(overrides))


@pytest.mark.slow
def test_results_are_those_of_the_command(corpus: Path, tmp_path: Path, task: Path) -> None:
    run_dir = tmp_path / "run"
    chosen = overrides(corpus, run_dir, task, "checkpoint.keep=1")
    finished = call(train_beside_others, chosen, ranks=2).ok()
    lines = [json.loads(line) for line in (run_dir / "lm_eval.jsonl").read_text().splitlines()]
    measured = [line["step"] for line in lines]
    # the first is read while later ones take its place, and the last is waited for
    assert measured[0] == 2 and measured[-1] == 6
    left_out = steps_told(finished, "left out, for step 2 is still being measured")
    assert {*measured, *left_out} == {2, 4, 6} and not left_out & set(measured)
    assert steps_told(finished, "measured, see lm_eval.jsonl") == set(measured)
    assert 6 in steps_told(finished, "waiting until it is measured")
    assert "own_choice" in (run_dir / eval_tasks.LOG).read_text()

    by_hook = results(run_dir, 6)
    assert by_hook["tasks"]["own_choice"]["documents"] == LIMIT
    (run_dir / "lm_eval" / "step-00000006.json").unlink()
    command = ["lm-eval", str(run_dir), "--tasks", str(task), "--limit", str(LIMIT), "--step", "6"]
    assert main(command) == 0
    assert results(run_dir, 6) == by_hook


def at_work(run_dir: Path) -> list[int]:
    """The processes that measure a run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "lm-eval" in words and str(run_dir) in words:
            found.append(process.pid)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_training(
    corpus: Path, tmp_path: Path, task: Path, number: int
) -> None:
    run_dir = tmp_path / "run"
    more = ["train.steps=2000", "checkpoint.every=1", "eval.tasks.every=1"]
    group = start(overrides(corpus, run_dir, task, *more), env=IDLING)
    until(lambda: at_work(run_dir) or not group.running)
    (measuring,) = at_work(run_dir)
    assert os.getpgid(measuring) == measuring
    group.kill(number)
    finished = group.wait()
    assert finished.code == (128 + number if number == signal.SIGTERM else -number)
    until(lambda: not at_work(run_dir))
    assert not (run_dir / "lm_eval.jsonl").exists()  # it was ended, and did not end by itself
    if number == signal.SIGTERM:
        assert 1 in steps_told(finished, "not measured, for the run ends; `dnt lm-eval /")


@pytest.mark.slow
def test_a_measurement_that_fails_ends_no_run_and_a_missing_file_refuses_it(
    corpus: Path, tmp_path: Path, task: Path
) -> None:
    run_dir = tmp_path / "run"
    refused = train(overrides(corpus, run_dir, tmp_path / "no.yaml")).error()
    assert "eval.tasks.names: " in refused and "no.yaml: no such file" in refused
    assert not (run_dir / "checkpoints").exists()
    task.with_suffix(".jsonl").unlink()
    chosen = overrides(corpus, run_dir, task, "train.steps=4", "eval.tasks.every=4")
    finished = call(train_beside_others, chosen).ok()
    assert steps_told(finished, r"not measured: --tasks: .*; see logs/lm-eval\.log") == {4}
    assert not (run_dir / "lm_eval.jsonl").exists()
