"""Runs that commit c4e2237 began and that this one ends, one of each engine.

`tests/golden/c4e2237/make_runs.py` made them on 2 ranks: each folder was killed after step 5 of 6,
with a checkpoint of step 3, and NAME.jsonl holds the metrics of the same run when nothing killed
it.
"""

import json
import shutil
from pathlib import Path

import pytest

from dnt_scale.checkpoint import read_state
from testbed.run import train

GOLDEN = Path(__file__).parents[2] / "golden" / "c4e2237"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.jsonl"))
EXACT = {"step", "tokens", "skipped", "lr"}


def lines(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_there_is_one_of_each_engine():
    assert {name.partition("-")[0] for name in NAMES} == {
        *("ddp", "fsdp", "hsdp"),
        *("zero0", "zero1", "zero2", "zero3"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_goes_on_as_it_would_have_then(name, tmp_path):
    run_dir = tmp_path / name
    shutil.copytree(GOLDEN / name, run_dir, symlinks=True)
    assert read_state(run_dir / "checkpoints" / "step-00000003").step == 3
    finished = train(
        [
            *("run.device=cpu", "tracking.enabled=false", "eval.every=3", "eval.rows=4"),
            *("train.global_batch=4", "train.steps=6"),
            *(f"run.dir={run_dir}", f"run.name={name}", f"data.path={GOLDEN / 'set'}"),
            *(
                "model=dnt_nano",
                "model.vocab_size=512",
                "model.context=64",
                f"engine={name.partition('-')[0]}",
            ),
            *(["engine.replicas=2"] if name.startswith("hsdp") else []),
        ],
        ranks=2,
    ).ok()
    assert "steps 4 to 5 came after the newest checkpoint and are done again" in finished.err
    found, expected = lines(run_dir / "metrics.jsonl"), lines(GOLDEN / f"{name}.jsonl")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for now, then in zip(found, expected, strict=True):
        for key in then.keys() - {"time", "tokens_per_s"}:
            tolerance = 0.0 if key in EXACT else 1e-5  # another processor rounds otherwise
            assert now[key] == pytest.approx(then[key], rel=tolerance), (then["step"], key)
