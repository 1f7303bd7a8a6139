"""Values that Optuna's samplers choose, and what is said where it is not installed."""

import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from dnt_scale.config import ConfigError
from dnt_scale.sweep import here, sampling, sweep_file
from dnt_scale.sweep.combinations import read_override
from dnt_scale.sweep.sweep_file import Asked, Result
from testbed.run import synthetic_set, tiny

CHOICES = [
    read_override(line)
    for line in (
        "train.steps=7",
        "optim.lr=tag(log,interval(0.01,1))",
        "train.global_batch=int(interval(2,9))",
        "optim.momentum=0.8,0.9",
    )
]
optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="optuna is not installed")


def test_without_optuna_the_command_that_installs_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'dnt-scale\[sweep\]'"):
        sampling.check(CHOICES, "tpe")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("optim.lr=0.1", "no override leaves a choice"),
        ("run.seed=1,2", "a sampler would choose the luckiest seed"),
    ],
)
def test_what_is_nothing_to_choose_from(line: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sampling.check([read_override(line)], "random")


@optuna
@pytest.mark.parametrize("line", ["a=tag(log,interval(0,1))", "a=interval(2,1)"])
def test_an_interval_that_is_none_is_named(line: str) -> None:
    with pytest.raises(ConfigError) as error:
        sampling.propose([read_override(line)], "random", [], 0)
    assert str(error.value).startswith(f"{line}: ")


@optuna
@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_trial_is_a_function_of_its_number_and_of_those_before(sampler: str) -> None:
    history: list[tuple[list[str], float]] = []
    for number in range(15):
        chosen = sampling.propose(CHOICES, sampler, history, number)
        assert chosen == sampling.propose(CHOICES, sampler, history, number)
        lr, batch, momentum = chosen
        assert 0.01 <= float(lr) <= 1
        assert 2 <= int(batch) <= 9
        assert momentum in ("0.8", "0.9")
        history.append((chosen, math.inf if number == 3 else abs(math.log10(float(lr)) + 1)))
    assert len({values[0] for values, _ in history}) > 10


@optuna
def test_tpe_draws_near_what_was_good() -> None:
    """In decades from the best, its last trials are nearer than random ones."""
    apart = {}
    for sampler in ("random", "tpe"):
        history: list[tuple[list[str], float]] = []
        for number in range(40):
            chosen = sampling.propose(CHOICES[1:2], sampler, history, number)
            history.append((chosen, abs(math.log10(float(chosen[0])) + 1.5)))
        apart[sampler] = sum(loss for _, loss in history[20:]) / 20
    assert apart["tpe"] < 0.6 * apart["random"]


@optuna
def test_trials_follow_from_what_is_recorded(tmp_path: Path) -> None:
    """A sweep that is opened again has the trials that it had, and goes on as it would have."""
    data, folder = synthetic_set(tmp_path / "set"), tmp_path / "lr"
    asked = Asked(
        overrides=tiny(data, folder, "run.name=lr", "optim.lr=tag(log,interval(0.01,1))"),
        sampler="tpe",
    )

    def train(sweep: here.Here, part: tuple[str, int]) -> None:
        name, stop = part
        lr = float(next(run for run in sweep.sweep.runs if run.name == name).values["optim.lr"])
        sweep.results[name] = Result(values={stop: lr})

    def all_of(reopens: Callable[[int], bool]) -> list[str]:
        sweep = here.opened(asked, 5, 1)
        sweep.folder.mkdir()
        sweep_file.write_sweep(sweep.folder, sweep.sweep)
        for number in range(5):
            if reopens(number):
                sweep_file.write_results(sweep.folder, sweep.results)
                sweep = here.opened(asked, 5, 1)
                sweep.results = sweep_file.read_results(sweep.folder)
            part = here.next_of(sweep)
            assert part
            train(sweep, part)
        assert here.next_of(sweep) is None
        folder.rename(tmp_path / f"{len(list(tmp_path.iterdir()))}")
        return [run.name for run in sweep.sweep.runs]

    undisturbed = all_of(lambda number: False)
    assert len(set(undisturbed)) == 5
    assert all_of(lambda number: True) == undisturbed
