"""What the training loop asks of an engine. The loop knows nothing of FSDP or ZeRO."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from dnt_scale.checkpoint.tensor_shards import TensorShard
from dnt_scale.model.batch import Batch

# (mean loss, norm of the whole gradient) -> what the gradient is multiplied by; 0.0: skip the step.
# A pure function of values that all ranks share, so that they decide alike.
Judge = Callable[[float, float], float]


@dataclass(frozen=True)
class StepStats:
    """One optimizer step, the same values on every rank."""

    loss: float  # mean over the targets of the global batch that count
    grad_norm: float  # of the whole gradient, before clipping
    lr: float  # of the default parameter group
    # the judge said so: weights and momentum are as before (without a gradient buffer: the weights)
    skipped: bool
    # what was recorded during the step (distributed/device_metrics.py), by name: scalars, on the
    # host where they came with the loss, on the device where they were measured after it
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Engine(Protocol):
    """A model, its optimizer and its place on the devices."""

    micro_batch: int  # rows a rank a forward; may be set between steps

    def train_step(self, batch: Batch, judge: Judge) -> StepStats:
        """One optimizer step on this rank's rows of the global batch.

        ``judge`` is called once, between the backward pass and the update.
        """
        ...

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The mean of the loss, and of what else the task measures (``Task.eval_sums``), over the
        targets of all ranks' batches; every rank must pass the same number of them."""
        ...

    def shards(self) -> list[TensorShard]:
        """This rank's parts of every weight (fp32 master) and optimizer buffer, as views.

        The shards of all ranks cover each tensor; where several ranks hold the same one,
        ``replica`` numbers them.
        """
        ...

    def gradient_shards(self) -> list[TensorShard]:
        """This rank's parts of the global batch's gradient, ``grad.NAME``, as ``shards`` has the
        weights; views, to be looked at while ``judge`` is called and not kept.

        They are summed over micro-batches and ranks, and not clipped yet. Empty where the gradient
        is gone by then (``optim.gradient_buffer: false``).
        """
        ...

    def scalars(self) -> dict[str, float]:
        """What a checkpoint holds beside tensors: ``step`` (train_step calls so far), ``updates``
        (those that changed the weights), and what else the engine counts. The same on every
        rank."""
        ...

    def refresh(self, scalars: Mapping[str, float]) -> None:
        """Take over new contents of the shards, which were written in place, and ``scalars`` with
        them.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
