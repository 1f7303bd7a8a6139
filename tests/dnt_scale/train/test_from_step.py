"""`dnt train --from-step`: a run goes on from before its newest checkpoint."""

import json
import shutil
from pathlib import Path

import pytest

from dnt_scale.config import ConfigError
from dnt_scale.tools.harness.evaluate import Measured, keep
from dnt_scale.train.rank import main
from testbed.run import metrics, synthetic_set, tiny, train
from tests.helpers.start import start


def evaluated(folder: Path) -> tuple[list[int], list[str]]:
    """The steps of a folder's lines of evaluations, and its files of them."""
    lines = (folder / "lm_eval.jsonl").read_text().splitlines()
    files = sorted(path.name for path in (folder / "lm_eval").iterdir())
    return [json.loads(line)["step"] for line in lines], files


def test_a_longer_run_goes_on_from_before_its_decay(tmp_path):
    """Of 10 steps the last 4 decay. With 14 it goes on from step 6, or from before it."""
    run_dir = tmp_path / "run"
    given = tiny(
        synthetic_set(tmp_path / "set"),
        run_dir,
        "optim.schedule.name=wsd",
        "optim.schedule.decay_fraction=0.4",
        "checkpoint.every=3",
        "checkpoint.keep=9",
        "eval.every=0",
    )
    train([*given, "train.steps=10"]).ok()
    before = metrics(run_dir)
    for step in (10, 3):
        keep(run_dir, step, {}, {"own": Measured({"acc": step}, "1", 0, 1, 1)})
    longer = [*given, "train.steps=14"]
    hint = "the learning rate has decayed since step 6; --from-step 6 goes on from before that"
    assert hint in start(longer) and hint not in start(longer, from_step=10)
    done = train([*longer, "--from-step=10"]).ok()
    assert "the learning rate decayed after step 6: --from-step is 6" in done.err
    assert "resuming from" in done.err and "step-00000006" in done.err
    (aside,) = run_dir.glob("before-*")
    assert metrics(aside) == before
    assert sorted(path.name for path in (aside / "checkpoints").glob("step-*")) == [
        "step-00000009",
        "step-00000010",
    ]
    kept, moved = (evaluated(folder) for folder in (run_dir, aside))  # trackers are sent those kept
    assert kept == ([3], ["step-00000003.json"]) and moved == ([10, 3], ["step-00000010.json"])
    straight = tmp_path / "straight"
    train([*given, "train.steps=14", f"run.dir={straight}"]).ok()
    assert metrics(run_dir) == metrics(straight)
    assert metrics(run_dir)[:6] == before[:6]
    for step in (3, 6):
        shutil.rmtree(run_dir / f"checkpoints/step-{step:08d}")
    with pytest.raises(
        ConfigError, match=r"^--from-step: .* has no checkpoint of step 8 or before"
    ):
        start([*given, "train.steps=20"], from_step=12)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--from-step=soon"], "--from-step: found 'soon', expected a step, such as 800"),
        (["--from-step=3", "--fresh"], "--from-step: goes on with a run, and --fresh begins one"),
    ],
)
def test_an_earlier_step_is_a_number_and_of_a_run_that_goes_on(words, said, tmp_path, capsys):
    assert main([*tiny(tmp_path / "set", tmp_path / "run"), *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")
