"""Attention inside documents: each document in a row is as if it were alone, on any path."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dnt_scale.config import ModelConfig, Setting
from dnt_scale.engine.parallelize import KEPT_OPS
from dnt_scale.model import documents
from dnt_scale.model.block import SETTINGS
from dnt_scale.model.documents import (
    BLOCK,
    TOGETHER,
    Documents,
    attention,
    block_mask,
    cut,
    find_documents,
)
from testbed.dense_mask import dense_attention, dense_mask
from tests.helpers.models import VARIANTS, busy, normal, random_tokens, tiny

EOS = 5
T = 300  # more than two blocks, and pieces of both kinds


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


@st.composite
def layouts(draw: st.DrawFn, length: int = T) -> Tensor:
    """A row's tokens: EOS where documents begin, else 1."""
    kind = draw(
        st.sampled_from(["no eos", "at 0", "at the end", "everywhere", "one", "few", "many"])
    )
    seed = draw(st.integers(0, 2**16))
    drawn = torch.rand(length, generator=torch.Generator().manual_seed(seed))
    index = torch.arange(length)
    begins = {
        "no eos": index < 0,
        "at 0": index == 0,
        "at the end": index == length - 1,
        "everywhere": index >= 0,
        "one": index == drawn.argmax(),
        "few": drawn < 0.01,
        "many": drawn < 0.2,
    }
    return torch.where(begins[kind], EOS, 1)


rows_of_documents = st.lists(layouts(), min_size=1, max_size=3).map(torch.stack)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows_of_documents)
def test_the_places_of_documents_and_pieces_by_hand(tokens_BT: Tensor) -> None:
    found = find_documents(tokens_BT, EOS, torch.float32)
    assert found.pieces is not None
    ends = torch.tensor(found.pieces.lengths).cumsum(0).tolist()
    assert ends[-1] == tokens_BT.numel() and set(range(T, ends[-1], T)) <= set(ends)
    for row, begins, positions in zip(
        tokens_BT.tolist(), found.begin_BT.tolist(), found.positions_BT.tolist(), strict=True
    ):
        begin = 0
        for place, token in enumerate(row):
            begin = place if token == EOS else begin
            assert begins[place] == begin and positions[place] == place - begin
    whole = (found.begin_BT == torch.arange(T)).flatten()
    for end, length, mask in zip(ends, found.pieces.lengths, found.pieces.masks, strict=True):
        begins = whole[end - length : end]
        assert begins[0]
        assert (mask is None) == (begins.sum() == 1) and (mask is None or length <= TOGETHER)
    # two neighbours in a row are more than one piece could be
    for end, length, following in zip(
        ends, found.pieces.lengths, found.pieces.lengths[1:], strict=False
    ):
        assert end % T == 0 or length + following > TOGETHER


def attended(tokens_BT: Tensor, dtype: torch.dtype, heads: int = 3, width: int = 8) -> list[Tensor]:
    """Queries, keys, values as a block makes them, (B, H, T, K), that want gradients."""
    shape = (*tokens_BT.shape, heads, width)
    return [normal(shape, seed, dtype).transpose(1, 2).requires_grad_() for seed in range(3)]


def with_gradients(y: Tensor, given: list[Tensor]) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, given, normal(y.shape, 3, y.dtype))]


def by_dense_mask(qkv: list[Tensor], begin_BT: Tensor) -> list[Tensor]:
    mask = dense_mask(begin_BT, qkv[0].dtype)
    return with_gradients(F.scaled_dot_product_attention(*qkv, attn_mask=mask), qkv)


def assert_close(found: list[Tensor], expected: list[Tensor], atol: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows_of_documents)
def test_attention_and_its_gradients_are_those_of_a_dense_mask(tokens_BT: Tensor) -> None:
    qkv = attended(tokens_BT, torch.float32)
    found = find_documents(tokens_BT, EOS, torch.float32)
    expected = by_dense_mask(qkv, found.begin_BT)
    ours = with_gradients(attention(*qkv, found, causal=True), qkv)
    assert_close(ours, expected, 1e-5)
    # bit for bit: cut on the spot, and as the one operation of compiled blocks
    bare = with_gradients(attention(*qkv, Documents(found.begin_BT), causal=True), qkv)
    compiled = with_gradients(documents._whole(*qkv, found.begin_BT)[0], qkv)
    assert_close(bare, ours, 0)
    assert_close(compiled, ours, 0)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(rows_of_documents)
