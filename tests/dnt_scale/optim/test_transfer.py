"""`optim.scale`: learning rates of a small run, for this one, by powers that were worked out by
hand.
"""

from typing import Any

import pytest
from pydantic import ValidationError

from dnt_scale import config
from dnt_scale.config import ConfigError, OptimizerConfig
from dnt_scale.config.optim import GroupConfig
from dnt_scale.optim.algorithms.adamw import AdamWConfig
from dnt_scale.optim.algorithms.lion import LionConfig
from dnt_scale.optim.algorithms.msgdw import MSGDWConfig
from dnt_scale.optim.algorithms.signum import SignumConfig
from dnt_scale.optim.build import build_optimizer
from dnt_scale.optim.groups import parameter_groups
from dnt_scale.optim.transfer import Ratios, rates, ratios, scaled, told
from tests.helpers.optimizers import rule, tiny_model

GIVEN = ["run.name=x", "data.path=/x"]
RUN = ["model=dnt_nano", "model.width=128", "model.heads=2", "train.steps=100"]
FOUR_TIMES = Ratios(width=4.0, batch=4.0)
# What four times the width, and four times the batch, make of a matrix's learning rate.
EXPECTED: dict[str, tuple[dict[str, Any], float, float]] = {
    "plain": ({"update": "plain"}, 1.0, 4.0),
    "row_normalized": ({"update": "row_normalized", "tall_factor": True}, 1.0, 2.0),
    "tensor_normalized": ({"update": "tensor_normalized"}, 0.5, 2.0),
    "row_adaptive": ({"update": "row_adaptive"}, 0.5, 2.0),
    "row_column_normalized": ({"update": "row_column_normalized"}, 0.5, 2.0),
    "orthogonalized": ({"update": "orthogonalized"}, 2.0, 2.0),
    "as large as lr": ({"update": "orthogonalized", "scale": "rms"}, 1.0, 2.0),
    "as adamw": ({"update": "orthogonalized", "scale": "adamw"}, 1.0, 2.0),
}
MOMENTUM = MSGDWConfig(algorithm="msgdw", lr=1.0)
ELEMENTS = [
    AdamWConfig(algorithm="adamw", lr=1.0),
    LionConfig(algorithm="lion", lr=1.0),
    SignumConfig(algorithm="signum", lr=1.0),
]


@pytest.mark.parametrize("name", EXPECTED)
def test_each_rule_has_powers_of_its_own(name: str) -> None:
    section, width, batch = EXPECTED[name]
    found = rule(section)
    assert scaled(3.0, found, MOMENTUM, Ratios(width=4.0)) == 3.0 * width
    assert scaled(3.0, found, MOMENTUM, Ratios(batch=4.0)) == 3.0 * batch
    assert scaled(3.0, found, MOMENTUM, FOUR_TIMES) == 3.0 * width * batch
    assert scaled(3.0, found, MOMENTUM, FOUR_TIMES, matrix=False) == 3.0 * batch


@pytest.mark.parametrize("optim", ELEMENTS, ids=lambda optim: optim.algorithm)
def test_steps_of_elements_shrink_with_width(optim: OptimizerConfig) -> None:
    assert scaled(1.0, rule("plain"), optim, Ratios(width=4.0)) == 0.5
    assert scaled(1.0, rule("plain"), optim, Ratios(width=4.0), matrix=False) == 1.0
    assert scaled(1.0, rule("plain"), optim, Ratios(batch=0.25)) == 0.5


def test_a_longer_run_has_lower_rates() -> None:
    assert scaled(1.0, rule("plain"), MOMENTUM, Ratios(tokens=8.0)) == pytest.approx(0.514057)


def test_ratios_are_this_run_over_the_one_that_was_tuned() -> None:
    chosen = [*RUN, "optim.scale={width: 64, batch: 4096, tokens: 1e6}", "train.global_batch=32"]
    run = config.load([*GIVEN, *chosen])
    assert ratios(run, 256) == (2.0, 2.0, 100 * 32 * 256 / 1e6)
    run = config.load([*GIVEN, *RUN, "optim.scale.width=64"])
    assert ratios(run, 256) == (2.0, 1.0, 1.0)
    assert ratios(config.load([*GIVEN, *RUN]), 256) is None


def test_groups_are_scaled_each_by_its_rule_and_told_in_a_line() -> None:
    groups = {
        "rows": {"pattern": "tok_emb", "update": "row_normalized", "lr": 0.02},
        "adam": {"pattern": "norm_|w_q", "lr": 8e-3, "optimizer": {"algorithm": "adamw"}},
        "muon": {"pattern": "w_2", "update": "orthogonalized"},
    }
    raw = {"algorithm": "msgdw", "lr": 1.0, "groups": groups, "scale": {"width": 4, "batch": 9}}
    section = MSGDWConfig.model_validate(raw)
    # all of the tiny model's gains are in norms
    found = parameter_groups(tiny_model().named_parameters(), section, FOUR_TIMES)
    expected = {
        "rows": (0.02, 0.04),
        "adam": (8e-3, 8e-3),
        "adam.vectors": (8e-3, 16e-3),
        "muon": (1.0, 4.0),
        "default": (1.0, 4.0),
    }
    assert rates(found) == expected
    assert all(group["base_lr"] == group["lr"] for group in found)
    assert told(rates(found)) == (
        "learning rates by optim.scale: rows 0.02 -> 0.04, adam 0.008 -> 0.008, "
        "adam.vectors 0.008 -> 0.016, muon 1 -> 4, default 1 -> 4"
    )
    optimizer = build_optimizer(tiny_model().named_parameters(), section, 1, FOUR_TIMES)
    assert optimizer.defaults["lr"] == 4.0


REFUSED: dict[str, tuple[list[str], str]] = {
    "no width": (["optim.scale.width=0"], "optim.scale.width.*greater than 0"),
    "half a token": (["optim.scale.tokens=0.5"], "optim.scale.tokens"),
    "a depth": (["optim.scale={depth: 6}"], "optim.scale.depth"),
    "a run of less than a step": (
        ["optim.scale={batch: 4096, tokens: 1000}"],
        "batch is 4,096 tokens a step, but tokens, those of all steps, is 1,000; give tokens of",
    ),
    "a rule that says nothing": (
        ["optim=sgd_ll", "optim.scale.width=64"],
        r"learning rate of capped \(group head\) goes with width and batch is not known; remove",
    ),
    "of a group": (
        ["optim=muon", "optim.groups.rest.optimizer.scale={width: 64}"],
        "scale is the run's: set optim.scale instead",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nonsense_is_refused_in_a_line(case: str) -> None:
    overrides, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as refused:
        config.load([*GIVEN, *RUN, *overrides])
    assert "\n" not in str(refused.value)


def test_an_algorithm_that_states_no_powers_is_refused() -> None:
    class Unknown(AdamWConfig):
        def powers(self, rule: GroupConfig) -> None:
            return None

    with pytest.raises(ValidationError, match=r"of adamw \(group default\) goes with width and"):
        Unknown.model_validate({"algorithm": "adamw", "lr": 1, "scale": {"tokens": 9}})


def test_a_model_without_a_width_is_not_scaled_by_it() -> None:
    run = config.load([*GIVEN, *RUN, "optim.scale.width=64"])
    other = run.model_copy(update={"model": run.model.model_copy(update={"width": None})})
    with pytest.raises(ConfigError, match=r"has no width; remove optim\.scale\.width"):
        ratios(other, 256)
