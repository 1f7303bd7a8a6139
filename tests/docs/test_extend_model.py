"""docs/extend/model.md as it stands: its files put where it says, its commands run."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from testbed.run import metrics, python

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extend" / "model.md").read_text()


def files_on_the_page() -> dict[str, str]:
    """Each file that is shown under its name."""
    named = re.findall(r"^`([\w./]+)`[^\n]*:\n\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return dict(named)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The packages and configs with the page's files added, and nothing else changed."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("dnt_scale", "data_prep", "cluster", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in files_on_the_page().items():
        assert not (folder / name).exists()
        (folder / name).write_text(text)
    return folder


def test_the_page_shows_a_model_a_source_and_their_choices() -> None:
    assert set(files_on_the_page()) == {
        "dnt_scale/model/stripes.py",
        "dnt_scale/data/pictures.py",
        "configs/model/stripes.yaml",
        "configs/data/pictures.yaml",
    }


@pytest.mark.slow
def test_the_commands_train_resume_and_measure(tree: Path, tmp_path: Path) -> None:
    [block] = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    assert [words[:2] for words in commands] == [
        ["dnt", "train"],
        ["dnt", "train"],
        ["dnt", "eval"],
    ]
    env = {"PYTHONPATH": str(tree)}
    for _, command, *words in commands:
        more = (
            [f"run.dir={tmp_path}/first", "tracking.enabled=false", "run.device=cpu"]
            if command == "train"
            else []
        )
        words = [word.replace("runs/first", f"{tmp_path}/first") for word in words]
        said = python("-P", "-m", "dnt_scale.cli", command, *words, *more, env=env).ok()
    last = metrics(tmp_path / "first")[-1]
    assert (last["step"], last["pictures"]) == (60, 60 * 32)
    assert last["val/top1"] > 0.9 and last["val/loss"] < 0.5
    assert {line.split()[0] for line in said.out.splitlines()} == {"val/loss", "val/top1"}
    first = metrics(tmp_path / "first")[0]
    assert first["step"] == 0 and first["val/top1"] < 0.6
