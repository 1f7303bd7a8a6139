"""The bench of training speed, and its script for GPUs, as a toy on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.run import ENVIRONMENT, python, synthetic_set

ROOT = Path(__file__).parent.parent
PARTS = {"forward", "loss", "backward", "optimizer", "host"}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_set(tmp_path_factory.mktemp("made_up") / "set")


def test_the_script_for_gpus_as_a_toy(made_up: Path, tmp_path: Path) -> None:
    env = {**os.environ, **ENVIRONMENT, "TOY": "1", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh")],
        env=env | {"DATA": str(made_up), "OUT": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== 1.4b-fp8 is left out: " in done.stdout
    results = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert {name.removeprefix("train_speed-gpu-") for name in results} == {
        "124m",
        "774m",
        "1.4b-eager",
        "1.4b",
    }
    for result in results.values():
        for row in result["rows"]:
            assert row["tokens_per_s"] > 0 and row["memory_gb"] > 0
            assert row["split_s"].keys() >= PARTS
            assert all(seconds >= 0 for seconds in row["split_s"].values())
        first = next(row for row in result["rows"] if row["run"] == result["against"])
        assert first["speed_by_clock"] == first["speed_by_processor_time"] == 1.0
    rows = results["train_speed-gpu-124m"]["rows"]
    assert "peer, eager" in [row["run"] for row in rows]
    assert all(row["split_s"]["data wait"] >= 0 for row in rows if "peer" not in row["run"])


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (["model=no_such"], "no_such"),  # in one line, before anything is started
        (["model=dnt_nano", "train.steps=4"], "ended with status"),  # before its last turn
    ],
)
def test_a_run_that_cannot_go_on_ends_the_bench(made_up: Path, run: list[str], said: str) -> None:
    tiny = ["model.layers=1", "model.width=32", "model.heads=2"] if len(run) > 1 else []
    few = ["--turns", "4", "--turn-steps", "1", "--global-batch", "2", "--micro-batch", "2"]
    done = python(
        *("-m", "benchmarks.train_speed", "--data", made_up, "--dtype", "fp32", *few),
        *("--run", *run, *tiny),
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.code != 0 and said in done.err


def test_the_same_run_twice_is_refused(made_up: Path) -> None:
    twice = ["--run", "model=dnt_nano", "--run", "model=dnt_nano"]
    done = python("-m", "benchmarks.train_speed", "--data", made_up, *twice)
    assert done.code == 2 and "--run: two are the same" in done.err
