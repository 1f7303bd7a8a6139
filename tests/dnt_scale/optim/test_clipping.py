"""Clipping by group: what is bounded together, by what factors, and what is refused."""

import math

import pytest
import torch
from pydantic import ValidationError

from dnt_scale.config import OptimizerConfig
from dnt_scale.engine.accumulate_then_step import scale
from dnt_scale.optim.algorithms.msgdw import MSGDWConfig
from dnt_scale.optim.clipping import bounds, factors
from tests.helpers.optimizers import tensors

NAMES = ["emb", "w.a", "w.b", "gain", "head", "bias"]
GROUPS = {
    "emb": {"pattern": "emb", "clip": "group", "clip_norm": 0.5},
    "w": {"pattern": "w", "clip": "group"},
    "gain": {"pattern": "gain", "clip": "none"},
    "head": {"pattern": "head", "clip": "global"},
}


def section(groups: dict[str, dict[str, object]], **changes: object) -> OptimizerConfig:
    raw = {"algorithm": "msgdw", "lr": 1.0, "clip_norm": 2.0, "groups": groups}
    return MSGDWConfig.model_validate(raw | changes)


def test_each_group_is_clipped_as_it_says() -> None:
    """Against a computation that is written out: norms of emb, of both w, of head and bias."""
    grads = [8.0 * g for g in tensors([(7,), (3, 4), (5,), (6,), (2, 2), (3,)], 1, torch.float64)]
    emb, a, b, gain, head, bias = (grad.clone() for grad in grads)
    w_norm = math.sqrt(float((a * a).sum() + (b * b).sum()))
    rest_norm = math.sqrt(float((head * head).sum() + (bias * bias).sum()))
    assert min(float(emb.norm()), w_norm, rest_norm) > 2.0
    expected = [
        emb * 0.5 / emb.norm(),
        *(each * 2.0 / w_norm for each in (a, b)),
        gain,
        *(each * 2.0 / rest_norm for each in (head, bias)),
    ]
    found = bounds(NAMES, section(GROUPS))
    assert [(bound.members, bound.clip_norm) for bound in found] == [
        ([0], 0.5),
        ([1, 2], 2.0),
        ([4, 5], 2.0),
    ]
    squares = [float(sum(grads[i].square().sum() for i in bound.members)) for bound in found]
    scale(grads, factors(found, squares, 1.0, len(NAMES)))
    torch.testing.assert_close(grads, expected, rtol=1e-14, atol=0)


def test_what_is_small_stays_and_a_spike_is_scaled_everywhere() -> None:
    found = bounds(NAMES, section(GROUPS))
    assert factors(found, [0.25, 4.0, 4.0], 1.0, 6) == [1.0] * 6
    assert factors(found, [1.0, 400.0, 4.0], 0.4, 6) == [0.4, 0.1, 0.1, 0.4, 0.4, 0.4]


def test_without_a_bound_of_the_rest_only_the_group_is_clipped() -> None:
    groups = {"emb": {"pattern": "emb", "clip": "group", "clip_norm": 0.5}}
    assert [b.members for b in bounds(NAMES, section(groups, clip_norm=None))] == [[0]]


@pytest.mark.parametrize("own", [{}, {"clip": None}, {"clip": "global"}])
def test_where_all_is_global_the_judge_clips(own: dict[str, object]) -> None:
    optim = section({"w": {"pattern": "w", **own}})
    assert (bounds(NAMES, optim), optim.judged_clip_norm) == ([], 2.0)
    assert section(GROUPS).judged_clip_norm is None


REFUSED = {
    "without a gradient buffer": (
        {"clip": "none"},
        {"gradient_buffer": False, "clip": "previous"},
        r"groups\.x\.clip is none.*optim\.clip is previous and gradient_buffer is false; remove",
    ),
    "by tensor": (
        {"clip": "group"},
        {"clip": "tensor", "clip_norm": None},
        r"groups\.x\.clip is group.*optim\.clip is tensor; remove groups\.x\.clip, or set",
    ),
    "a norm of nobody": (
        {"clip_norm": 0.5},
        {},
        r"clip_norm is 0\.5, but clip is null; set clip: group, or remove clip_norm",
    ),
    "no norm": (
        {"clip": "group"},
        {"clip_norm": None},
        r"groups\.x\.clip is group, but optim\.clip_norm is null; set groups\.x\.clip_norm or",
    ),
    "another word": ({"clip": "tensor"}, {}, "'none', 'global' or 'group'"),
    "a norm of 0": ({"clip": "group", "clip_norm": 0}, {}, "greater than 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    group, changes, message = REFUSED[case]
    with pytest.raises(ValidationError, match=message):
        section({"x": {"pattern": "w", **group}}, **changes)
