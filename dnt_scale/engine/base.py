"""What the training loop asks of an engine. The loop knows nothing of FSDP or ZeRO."""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from dnt_scale.checkpoint.tensor_shards import TensorShard
from dnt_scale.engine.late import Limits
from dnt_scale.model.batch import Batch

# (mean loss, norm of the whole gradient) -> what the gradient is multiplied by; 0.0: skip the step.
# A pure function of values that all ranks share, so that they decide alike.
Judge = Callable[[float, float], float]


@runtime_checkable
class LateJudge(Protocol):
    """A `Judge` that can also say beforehand what it goes by.

    An engine on a device that the host is ahead of judges by that there, and the host reads of the
    step, and what was made of it, later (`StepStats`).
    """

    def __call__(self, loss: float, grad_norm: float) -> float:
        """Judge as a `Judge` does; for engines that wait. Between backward and update this is
        called, or ``limits``, once.
        """
        ...

    def catch_up(self) -> bool:
        """Act on the step before, whose numbers the host has by now, and return whether that has
        changed the weights: then the backward that was handed out is to be done again, and what was
        recorded before it is there anew. Called before ``limits``.
        """
        ...

    def limits(self) -> Limits:
        """Return what the step is judged by."""
        ...


class Numbers(NamedTuple):
    """What the host knows of a step once it has waited for it, the same on every rank."""

    loss: float  # mean over the targets of the global batch that count
    grad_norm: float  # of the whole gradient, before clipping
    # the judge said so: weights and momentum are as before (without a gradient buffer: the weights)
    skipped: bool
    # what was recorded during the step (distributed/device_metrics.py), by name: numbers, or
    # scalars; on the host where they came with the loss, else maybe on the device still
    metrics: Mapping[str, Tensor | float]


class StepStats:
    """One optimizer step, the same values on every rank.

    Attributes:
        lr: of the default parameter group.
        go: on the device, where the step was judged there: a bool scalar, whether it was not
            skipped. None: the host knows.

    Args:
        numbers: the rest, or how to wait for it; the first look at any of it does that.
        arrived: whether that look would wait for nothing.
    """

    def __init__(
        self,
        lr: float,
        numbers: Numbers | Callable[[], Numbers],
        go: Tensor | None = None,
        arrived: Callable[[], bool] = lambda: True,
    ) -> None:
        self.lr = lr
        self.go = go
        self.arrived = arrived
        self._numbers = numbers

    @cached_property
    def numbers(self) -> Numbers:
        """Return what the host may have to wait for."""
        return self._numbers() if callable(self._numbers) else self._numbers

    @property
    def loss(self) -> float:
        """See `Numbers`."""
        return self.numbers.loss

    @property
    def grad_norm(self) -> float:
        """See `Numbers`."""
        return self.numbers.grad_norm

    @property
    def skipped(self) -> bool:
        """See `Numbers`."""
        return self.numbers.skipped

    @property
    def metrics(self) -> Mapping[str, Tensor | float]:
        """See `Numbers`."""
        return self.numbers.metrics

    def __eq__(self, other: object) -> bool:
        """Compare all that a step tells, and wait for it."""
        if not isinstance(other, StepStats):
            return NotImplemented
        return (self.lr, self.numbers) == (other.lr, other.numbers)

    __hash__ = None  # type: ignore[assignment]


class Engine(Protocol):
    """A model, its optimizer and its place on the devices."""

    micro_batch: int  # rows a rank a forward; may be set between steps

    def train_step(self, batch: Batch, judge: Judge) -> StepStats:
        """One optimizer step on this rank's rows of the global batch.

        ``judge`` is called once, between the backward pass and the update; a `LateJudge` may be
        asked to ``catch_up``, after which the backward pass may come again, and for its ``limits``
        instead, and the numbers of the step come late.
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
