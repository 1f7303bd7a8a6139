"""The cache of keys and values: logits are those of the whole text read anew."""

import pytest
import torch

from tests.helpers.models import busy, tiny

EOS = 3
LONG = 500
ROPE = {"positions": "rope"}
# what the model is, and whether the runs are ones with document masks
CASES = {
    "learned": ({"setting": "S4"}, False),
    "learned, grouped, documents": ({"setting": "S5", "kv_heads": 2}, True),
    "rope, documents": ({**ROPE, "setting": "S1", "norm": "layernorm", "bias": True}, True),
    "rope, grouped": ({**ROPE, "setting": "S2", "kv_heads": 1, "activation": "swiglu"}, False),
    "no positions": ({"positions": "none", "setting": "S3", "kv_heads": 2, "logit_cap": 3}, True),
    "peri": ({**ROPE, "setting": "peri", "vocab_multiple": 50}, False),
}


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_greedy_text_is_that_without_a_cache(name: str) -> None:
    changes, documents = CASES[name]
    sizes = {"layers": 2, "width": 32, "heads": 4, "vocab_size": 61, "context": 540}
    config = tiny(**sizes, tied_head=False, **changes)
    model = busy(config, torch.float32)
    model.document_eos = EOS if documents else None
    # of different lengths; in the second a document ends
    texts = [[EOS, *range(5, 25)], [EOS, 7, 8, EOS, *range(30, 60)], [EOS]]
    cache = model.new_cache(3, 540)
    model.fill(cache, [0, 1], [text[:-1] for text in texts[:2]])
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    memory = cache.layers.data_ptr()
    for step in range(LONG):
        logits = model.next_logits(cache, [text[-1] for text in texts])
        for row, (text, likely) in enumerate(zip(texts, logits.argmax(-1).tolist(), strict=True)):
            found[row].append(logits[row])
            # at another place in each row a document ends
            text.append(EOS if documents and step == 100 + 50 * row else likely)
    assert cache.layers.data_ptr() == memory
    for text, cached in zip(texts, found, strict=True):
        anew = model(torch.tensor([text[:-1]]))[0, -LONG:]
        torch.testing.assert_close(torch.stack(cached), anew, atol=1e-4, rtol=0)
        assert anew.std() > 0.5
        chosen = anew.gather(1, torch.tensor(text[-LONG:])[:, None])[:, 0]
        others = anew.max(-1).values - chosen > 1e-4
        assert others.sum() <= documents  # the one that was put there


def test_memory_is_that_of_shared_heads() -> None:
    config = tiny(heads=6, kv_heads=2, head_size=4, context=40)
    cache = busy(config, torch.bfloat16).new_cache(5, 33)
    assert cache.layers.dtype == torch.bfloat16
    assert cache.layers.numel() == config.layers * 2 * 5 * 2 * 33 * 4


@torch.inference_mode()
def test_a_row_takes_the_place_of_another_and_begins_anew() -> None:
    config = tiny(positions="rope", tied_head=False, context=30)
    model = busy(config)
    texts = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11, 12]]
    cache = model.new_cache(3, 30)
    model.fill(cache, [0, 1, 2], texts)
    model.next_logits(cache, [20, 21, 22])
    cache.move(2, 0)
    model.fill(cache, [1], [[13, 14, 15]])
    cache.empty(2)
    for row, text in enumerate(([7, 8, 9, 10, 11, 12, 22, 23], [13, 14, 15, 24], [25])):
        wanted = model(torch.tensor([text]))[0, -1]
        if not row:
            logits = model.next_logits(cache, [23, 24, 25])
        torch.testing.assert_close(logits[row], wanted)


@torch.inference_mode()
def test_what_left_a_row_is_not_seen_even_where_it_was_no_number() -> None:
    model = busy(tiny(tied_head=False, context=30))
    cache = model.new_cache(2, 30)
    model.fill(cache, [0, 1], [[1, 2, 3, 4, 5, 6, 7], [1, 2]])
    assert not cache.layers[:, :, 1, :, 7:].any() and cache.layers[:, :, 1, :, :2].any()
    logits = model.next_logits(cache, [8, 9])
    torch.testing.assert_close(logits[1], model(torch.tensor([[1, 2, 9]]))[0, -1])
