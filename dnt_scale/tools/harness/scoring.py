"""Likelihoods of given tokens, and texts that go on with others, by a language model.

Shapes in names: B rows, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dnt_scale.model.dnt import DNT
from dnt_scale.tools.sampling import Sampling, sample, spoilt

Done = Callable[[int], None]  # told how many requests are done


@torch.inference_mode()
def log_likelihoods(
    model: DNT, pairs: Sequence[tuple[list[int], list[int]]], batch: int, done: Done
) -> list[tuple[float, bool]]:
    """Return for each context and continuation the log-likelihood of the continuation in nats, and
    whether it is the model's greedy choice.

    Pairs that differ in the last token alone are computed once. The longest come first, so that
    running out of memory happens at the beginning, and the time left is overestimated.

    Args:
        pairs: token ids, of each at least one and of a continuation at most ``model.context``; of
            more than fit, the first are left out.
        batch: rows that are computed at once.
    """
    most = model.config.context
    sharing: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        inputs = (*context, *continuation)[-(most + 1) : -1]
        sharing.setdefault(inputs, []).append(number)
    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    order = sorted(sharing, key=len, reverse=True)
    for at in range(0, len(order), batch):
        rows = order[at : at + batch]
        logits_BTV = model(padded(rows, device_of(model)))
        for inputs, logits_TV in zip(rows, logits_BTV, strict=True):
            for number in sharing[inputs]:
                continuation = pairs[number][1]
                tail_TV = logits_TV[len(inputs) - len(continuation) : len(inputs)]
                found[number] = likelihood(tail_TV, continuation)
            done(len(sharing[inputs]))
    return found


def likelihood(logits_TV: Tensor, targets: list[int]) -> tuple[float, bool]:
    """Return the log-likelihood of the targets in nats, and whether each is the likeliest token.

    Raises:
        ConfigError: the logits tell nothing.
    """
    targets_T = torch.tensor(targets, device=logits_TV.device)
    each_T = logits_TV.float().log_softmax(dim=-1).gather(-1, targets_T[:, None])
    greedy = bool((logits_TV.argmax(dim=-1) == targets_T).all())
    total = float(each_T.sum())
    if math.isnan(total):
        raise spoilt()
    return total, greedy


@torch.inference_mode()
def continuations(
    model: DNT,
    contexts: Sequence[list[int]],
    over: Callable[[list[int]], bool],
    *,
    tokens: int,
    known: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> list[list[int]]:
    """Return the token ids that go on with each context, computed together.

    Args:
        contexts: a token id or more each; with ``tokens`` more at most ``model.context``.
        over: whether these new ids of a row, at least one, are the last.
        known: ids that the tokenizer has; the model may have more, which are not taken.
    """
    whole = [list(context) for context in contexts]
    begun = [len(context) for context in contexts]
    cache = model.new_cache(len(whole), max(begun) + tokens - 1)
    model.fill(cache, range(len(whole)), [context[:-1] for context in contexts])
    active = list(range(len(whole)))  # one in each row of the cache, from the first on
    for _ in range(tokens):
        logits_BV = model.next_logits(cache, [whole[number][-1] for number in active])
        ended = []
        for number, logits_V in zip(active, logits_BV[:, :known].float().cpu(), strict=True):
            whole[number].append(sample(logits_V, sampling, generator))
            ended.append(over(whole[number][begun[number] :]))
        active = [active[row] for row in cache.close_up(ended)]
        if not active:
            break
    return [ids[start:] for ids, start in zip(whole, begun, strict=True)]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return rows of token ids as int64 (B, T), with zeros behind shorter ones: no token attends to
    what follows it.
    """
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def device_of(model: DNT) -> torch.device:
    return model.tok_emb.weight.device
