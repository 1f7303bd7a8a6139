"""The next token out of logits, beside transformers' own processors of them."""

import pytest
import torch
from transformers.generation import logits_process as theirs

from dnt_scale.tools.sampling import Sampling, generator_for, left_in, probabilities, sample

UNCHANGED = Sampling(temperature=1.0, top_k=0)


def drawn(logits: torch.Tensor, sampling: Sampling, times: int = 200) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    return {sample(logits, sampling, generator) for _ in range(times)}


def test_no_token_beyond_the_tokenizer_is_sampled() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf, -torch.inf])
    assert drawn(logits, Sampling(2.0, 0)) == {0, 1, 2}
    assert drawn(logits, Sampling(2.0, 2)) == {1, 2}
    assert drawn(logits, Sampling(2.0, 99)) == {0, 1, 2}
    assert drawn(logits, Sampling(2.0, 0, top_p=0.999999)) == {0, 1, 2}
    assert drawn(logits, Sampling(0.0), times=9) == {2}


@pytest.mark.parametrize("temperature", [5e-324, 1e-38, 1e-10, 1e10, 1e308])
@pytest.mark.parametrize("top_k", [0, 2, 10**15])
def test_any_temperature_samples(temperature: float, top_k: int) -> None:
    logits = torch.tensor([-80.0, 70.0, 60.0, -torch.inf])
    found = drawn(logits, Sampling(temperature, top_k))
    assert found == {1} if temperature < 1 else found == ({1, 2} if top_k == 2 else {0, 1, 2})


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(spoilt: float) -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits are not finite"):
            sample(
                torch.tensor([0.0, spoilt, 1.0]), Sampling(temperature, 2), torch.Generator(), [1]
            )


PEERS = {
    "top_p": (Sampling(1.0, 0, top_p=0.6), [theirs.TopPLogitsWarper(0.6)]),
    "min_p": (Sampling(1.0, 0, min_p=0.1), [theirs.MinPLogitsWarper(0.1)]),
    "all": (
        Sampling(0.7, 20, top_p=0.8, min_p=0.05),
        [
            theirs.TemperatureLogitsWarper(0.7),
            theirs.TopKLogitsWarper(20),
            theirs.TopPLogitsWarper(0.8),
            theirs.MinPLogitsWarper(0.05),
        ],
    ),
    "hot": (
        Sampling(3.0, 0, top_p=0.9),
        [theirs.TemperatureLogitsWarper(3.0), theirs.TopPLogitsWarper(0.9)],
    ),
    "least": (Sampling(1.0, 0, top_p=1e-9), [theirs.TopPLogitsWarper(1e-9)]),
}


@pytest.mark.parametrize("name", PEERS)
def test_what_is_left_out_is_what_transformers_leaves_out(name: str) -> None:
    sampling, processors = PEERS[name]
    for seed in range(20):
        logits = 3 * torch.randn(200, generator=torch.Generator().manual_seed(seed))
        wanted = logits[None]
        for processor in processors:
            wanted = processor(None, wanted)
        found = left_in(probabilities(logits, sampling), sampling)
        left = found > 0
        assert left.any() and (name == "hot" or not left.all())
        torch.testing.assert_close(found / found.sum(), wanted[0].softmax(0))


def test_the_penalty_of_a_repetition_is_transformers() -> None:
    text = [3, 5, 5, 9]
    processor = theirs.RepetitionPenaltyLogitsProcessor(1.5)
    changed = 0
    for seed in range(50):
        logits = torch.randn(12, generator=torch.Generator().manual_seed(seed))
        wanted = int(processor(torch.tensor([text]), logits[None].clone())[0].argmax())
        greedy = Sampling(0.0, repetition_penalty=1.5)
        assert sample(logits, greedy, torch.Generator(), text) == wanted
        changed += wanted != int(logits.argmax())
    assert changed


def test_a_text_draws_from_a_generator_of_its_own() -> None:
    assert generator_for(7, 0).initial_seed() == 7
    found = {
        generator_for(seed, index).initial_seed() for seed in range(9) for index in range(1, 9)
    }
    assert len(found) == 72
    assert generator_for(2**64 - 1, 5).initial_seed() == generator_for(2**64 - 1, 5).initial_seed()
    one, other = (torch.rand(3, generator=generator_for(0, index)) for index in (1, 2))
    assert not torch.equal(one, other)


def test_what_is_left_alone_changes_nothing() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(left_in(probabilities(logits, UNCHANGED), UNCHANGED), logits.softmax(0))
