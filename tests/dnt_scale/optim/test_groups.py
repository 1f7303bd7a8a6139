"""Which parameters get which learning rate, weight decay and update."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dnt_scale.config import ConfigError, OptimizerConfig
from dnt_scale.optim.algorithms.msgdw import MSGDWConfig
from dnt_scale.optim.groups import parameter_groups
from tests.helpers.optimizers import drive, new_optimizer, tensors, tiny_model

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


def msgdw_config(groups: dict[str, dict[str, object]], **changes: object) -> MSGDWConfig:
    return MSGDWConfig.model_validate(
        {"algorithm": "msgdw", "lr": 1.0, "weight_decay": 0.1, "groups": groups, **changes}
    )


def groups_of(config: OptimizerConfig) -> list[dict]:
    return parameter_groups(tiny_model().named_parameters(), config)


def by_name(groups: list[dict]) -> dict[str, dict]:
    return {name: group for group in groups for name in group["names"]}


BAD_GROUPS = {
    "no match": (
        {"head": {"pattern": "lm_head"}},
        r"optim\.groups\.head\.pattern.*'lm_head' matches no parameter",
    ),
    "no regex": ({"bad": {"pattern": "tok_emb("}}, r"optim\.groups\.bad\.pattern.*not a regex"),
    "overlap": (
        {"emb": {"pattern": "emb"}, "tok": {"pattern": "^tok_"}},
        r"tok_emb\.weight is matched by emb and tok",
    ),
    "nothing left": (
        {"all": {"pattern": "."}, "rest": {"pattern": None}},
        r"optim\.groups\.rest\.pattern: null, but others leave no parameter",
    ),
    "row on a vector": (
        {"gains": {"pattern": r"norm_in\.gain", "update": "row_normalized"}},
        r"optim\.groups\.gains.*row_normalized needs matrices.*norm_in\.gain.*\(16,\)",
    ),
    "row on a block": (
        {"block": {"pattern": r"^blocks\.0\.", "update": "row_normalized"}},
        r"optim\.groups\.block.*needs matrices.*gain",
    ),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_groups_that_cannot_be_name_the_field(case: str) -> None:
    groups, message = BAD_GROUPS[case]
    with pytest.raises(ConfigError, match=message):
        groups_of(msgdw_config(groups))
    with pytest.raises(ConfigError, match=message):
        new_optimizer(tiny_model().named_parameters(), msgdw_config(groups), seed=1)


def test_without_groups_only_matrices_are_decayed() -> None:
    groups = groups_of(msgdw_config({}))
    shapes = {name: p.shape for name, p in tiny_model().named_parameters()}
    assert by_name(groups).keys() == shapes.keys()
    for name, group in by_name(groups).items():
        assert group["weight_decay"] == (0.1 if len(shapes[name]) >= 2 else 0.0), name
        assert (group["lr"], group["base_lr"], group["update"].update) == (1.0, 1.0, "plain")


def test_a_groups_own_values_are_used_and_zero_is_a_value() -> None:
    config = msgdw_config(
        {
            "embedding": {
                "pattern": r"^tok_emb\.",
                "update": "row_normalized",
                "lr": 0.05,
                "weight_decay": 0.0,
            },
            "first": {"pattern": r"^blocks\.0\.", "lr": 0.0, "weight_decay": 0.3},
            "mid": {"pattern": r"^blocks\.1.*norm_mid"},
        }
    )
    groups = by_name(groups_of(config))
    values = {
        name: (g["lr"], g["base_lr"], g["weight_decay"], g["update"].update)
        for name, g in groups.items()
    }
    assert values["tok_emb.weight"] == (0.05, 0.05, 0.0, "row_normalized")
    assert values["blocks.0.ffn.w_1.weight"] == (0.0, 0.0, 0.3, "plain")
    # never decayed, whatever the group says
    assert values["blocks.0.norm_pre1.gain"] == (0.0, 0.0, 0.0, "plain")
    assert values["blocks.1.norm_mid1.gain"] == (1.0, 1.0, 0.0, "plain")
    assert values["blocks.1.ffn.w_1.weight"] == values["pos_emb.weight"] == (1.0, 1.0, 0.1, "plain")

    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    drive(new_optimizer(model.named_parameters(), config, seed=1), list(model.parameters()), 1)
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    assert not any(change.any() for name, change in moved.items() if name.startswith("blocks.0."))
    torch.testing.assert_close(
        moved["tok_emb.weight"].norm(dim=1), torch.full((23,), 0.05), rtol=1e-4, atol=0
    )
    gradients = dict(zip(moved, tensors([p.shape for p in model.parameters()], 0), strict=True))
    torch.testing.assert_close(moved["norm_in.gain"], -gradients["norm_in.gain"])


def test_a_group_without_a_pattern_takes_what_others_leave() -> None:
    config = msgdw_config({"rest": {"pattern": None, "lr": 0.3}, "emb": {"pattern": "_emb"}})
    for name, group in by_name(groups_of(config)).items():
        assert (group["label"], group["lr"]) == (("emb", 1.0) if "_emb" in name else ("rest", 0.3))


def test_a_second_group_without_a_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="groups a and b have no pattern"):
        msgdw_config({"a": {"pattern": None}, "b": {"pattern": None}})


PATTERNS = [
    "emb",
    "^tok_",
    r"\.w_[qk]\.",
    r"w_v",
    r"^blocks\.0\.",
    r"^blocks\.1\.ffn",
    "norm",
    r"gain$",
    "nothing",
    "w_o",
]


@PROPERTY
@given(chosen=st.lists(st.sampled_from(PATTERNS), max_size=4))
def test_every_parameter_is_in_exactly_one_group_or_it_raises(chosen: list[str]) -> None:
    shapes = {name: p.ndim for name, p in tiny_model().named_parameters()}
    matches = {
        name: [i for i, pattern in enumerate(chosen) if re.search(pattern, name)] for name in shapes
    }
    overlap = any(len(found) > 1 for found in matches.values())
    unused = set(range(len(chosen))) - {i for found in matches.values() for i in found}
    config = msgdw_config(
        {f"g{i}": {"pattern": pattern, "lr": 2.0 + i} for i, pattern in enumerate(chosen)}
    )
    if overlap or unused:
        with pytest.raises(ConfigError, match=r"optim\.groups"):
            groups_of(config)
        return
    groups = groups_of(config)
    listed = [name for group in groups for name in group["names"]]
    assert sorted(listed) == sorted(shapes)
    assert sum(len(group["params"]) for group in groups) == len(shapes)
    for name, group in by_name(groups).items():
        assert group["lr"] == (2.0 + matches[name][0] if matches[name] else 1.0)
        assert (group["weight_decay"] > 0) == (shapes[name] >= 2)


def test_names_and_params_stay_in_step() -> None:
    model = tiny_model()
    named = dict(model.named_parameters())
    for group in parameter_groups(named.items(), msgdw_config({"ffn": {"pattern": "ffn"}})):
        assert all(
            named[name] is p for name, p in zip(group["names"], group["params"], strict=True)
        )


def test_build_optimizer_passes_every_field_on() -> None:
    config = msgdw_config({}, momentum=0.8, dampening=0.4, nesterov=True)
    optimizer = new_optimizer(tiny_model().named_parameters(), config, seed=1)
    assert optimizer.algorithm is config
    assert (config.momentum, config.dampening, config.nesterov) == (0.8, 0.4, True)
