"""What becomes of gradients: the interface, and the usual way: backward, then the optimizer."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dnt_scale.engine.reductions import squared_norms
from dnt_scale.optim.clipping import Bound, factors, late_factors
from dnt_scale.optim.sharded_optimizer import ShardedOptimizer

if TYPE_CHECKING:
    from dnt_scale.engine.fsdp import ParameterShard


class GradientStrategy(Protocol):
    """How gradients get into the weights: `AccumulateThenStep` or `MomentumInBackward`."""

    # Whether copies of the model sum gradients after each micro-batch, or after the last only.
    sum_copies_each_time: bool
    # Whether a step can be judged and skipped on the device (`update_late`), the host ahead of it.
    skips_on_device: bool

    def before_step(self, backward: Callable[[], tuple[float, float]]) -> None:
        """Prepare a step; ``backward`` runs its micro-batches and returns loss and norm."""
        ...

    def before_micro_batch(self, number: int, micro_batches: int) -> None:
        """Note which of how many micro-batches comes next."""
        ...

    def norm_squares(self) -> Tensor:
        """Return this rank's part of squared norms, float64 (n,), n the same on all ranks."""
        ...

    def grad_norm(self, squares: Sequence[float]) -> float:
        """Return the norm to report and to judge by, of these summed over ranks, (n,)."""
        ...

    def update(self, factor: float, grad_norm: float) -> None:
        """Change the weights by ``factor`` times the gradient."""
        ...

    def late_grad_norm(self, squares: Tensor) -> Tensor:
        """Do as ``grad_norm`` does on the device, of float64 (n,), with ``skips_on_device``."""
        ...

    def update_late(self, factor: Tensor, go: Tensor) -> None:
        """Do as ``update`` does where ``go``, a bool scalar on the device, is true; else nothing.
        With ``skips_on_device``.

        Args:
            factor: a float64 scalar on the device.
        """
        ...

    def scalars(self) -> dict[str, float]:
        """Return what a checkpoint has to keep."""
        ...

    def refresh(self, scalars: Mapping[str, float]) -> None:
        """Take that over."""
        ...


class AccumulateThenStep:
    """Let backward add up gradients, and the optimizer step once they have been judged."""

    sum_copies_each_time = False

    def __init__(
        self,
        optimizer: ShardedOptimizer,
        parts: Sequence["ParameterShard"],
        bounds: Sequence[Bound],
    ) -> None:
        self.optimizer = optimizer
        self.parts = parts
        self.bounds = bounds  # of clipping by group; empty: the judge's factor is all there is
        self.bounded: Sequence[float] = ()  # squared norms of each, of the last backward
        self.late_bounded: Sequence[Tensor] = ()  # the same on the device
        self.skips_on_device = optimizer.skips_on_device

    def before_step(self, backward: Callable[[], tuple[float, float]]) -> None:
        pass

    def before_micro_batch(self, number: int, micro_batches: int) -> None:
        pass

    def norm_squares(self) -> Tensor:
        """Return the one of the whole gradient, and of each of `bounds`."""
        squares = squared_norms(self._grads())
        return torch.stack([squares.sum(), *(squares[each.members].sum() for each in self.bounds)])

    def grad_norm(self, squares: Sequence[float]) -> float:
        whole, *self.bounded = squares
        return math.sqrt(whole)

    @torch.no_grad()
    def update(self, factor: float, grad_norm: float) -> None:
        scale(self._grads(), factors(self.bounds, self.bounded, factor, len(self.parts)))
        for part in self.parts:
            part.rows.grad = part.grad
        self.optimizer.step()

    def late_grad_norm(self, squares: Tensor) -> Tensor:
        whole, *self.late_bounded = squares.unbind()
        return whole.sqrt()

    @torch.no_grad()
    def update_late(self, factor: Tensor, go: Tensor) -> None:
        scale_late(
            self._grads(), late_factors(self.bounds, self.late_bounded, factor, len(self.parts))
        )
        for part in self.parts:
            part.rows.grad = part.grad
        self.optimizer.step(go=go)

    def scalars(self) -> dict[str, float]:
        return {}

    def refresh(self, scalars: Mapping[str, float]) -> None:
        pass

    def _grads(self) -> list[Tensor]:
        return [part.grad for part in self.parts]


def scale_late(
    gradients: Sequence[Tensor], factors: Sequence[tuple[Sequence[int], Tensor]]
) -> None:
    """Multiply gradients in place, those of some places by a factor: a float64 scalar where they
    are. The host waits for nothing.
    """
    for places, factor in factors:
        chosen = [gradients[place] for place in places]
        torch._foreach_mul_(chosen, factor.to(chosen[0].dtype))


def scale(gradients: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Multiply each gradient in place, those by the same factor at once."""
    for factor in set(factors) - {1.0}:
        chosen = [g for g, own in zip(gradients, factors, strict=True) if own == factor]
        torch._foreach_mul_(chosen, factor)