def test_loss_and_gradients_are_those_of_a_dense_mask(tokens_BT: Tensor) -> None:
    config = tiny(context=T, positions="rope", heads=6, kv_heads=2, head_size=10)
    model = busy(config, torch.float32)
    model.document_eos = EOS
    words_BT = random_tokens(config, *tokens_BT.shape)
    words_BT[words_BT == EOS] += 1
    words_BT[tokens_BT == EOS] = EOS
    found = []
    for how in (None, dense_attention()):
        if how is not None:
            with how:
                loss = model(words_BT, words_BT.roll(-1, 1)) / words_BT.numel()
        else:
            loss = model(words_BT, words_BT.roll(-1, 1)) / words_BT.numel()
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("eos", [29, 0])  # no token has it; each row begins with it
@torch.no_grad()
def test_rows_of_one_document_are_plain_attention(eos: int) -> None:
    config = tiny()
    masked, plain = busy(config, torch.float32), busy(config, torch.float32)
    masked.document_eos = eos
    tokens = random_tokens(config, 2, 12).clamp(min=1)
    tokens[:, 0] = 0
    assert torch.equal(masked(tokens), plain(tokens))


def test_a_rows_loss_does_not_depend_on_the_rows_beside_it() -> None:
    tokens_BT = torch.where(
        torch.rand(4, T, generator=torch.Generator().manual_seed(0)) < 0.05, EOS, 1
    )
    tokens_BT[1] = 1
    qkv = attended(tokens_BT, torch.float32)
    together = attention(*qkv, find_documents(tokens_BT, EOS, torch.float32), causal=True)
    for row in range(4):
        own = [x_BHTK[row : row + 1] for x_BHTK in qkv]
        alone = attention(*own, find_documents(tokens_BT[row, None], EOS, torch.float32), True)
        assert torch.equal(together[row, None], alone)


class Largest(TorchDispatchMode):
    """The most elements that any tensor has had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("every", [1, 40, 500])
def test_nothing_is_as_large_as_a_mask_of_all_tokens(every: int) -> None:
    length = 2048
    tokens_BT = torch.where(torch.arange(length) % every == 0, EOS, 1)[None]
    qkv = attended(tokens_BT, torch.float32, heads=1)
    with Largest() as ours:
        with_gradients(attention(*qkv, find_documents(tokens_BT, EOS, torch.float32), True), qkv)
    assert 4 * length * 8 <= ours.elements <= 4 * TOGETHER * length / 2
    with Largest() as dense:
        by_dense_mask(qkv, find_documents(tokens_BT, EOS, torch.float32).begin_BT)
    assert dense.elements >= 4 * length**2


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


# --- as blocks are recomputed and compiled --------------------------------------------------------


def with_blocks(found: Documents, monkeypatch) -> Documents:
    """The same for FlexAttention, which then runs on this CPU in its slow form, backward too."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    slow = torch.compile(flex.flex_attention, backend="aot_eager")
    monkeypatch.setattr(documents, "_compiled", lambda: slow)
    return Documents(found.begin_BT, block_mask=block_mask(found.begin_BT))


def one_block(dtype: torch.dtype = torch.float32):
    return busy(tiny(context=T, positions="none"), dtype).blocks[0]


def how_computed(forward, recompute: str | None):
    recomputed = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    return {
        None: forward,
        "full": recomputed,
        "selective": partial(
            recomputed, context_fn=partial(create_selective_checkpoint_contexts, KEPT_OPS)
        ),
    }[recompute]


