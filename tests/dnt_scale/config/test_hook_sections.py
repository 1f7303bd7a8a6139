"""The sections of hooks: the window to profile, tasks, and that runs of before them still read."""

import sys
from pathlib import Path

import pytest
import yaml

from dnt_scale.config import ConfigError, load, to_yaml, validate
from dnt_scale.config.hooks import ProfileSection, TasksSection, check_tasks, check_window

MINIMAL = ["run.name=try", "data.path=shards"]
EXPECTED = "expected FIRST..LAST, two steps of which the first is 1 or later, such as 10..12"


@pytest.mark.parametrize(
    ("typed", "steps"), [("null", []), ("10..12", [10, 11, 12]), ("1..1", [1]), ("007..8", [7, 8])]
)
def test_a_window(typed: str, steps: list[int]) -> None:
    assert list(load([*MINIMAL, f"profile.steps={typed}"]).profile.window) == steps


@pytest.mark.parametrize(
    "typed",
    [
        "10",
        "10-12",
        "10...12",
        "10..",
        "..12",
        "a..b",
        "0..3",
        "-1..3",
        "1.5..3",
        "[1, 2]",
        "1..2..3",
        "٣..٤",
    ],
)
def test_what_is_no_window(typed: str) -> None:
    with pytest.raises(ConfigError, match=r"profile\.steps: ") as caught:
        load([*MINIMAL, f"profile.steps={typed}"])
    assert EXPECTED in str(caught.value) and "\n" not in str(caught.value)


def test_a_window_that_ends_before_it_begins() -> None:
    with pytest.raises(
        ConfigError, match=r"the window ends before it begins; expected FIRST..LAST.*'12\.\.10'"
    ):
        load([*MINIMAL, "profile.steps=12..10"])


def test_a_window_lies_within_the_run() -> None:
    check_window(ProfileSection(), 5)
    check_window(ProfileSection(steps="4..5"), 5)
    with pytest.raises(
        ConfigError, match=r"the window 4\.\.6 ends after the run's last step, 5; give steps"
    ):
        check_window(ProfileSection(steps="4..6"), 5)


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        (["checkpoint.every=100"], "every is 150, but .* checkpoint.every is 100; expected a mult"),
        (["checkpoint.every=0"], "checkpoint.every is 0; expected a multiple"),
        (["checkpoint.every=50", "eval.tasks.names=[]"], "eval.tasks.names is empty; name tasks"),
        (["checkpoint.every=50", "model=vit_b16"], "model.kind is vit, which is no language model"),
    ],
)
def test_tasks_that_can_never_be_measured(typed: list[str], problem: str) -> None:
    tasks = ["eval.tasks.every=150", "eval.tasks.names=[arc_easy]"]
    assert load([*MINIMAL, *tasks, "checkpoint.every=50"]).eval.tasks.names == ["arc_easy"]
    with pytest.raises(ConfigError, match=problem) as caught:
        load([*MINIMAL, *tasks, *typed])
    assert "\n" not in str(caught.value)


def test_tasks_need_their_file_and_the_harness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = str(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match=r"eval\.tasks\.names: .*no\.yaml: no such file"):
        check_tasks(TasksSection(names=["arc_easy", absent], every=1))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"eval\.tasks: .*pip install 'dnt-scale\[eval\]'"):
        check_tasks(TasksSection(names=["arc_easy"], every=1))
    check_tasks(TasksSection(names=[absent]))


def test_a_run_from_before_there_were_these_sections_still_reads() -> None:
    run = load(MINIMAL)
    raw = yaml.safe_load(to_yaml(run))
    for section in ("profile", "garbage", "measure", "diagnose"):
        del raw[section]
    del raw["eval"]["tasks"]
    assert validate(raw) == run
