"""Metrics measured on the device: one line where they arise, read where the host waits anyway.

Whoever computes during a step may record a scalar: the model, the engine, the optimizer, a hook
before the step. What is recorded until the step is judged travels with the loss
(``engine.reductions.with_recorded``), so it makes the host wait for the device no more often. What
is recorded after that, in the update, takes a sum over ranks of its own, and where the host waits
in each step, one wait more.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Sum and count of what was recorded under a name since it was taken: float64 (2,), on its device.
_recorded: dict[str, Tensor] = {}


@torch.no_grad()
def record(name: str, total: Tensor, count: float | Tensor = 1.0) -> None:
    """Add to this step's mean of ``name``: the sum of totals over the sum of counts, of all ranks.

    Call it on every rank alike, outside of blocks that ``engine.compile`` compiles. A block that is
    recomputed in backward records twice, which leaves a mean as it is. What a validation records is
    dropped.

    Args:
        total: a scalar on any device; a value, or the sum of ``count`` values.
        count: a number, or a scalar tensor.
    """
    total = total.detach().double()
    if not isinstance(count, Tensor):
        count = torch.full_like(total, count)  # a copy from the host would make it wait
    pair = torch.stack([total, count.detach().to(total)])
    if name in _recorded:
        pair += _recorded[name].to(pair.device)
    _recorded[name] = pair


def take(device: torch.device) -> tuple[list[str], Tensor]:
    """Hand over what was recorded since the last call, and forget it.

    Returns:
        The names, sorted, and their sums and counts on this rank: float64 of shape (names, 2), on
        ``device``.
    """
    names = sorted(_recorded)
    pairs = [_recorded[name].to(device) for name in names]
    _recorded.clear()
    if not pairs:
        return names, torch.empty(0, 2, dtype=torch.float64, device=device)
    return names, torch.stack(pairs)


@contextmanager
def ignored() -> Iterator[None]:
    """Drop what the block records: a validation, or a pass that only measures, is of no step."""
    before = dict(_recorded)
    try:
        yield
    finally:
        _recorded.clear()
        _recorded.update(before)
