"""The document mask: each document in a row is as if it were alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dnt_scale.config import ModelConfig, Setting
from dnt_scale.model.block import SETTINGS
from dnt_scale.model.dnt import document_layout
from tests.helpers.models import VARIANTS, busy, normal, random_tokens, tiny

EOS = 5


def documents_in_a_row(config: ModelConfig) -> tuple[list[Tensor], Tensor]:
    """Documents, each behind its eos but the first, which begins in the row before; and the two
    rows of them.
    """
    tokens = random_tokens(config, 1, 24)[0]
    tokens[tokens == EOS] += 1
    # one document is empty, and the second row begins with a document
    for begin in (4, 5, 9, 12, 19):
        tokens[begin] = EOS
    documents = [
        tokens[a:b] for a, b in zip((0, 4, 5, 9, 12, 19), (4, 5, 9, 12, 19, 24), strict=True)
    ]
    return documents, tokens.view(2, 12)


@pytest.mark.parametrize("variant", ["as is", "no positions", "rope", "everything"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_masked_documents_are_as_if_each_were_alone(setting: Setting, variant: str) -> None:
    config = tiny(setting=setting, **VARIANTS[variant])
    masked, plain = busy(config, torch.float32), busy(config, torch.float32)
    masked.document_eos = EOS
    documents, rows = documents_in_a_row(config)
    logits = masked(rows).flatten(0, 1)
    alone = torch.cat([plain(document[None])[0] for document in documents])
    torch.testing.assert_close(
        logits, alone, atol=1e-5 * max(1.0, float(alone.detach().std())), rtol=0
    )
    assert (plain(rows).flatten(0, 1) - alone).abs().max() > 0.1

    weights = normal(logits.shape, 3, torch.float32)
    (logits * weights).sum().backward()
    (alone * weights).sum().backward()
    for (name, ours), theirs in zip(masked.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm(), name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.lists(st.sampled_from([EOS, 1, 2, 3]), min_size=9, max_size=9), min_size=1, max_size=3
    )
)
def test_the_layout_of_documents_by_hand(rows: list[list[int]]) -> None:
    positions_BT, mask_B1TT = document_layout(torch.tensor(rows), EOS)
    for row, positions_T, mask_TT in zip(
        rows, positions_BT.tolist(), mask_B1TT[:, 0].tolist(), strict=True
    ):
        begin = 0
        for place, token in enumerate(row):
            begin = place if token == EOS else begin
            assert positions_T[place] == place - begin
            assert mask_TT[place] == [begin <= other <= place for other in range(9)]


@torch.no_grad()
def test_without_an_eos_in_the_row_masking_changes_nothing() -> None:
    config = tiny()
    masked, plain = busy(config), busy(config)
    masked.document_eos = config.vocab_size  # no token has it
    tokens = random_tokens(config, 2, 12)
    torch.testing.assert_close(masked(tokens), plain(tokens), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_blocks_keep_one_mask(dtype: torch.dtype) -> None:
    config = tiny(layers=4)
    masked = busy(config, dtype)
    masked.document_eos = EOS
    _, rows = documents_in_a_row(config)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape == (2, 1, 12, 12):
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        masked(rows)
    assert len(kept) == config.layers  # else this looks for another shape than attention keeps
    assert {tensor.dtype for tensor in kept} == {dtype}
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept}) == 1


def test_masked_documents_in_bf16() -> None:
    config = tiny()
    masked = busy(config, torch.bfloat16)
    masked.document_eos = EOS
    _, rows = documents_in_a_row(config)
    loss = masked(rows[:, :-1], rows[:, 1:])
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in masked.parameters())
    exact = busy(config)
    exact.document_eos = EOS
    with torch.no_grad():
        assert float(loss.detach()) == pytest.approx(
            float(exact(rows[:, :-1], rows[:, 1:])), rel=0.05
        )