@pytest.mark.parametrize("path", ["cpu", pytest.param("cuda", marks=pytest.mark.slow)])
def test_recomputation_changes_no_bit(path, monkeypatch) -> None:
    tokens_BT = torch.where(torch.arange(2 * T).view(2, T) % 70 == 0, EOS, 1)
    found = find_documents(tokens_BT, EOS, torch.float32)
    if path == "cuda":
        found = with_blocks(found, monkeypatch)
    block = one_block()
    x_BTD = normal((2, T, 24), 5, torch.float32).requires_grad_()
    given = [x_BTD, *block.parameters()]
    plain, *recomputed = (
        with_gradients(how_computed(block.forward, how)(x_BTD, found), given)
        for how in (None, "full", "selective")
    )
    for each in recomputed:
        assert_close(each, plain, 0)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["cpu", "cuda"])
def test_blocks_are_compiled_once_for_any_documents(path, monkeypatch) -> None:
    torch._dynamo.reset()
    block, backend = one_block(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        how_computed(block.forward, "selective"), backend=backend, fullgraph=True
    )
    for every in (1000, 1, 70):
        tokens_BT = torch.where(torch.arange(2 * T).view(2, T) % every == every - 1, EOS, 1)
        found = find_documents(tokens_BT, EOS, torch.float32)
        if path == "cuda":
            found = with_blocks(found, monkeypatch)
        x_BTD = normal((2, T, 24), every, torch.float32).requires_grad_()
        given = [x_BTD, *block.parameters()]
        ours = with_gradients(compiled(x_BTD, found), given)
        plain = with_gradients(block(x_BTD, Documents(found.begin_BT)), given)
        # where every token is alone, those of queries and keys are 0 but for rounding
        rounding = 1e-6 * max(other.norm() for other in plain)
        for one, other in zip(ours, plain, strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm() + rounding
    assert backend.frame_count == 1


# --- FlexAttention, as far as it goes without a GPU -----------------------------------------------


def ordered(count_B1S: Tensor, blocks_B1SS: Tensor) -> list[list[int]]:
    """Which blocks are chosen, sorted: those behind the count mean nothing."""
    return [
        sorted(blocks[:count].tolist())
        for count, blocks in zip(count_B1S.flatten(), blocks_B1SS.flatten(0, 2), strict=True)
    ]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_the_blocks_are_those_that_torch_finds(data: st.DataObject) -> None:
    length = data.draw(st.sampled_from([1, BLOCK - 1, BLOCK, 3 * BLOCK, 5 * BLOCK + 7]))
    tokens_BT = torch.stack(data.draw(st.lists(layouts(length), min_size=1, max_size=2)))
    begin_BT = find_documents(tokens_BT, EOS, torch.float32).begin_BT
    ours = block_mask(begin_BT)
    theirs = flex.create_block_mask(
        ours.mask_mod, len(begin_BT), None, length, length, device="cpu", BLOCK_SIZE=BLOCK
    )
    assert ours.shape == theirs.shape == (len(begin_BT), 1, length, length)
    for count, blocks in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"),
        ("full_q_num_blocks", "full_q_indices"),
    ):
        assert ordered(getattr(ours, count), getattr(ours, blocks)) == ordered(
            getattr(theirs, count), getattr(theirs, blocks)
        )
    seen = flex.create_mask(ours.mask_mod, len(begin_BT), None, length, length, device="cpu")
    assert torch.equal(seen, dense_mask(begin_BT, torch.float32) == 0)


@pytest.mark.slow
@pytest.mark.parametrize("width", [8, 24])  # less than FlexAttention's least, and not a power of 2
def test_flex_attention_and_its_gradients_are_those_of_a_dense_mask(width, monkeypatch) -> None:
    tokens_BT = torch.where(torch.arange(2 * T).view(2, T) % 70 == 0, EOS, 1)
    found = find_documents(tokens_BT, EOS, torch.float32)
    qkv = attended(tokens_BT, torch.float32, width=width)
    ours = with_gradients(attention(*qkv, with_blocks(found, monkeypatch), causal=True), qkv)
    assert_close(ours, by_dense_mask(qkv, found.begin_BT), 1e-5)


def test_blocks_are_found_without_the_host() -> None:
    """A fake tensor has no values that anything could wait for."""
    with FakeTensorMode():
        begin_BT = torch.zeros(2, T, dtype=torch.int64)
        assert block_mask(begin_BT).kv_indices.shape == (2, 1, 3, 3)
        with pytest.raises(DynamicOutputShapeException):
            cut(begin_BT, torch.bfloat16)
