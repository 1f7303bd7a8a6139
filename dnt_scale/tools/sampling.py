"""The next token out of a model's logits: by temperature, by what is left out, and by chance."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dnt_scale.config import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. In this order: repetition_penalty, temperature, top_k, top_p, min_p.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: only the k most likely tokens; 0: all.
        top_p: only the most likely tokens that have this much of the probability together (nucleus
            sampling, arXiv 1904.09751).
        min_p: only tokens that are at least this times as likely as the most likely one (arXiv
            2407.01082).
        repetition_penalty: logits of tokens that the text has already are divided by it where they
            are positive, else multiplied (CTRL, arXiv 1909.05858); 1: left alone.
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def generator_for(seed: int, index: int) -> torch.Generator:
    """Return the generator of one text alone, so that no other text changes what it draws: that of
    the seed itself for the first, else one of (seed, index).
    """
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    own = int.from_bytes(digest[:8], "little") if index else seed
    return torch.Generator().manual_seed(own)


def sample(
    logits_V: Tensor, sampling: Sampling, generator: torch.Generator, text: Sequence[int] = ()
) -> int:
    """Return one token id.

    Args:
        logits_V: fp32, on the CPU.
        text: the token ids that are there already.

    Raises:
        ConfigError: the logits tell nothing.
    """
    if logits_V.isnan().any() or logits_V.max().isinf():
        raise spoilt()
    if sampling.repetition_penalty != 1 and text:
        there = torch.tensor(sorted(set(text)))
        found, penalty = logits_V[there], sampling.repetition_penalty
        logits_V = logits_V.index_copy(
            0, there, torch.where(found > 0, found / penalty, found * penalty)
        )
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    weights_V = left_in(probabilities(logits_V, sampling), sampling)
    return int(torch.multinomial(weights_V, 1, generator=generator))


def probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Return probabilities, fp32 (V,), of logits divided by the temperature, of the ``top_k``."""
    if top_k := sampling.top_k:
        kth = logits_V.topk(min(top_k, len(logits_V))).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kth, -torch.inf)
    # so that the largest stays finite, and -inf what it is, whatever they are divided by
    divisor = min(max(sampling.temperature, 1e-30), 1e30)
    return torch.softmax((logits_V - logits_V.max()) / divisor, dim=0)


def left_in(probabilities_V: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities with 0 for tokens that ``top_p`` or ``min_p`` leave out; the most
    likely one is never left out.
    """
    if sampling.top_p < 1:
        possible = int((probabilities_V > 0).sum())
        ordered, tokens = probabilities_V.topk(possible)
        # what comes before a token, the more likely ones, has the share already
        beyond = ordered.cumsum(0) - ordered >= sampling.top_p
        probabilities_V = probabilities_V.index_fill(0, tokens[beyond], 0)
    if sampling.min_p:
        least = sampling.min_p * probabilities_V.max()
        probabilities_V = probabilities_V.masked_fill(probabilities_V < least, 0)
    return probabilities_V


def spoilt() -> ConfigError:
    """Return what to raise where a model's logits tell nothing."""
    return ConfigError(
        "the model's logits are not finite: its weights are spoilt; take an earlier checkpoint"
    )
