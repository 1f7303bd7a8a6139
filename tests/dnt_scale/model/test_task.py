"""What engines take from a task: batches in parts, buffers made anew, the language model's
targets.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from dnt_scale.config import ConfigError
from dnt_scale.model.batch import IGNORED, split
from dnt_scale.model.dnt import DNT
from dnt_scale.model.init import init_weights
from dnt_scale.model.task import (
    Task,
    blank_buffers,
    fill_buffers,
    flops_per_row,
    shapes_of,
)
from tests.helpers.models import tiny

CPU = torch.device("cpu")


class Layer(nn.Module):
    def __init__(self, angles: Tensor) -> None:
        super().__init__()
        self.register_buffer("angles", angles, persistent=False)


class Rotary(nn.Module, Task):
    """Layers that share a table, and a count of their own."""

    def __init__(self, *, forgets: bool = False, persistent: bool = False) -> None:
        super().__init__()
        angles = torch.empty(3)
        self.blocks = nn.ModuleList(Layer(angles) for _ in range(2))
        self.register_buffer("places", torch.empty(4, dtype=torch.int64), persistent=persistent)
        self.forgets = forgets

    def init_buffers(self) -> None:
        self.places.copy_(torch.arange(4))
        if not self.forgets:
            self.blocks[0].angles.copy_(torch.tensor([0.1, 0.2, 0.3]))


def on_meta(**options: bool) -> Rotary:
    with torch.device("meta"):
        return Rotary(**options)


def test_buffers_are_made_and_filled_and_what_was_one_stays_one():
    task = on_meta()
    fill_buffers(task, blank_buffers(task, "rotary"), CPU)
    assert task.blocks[0].angles is task.blocks[1].angles
    assert torch.equal(task.blocks[1].angles, torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(task.places, torch.arange(4))
    assert not task.state_dict()  # as they were registered


def test_buffers_that_were_cast_come_back_in_their_dtype():
    blank = blank_buffers(on_meta(), "rotary")
    task = Rotary().to(torch.bfloat16)
    assert task.blocks[0].angles.dtype == torch.bfloat16
    fill_buffers(task, blank, CPU)
    assert task.blocks[0].angles.dtype == torch.float32
    assert torch.equal(task.blocks[0].angles, torch.tensor([0.1, 0.2, 0.3]))


def test_a_buffer_that_is_forgotten_is_named():
    task = on_meta(forgets=True)
    with pytest.raises(
        ConfigError, match=r"Rotary\.init_buffers: leaves blocks\.0\.angles without"
    ):
        fill_buffers(task, blank_buffers(task, "rotary"), CPU)


def test_a_persistent_buffer_is_refused():
    with pytest.raises(
        ConfigError, match=r"model\.kind is rotary, whose buffer places is persistent"
    ):
        blank_buffers(on_meta(persistent=True), "rotary")


def test_a_batch_is_split_by_rows_whatever_is_in_it():
    rows = torch.arange(10).view(5, 2)
    assert [part.tolist() for part in split(rows, 2)] == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
        [[8, 9]],
    ]
    parts = split({"image": rows, "label": torch.arange(5)}, 3)
    assert [part["label"].tolist() for part in parts] == [[0, 1, 2], [3, 4]]
    assert [part["image"].shape for part in parts] == [(3, 2), (2, 2)]


@torch.no_grad()
def test_the_targets_of_text_are_the_tokens_that_follow():
    config = tiny()
    model = DNT(config)
    init_weights(model, 0)
    rows = torch.randint(0, config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    rows[1, 6:] = IGNORED
    assert int(model.count(rows)) == 3 * 8 - 3
    by_hand = 0.0
    for row in rows.tolist():
        for place, (_, target) in enumerate(pairwise(row)):
            if target != IGNORED:
                logits = model(torch.tensor([row[: place + 1]]))[0, -1]
                by_hand -= float(logits.log_softmax(0)[target])
    assert float(model.loss_sum(rows)) == pytest.approx(by_hand, rel=1e-5)
    assert model.eval_sums(rows)["loss"] == model.loss_sum(rows)


def test_what_is_known_of_a_section_without_its_weights():
    config = tiny(layers=2)
    shapes = shapes_of(config)
    assert shapes["tok_emb.weight"] == (29, 24)
    assert flops_per_row(config, 8) == 8 * (
        6 * (sum(map(size, shapes.values())) - 12 * 24) + 12 * 2 * 24 * 8
    )


def size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
