"""docs/extend/hook.md: the worked example, run as it stands on the page in a copy of the
packages.
"""

import re
import shutil
from pathlib import Path

import pytest
import torch

from dnt_scale.distributed.device_metrics import take
from testbed.run import metrics, python, synthetic_set, tensors, tiny

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "extend" / "hook.md"


def blocks() -> list[str]:
    """The pieces of code on the page, in their order; a line of a tuple alone is no Python."""
    return re.findall(r"```(?:python|text)\n(.*?)```", PAGE.read_text(), re.DOTALL)


def put_before(file: Path, place: str, text: str) -> None:
    """Insert lines before the first one that begins with ``place``."""
    before, found, after = file.read_text().partition(f"\n{place}")
    assert found, f"{file} has no line {place}"
    file.write_text(f"{before}\n{text}{found.lstrip(chr(10))}{after}")


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A folder with the packages, in which somebody has followed the page."""
    for name in ("dnt_scale", "data_prep", "cluster", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    hook, hook_import, line, section, field, test, _ = blocks()
    compile(test, str(PAGE), "exec")
    hooks = tmp_path / "dnt_scale" / "train" / "hooks"
    (hooks / "near_zero.py").write_text(hook)
    put_before(hooks / "__init__.py", "from dnt_scale.train.hooks.profiler", hook_import)
    put_before(hooks / "__init__.py", "    Records,", line)
    sections = tmp_path / "dnt_scale" / "config" / "hooks.py"
    sections.write_text(f"{sections.read_text()}\n\n{section}")
    run = tmp_path / "dnt_scale" / "config" / "run.py"
    put_before(
        run, "from dnt_scale.config.hooks", "from dnt_scale.config.hooks import NearZeroSection\n"
    )
    put_before(run, "    health: HealthSection", f"    {field.lstrip()}")
    return tmp_path


@pytest.mark.slow
def test_the_hook_of_the_page(extended, tmp_path):
    data = synthetic_set(tmp_path / "set")
    here = {"PYTHONPATH": str(extended)}
    overrides = tiny(
        data,
        tmp_path / "run",
        "checkpoint.every=1",
        "checkpoint.keep=9",
        "eval.every=0",
        "train.steps=4",
    )
    overrides += ["near_zero.every=2", "near_zero.below=0.01"]
    python("-P", "-m", "dnt_scale.train", *overrides, env=here).ok()
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "weights/near_zero" in line] == [2, 4]
    before = tensors(tmp_path / "run" / "checkpoints" / "step-00000003")
    weights = torch.cat(
        [value.flatten() for name, value in before.items() if name.startswith("model.")]
    )
    assert lines[-1]["weights/near_zero"] == pytest.approx(
        (weights.abs() < 0.01).double().mean().item(), rel=1e-12
    )
    wrong = python("-P", "-m", "dnt_scale.train", *overrides, "near_zero.evry=1", env=here).error()
    assert "near_zero.evry: no such field; did you mean near_zero.every?" in wrong


def test_the_line_of_a_model():
    take(torch.device("cpu"))  # what models of other tests have recorded in this process
    exec(blocks()[-1], {"logits_BTV": torch.tensor([[[1.0, -3.0, 2.0]]])})
    names, sums = take(torch.device("cpu"))
    assert names == ["logits/largest"] and sums.tolist() == [[3, 1]]
