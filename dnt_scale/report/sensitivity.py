"""How sensitive the loss is to a setting: by what factor it may vary for 0.05 nats of the best."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

TOLERANCE = 0.05  # nats


@dataclass(frozen=True)
class Width:
    """The range of a setting around its best value in which the loss is within a tolerance.

    Between values that were tried, the loss is taken to be linear in the setting's logarithm. A
    value of which a run failed counts as out of the range, which then ends at the last good value.

    best, loss: the value of the lowest loss, and that.
    low, high: the range.
    low_cut, high_cut: whether it ends there only because no value beyond was tried.
    """

    best: float
    loss: float
    low: float
    high: float
    low_cut: bool
    high_cut: bool

    @property
    def factor(self) -> float:
        """Return high / low, 1 where the range is one value."""
        return self.high / self.low

    @property
    def words(self) -> str:
        """Return the factor as people read it."""
        return f"{'at least ' if self.low_cut or self.high_cut else ''}x {self.factor:.3g}"


def sensitivity(
    values: Sequence[float], losses: Sequence[float], tolerance: float = TOLERANCE
) -> Width | None:
    """Return the range, None where no loss is finite.

    Args:
        values: of the setting, positive, ascending, each once.
        losses: of each value, in nats; infinite or nan where a run failed.
        tolerance: in nats.
    """
    finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
    if min(finite, default=math.inf) == math.inf:
        return None
    best = finite.index(min(finite))
    limit = finite[best] + tolerance
    low, low_cut = _edge(values, finite, best, limit, -1)
    high, high_cut = _edge(values, finite, best, limit, 1)
    return Width(values[best], finite[best], low, high, low_cut, high_cut)


def _edge(
    values: Sequence[float], losses: Sequence[float], best: int, limit: float, step: int
) -> tuple[float, bool]:
    """Return where the loss first rises above ``limit`` on the way from ``best``, and whether it
    does so for no value that was tried.
    """
    at = best
    while 0 <= at + step < len(values):
        here, beyond = losses[at], losses[at + step]
        if beyond == math.inf:
            return values[at], False
        if beyond > limit:
            share = (limit - here) / (beyond - here)
            return values[at] * (values[at + step] / values[at]) ** share, False
        at += step
    return values[at], True
