"""Rotary positions: angles by their formula, their scaling, and what they do to attention."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dnt_scale.config import RopeSection
from dnt_scale.model.rotary import frequencies, rotated, table
from dnt_scale.model.task import blank_buffers, fill_buffers, on_meta
from tests.helpers.models import busy, normal, random_tokens, tiny

LLAMA3 = {"theta": 500_000, "scaling": "llama3", "factor": 8, "original_context": 8192}


def rope(**settings: object) -> RopeSection:
    return RopeSection.model_validate(settings)


def test_a_pair_turns_by_its_frequency_times_the_position() -> None:
    x, turns = normal((7, 2, 6), 0), table(rope(theta=100), 6, 7)[:, None]
    found = rotated(x, turns)
    for t in range(7):
        for i in range(3):
            angle = t * 100 ** (-2 * i / 6)
            matrix = torch.tensor(
                [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]],
                dtype=torch.float64,
            )
            torch.testing.assert_close(found[t, :, [i, i + 3]], x[t, :, [i, i + 3]] @ matrix.T)


def test_logits_depend_on_distances_alone() -> None:
    q, k = normal((1, 1, 8), 0), normal((1, 1, 8), 1)
    turns = table(rope(), 8, 500)[:, None]

    def logit(at: int, to: int) -> Tensor:
        return (rotated(q, turns[at : at + 1]) * rotated(k, turns[to : to + 1])).sum()

    for distance in (0, 3, 77):
        expected = logit(distance, 0)
        torch.testing.assert_close(logit(400 + distance, 400), expected, atol=1e-12, rtol=1e-12)
    assert (logit(3, 0) - logit(77, 0)).abs() > 1e-2


def test_linear_scaling_stretches_positions() -> None:
    plain, stretched = (table(rope(**more), 8, 64) for more in ({}, LINEAR))
    torch.testing.assert_close(stretched[::4], plain[:16])


LINEAR = {"scaling": "linear", "factor": 4}


def test_llama3_scaling_divides_slow_frequencies_only() -> None:
    plain, scaled = frequencies(rope(theta=500_000), 128), frequencies(rope(**LLAMA3), 128)
    turns = plain * 8192 / (2 * math.pi)
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns >= 1) & (turns <= 4)
    assert 1 < int(between.sum()) < 20
    ratio = (scaled / plain)[between]
    assert (ratio > 1 / 8).all() and (ratio < 1).all() and (ratio.diff() < 0).all()


def test_far_positions_are_right_in_bf16() -> None:
    """Within what rounding q itself costs; bf16 angles would be off by whole turns."""
    context = 1 << 17
    turns = table(rope(theta=500_000), 64, context)
    x = normal((8, 2, 64), 0)
    exact = rotated(x, turns[-8:, None])
    found = rotated(x.bfloat16(), turns[-8:, None].float())
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() < 0.03
    assert (rotated(x.bfloat16(), turns[-8:, None].bfloat16()).double() - exact).abs().max() < 0.1
    of_bf16 = torch.arange(context - 8, context).bfloat16().double()
    angles = torch.outer(of_bf16, frequencies(rope(theta=500_000), 64))
    wrong = rotated(x, torch.cat([angles.cos(), angles.sin()], -1)[:, None])
    assert (wrong - exact).abs().max() > 1


@torch.no_grad()
def test_a_row_may_be_longer_than_others_of_its_batch_were() -> None:
    config = tiny(positions="rope")
    model, tokens = busy(config), random_tokens(config, 2, 12)
    torch.testing.assert_close(model(tokens[:, :5]), model(tokens)[:, :5], atol=1e-12, rtol=0)


def test_the_table_is_a_buffer_in_fp32_that_no_checkpoint_holds() -> None:
    section = tiny(positions="rope", heads=2)
    task = on_meta(section)
    blank = blank_buffers(task, section.kind)
    assert {name: (b.shape, b.dtype) for name, b in blank.items()} == {
        "rotary": ((12, 12), torch.float32)
    }
    task = task.to_empty(device="cpu").bfloat16()
    fill_buffers(task, blank, torch.device("cpu"))
    assert task.rotary.dtype == torch.float32
    assert torch.equal(task.rotary, table(section.rope, 12, 12).float())
    assert "rotary" not in task.state_dict() and "pos_emb.weight" not in task.state_dict()


REFUSED = {
    "a factor without a scaling": ({"factor": 4}, "factor is 4, but scaling is none"),
    "llama3 without a context": ({"scaling": "llama3", "factor": 8}, "needs original_context"),
    "no band": (
        {**LLAMA3, "low_freq_factor": 4},
        "low_freq_factor is 4, expected less than high_freq_factor, 4",
    ),
    "another scaling": ({"scaling": "yarn"}, "scaling"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_do_not_go_together_are_refused(case: str) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(ValidationError, match=message):
        rope(**settings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope": {"theta": 5e5}}, "rope has settings, but positions is learned"),
        ({"positions": "rope", "head_size": 7}, "a head has a width of 7; set an even head_size"),
        ({"heads": 4, "kv_heads": 3}, "heads 4 is not divisible by kv_heads 3"),
        ({"heads": 5}, "width 24 is not divisible by heads 5; change one of them, or set head_si"),
    ],
)
def test_shapes_that_cannot_be_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny(**fields)
