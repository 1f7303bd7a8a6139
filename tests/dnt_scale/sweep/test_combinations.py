"""What the overrides of a sweep mean: combinations, and the runs' names and folders."""

from pathlib import Path

import pytest

from dnt_scale.config import ConfigError
from dnt_scale.sweep.combinations import combinations, expand_sweep, name_runs
from testbed.run import tiny


def test_combinations_are_the_product_in_the_order_given() -> None:
    found = combinations(
        ["model=dnt_nano", "optim.lr=0.3,1", "run.seed=range(1,3)", "+optim.groups={}"]
    )
    assert [values for values, _ in found] == [
        {"optim.lr": "0.3", "run.seed": "1"},
        {"optim.lr": "0.3", "run.seed": "2"},
        {"optim.lr": "1", "run.seed": "1"},
        {"optim.lr": "1", "run.seed": "2"},
    ]
    assert found[1][1] == ["model=dnt_nano", "optim.lr=0.3", "run.seed=2", "+optim.groups={}"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optim.lr=1"], "no override has several values"),
        (["optim.lr=interval(0,1)"], "optim.lr=interval(0,1): a grid needs single values"),
        (["optim.lr=1,2", "--x"], "--x: "),
        (
            ["run.seed=range(0,40)", "optim.lr=range(0,40)"],
            "1,600 combinations of values, at most 1,000",
        ),
    ],
)
def test_what_is_no_sweep(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        combinations(overrides)
    assert says in str(error.value)


def test_names_are_valid_unique_and_tell_the_values() -> None:
    values = [{"optim.lr": lr, "data.path": "/sets/a b"} for lr in ("0.3", "0.3")]
    assert name_runs(values) == ["0-lr_0.3-path__sets_a_b", "1-lr_0.3-path__sets_a_b"]
    assert name_runs([{"a.lr": "1", "b.lr": "2"}] * 11)[10] == "10-a.lr_1-b.lr_2"


def test_runs_have_their_own_folders_and_one_store(tmp_path: Path) -> None:
    overrides = tiny(
        tmp_path / "set", Path("runs/lrs"), "optim.lr=1,3", "checkpoint.dir=s3://bucket/lrs/"
    )
    found, runs = expand_sweep(overrides)
    names = ["0-lr_1", "1-lr_3"]
    assert found.name == "tiny"
    assert [run.name for run in found.runs] == [run.run.name for run in runs] == names
    assert [run.run.dir for run in runs] == [Path("runs/lrs").absolute() / name for name in names]
    assert [run.checkpoint.dir for run in runs] == [f"s3://bucket/lrs/{name}" for name in names]
    assert {run.tracking.uri for run in runs} == {f"sqlite:///{Path('runs').absolute()}/mlflow.db"}
    assert [run.optim.lr for run in runs] == [1.0, 3.0]


def test_the_name_is_the_sweeps(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.name and run\.dir are the sweep's"):
        expand_sweep(tiny(tmp_path / "set", tmp_path / "run", "run.name=a,b"))
