"""docs/extend/tracker.md: its files, as they stand there, in a copy of the packages."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.run import tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "extend" / "tracker.md"
# `path/of/the/file`:, an empty line, and its content between fences
FILE = re.compile(r"^`([^`\n]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what runs, with the page's files in it."""
    copy = tmp_path_factory.mktemp("extended")
    for folder in ("dnt_scale", "data_prep", "cluster", "configs", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    files = FILE.findall(PAGE.read_text())
    assert [Path(name).suffix for name, _ in files] == [".py", ".yaml", ".py"]
    for name, text in files:
        assert not (copy / name).exists()
        (copy / name).write_text(text)
    return copy


def here(folder: Path, *command: str) -> None:
    """Run a command in a folder, with its packages before all others."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pages_test_passes(extended: Path) -> None:
    here(
        extended,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "tests/dnt_scale/record/test_csv_file.py",
    )


def test_a_run_fills_the_tracker_and_a_resumed_one_goes_on(
    extended: Path, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "tiny"
    for steps in (6, 9):
        more = ("tracking=csv_file", "tracking.enabled=true", f"train.steps={steps}")
        here(extended, "-m", "dnt_scale.train", *tiny(corpus, run_dir, *more))
    with (run_dir / "csv_file" / "points.csv").open(newline="") as file:
        steps_shown = [int(step) for step, name, *_ in csv.reader(file) if name == "train/loss"]
    assert steps_shown == list(range(1, 10))
    assert not (run_dir / "logs" / "mlflow.json").exists()


def test_the_new_code_is_as_tidy_as_the_old(extended: Path) -> None:
    new = [name for name, _ in FILE.findall(PAGE.read_text()) if name.endswith(".py")]
    here(extended, "-m", "ruff", "check", *new)
