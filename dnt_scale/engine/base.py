"""What the training loop asks of an engine. The loop knows nothing of FSDP or ZeRO."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class StepStats:
    """One optimizer step, the same values on every rank."""

    loss: float  # mean over the global batch's predicted tokens, nats
    grad_norm: float  # of the whole gradient, before clipping
    lr: float  # of the default parameter group
    skipped: bool  # loss or gradient was not finite: weights and momentum are as before


class Engine(Protocol):
    """A model, its optimizer and its place on the devices."""

    step: int  # train_step calls so far, skipped ones included

    def train_step(self, batch: Tensor) -> StepStats:
        """One optimizer step on this rank's rows of the global batch, int64 of shape (rows, seq_len + 1)."""
        ...

    def eval_loss(self, batches: Iterable[Tensor]) -> float:
        """Mean loss in nats a token over all ranks' batches; every rank must pass the same number of them."""
        ...

    def save(self, path: Path) -> None:
        """Write weights, optimizer state and counters into the folder ``path``, every rank its shards."""
        ...

    def load(self, path: Path) -> None:
        """Read what ``save`` wrote, on any number of ranks. Raises ValueError when it does not fit the model."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
