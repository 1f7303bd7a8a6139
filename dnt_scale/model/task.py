"""What engines, memory, validation, inference and checkpointing ask of a model, and nothing
more.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dnt_scale.config import ConfigError, ModelSection
from dnt_scale.model.batch import Batch


class Task(Protocol):
    """A model and the loss that it is trained by: an ``nn.Module`` that has these members too.

    Inherit from ``nn.Module`` and from this, in that order, to have the methods that are written
    here. A task draws no random numbers in training: what is to be random is a function of its
    batch.
    """

    # The layers in the order of computing. Each is gathered and reduced as one, may be computed a
    # second time in backward (engine.activation_checkpointing), and may be compiled.
    blocks: Iterable[nn.Module]

    def fsdp_units(self) -> Sequence[nn.Module]:
        """Return what is gathered and reduced as one, in the order of computing: the blocks, and
        around them large modules (an embedding, a head) whose weights nothing uses but their own
        call, one a forward.

        What is in none is gathered from forward to the end of backward.
        """
        return list(self.blocks)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Return the loss summed over the batch's targets: an fp32 scalar."""
        ...

    def count(self, batch: Batch) -> Tensor:
        """Return how many targets count in the batch's loss: an int64 scalar, where the batch lies.

        It stands alone, for gradients are scaled by the count of the whole global batch, which has
        to be known before the first backward.
        """
        ...

    def eval_sums(self, batch: Batch) -> dict[str, Tensor]:
        """Return what validation measures, summed over the targets that count: ``loss`` and what
        else is wanted.
        """
        return {"loss": self.loss_sum(batch)}

    def initial(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """Return the fp32 CPU value that parameter ``name`` starts from: a function of these and
        the section alone.
        """
        ...

    def init_buffers(self) -> None:
        """Fill the buffers, which are there with storage of no meaning, by the section alone.

        Buffers are constants (rotary tables, means of channels): registered with
        ``persistent=False``, in no checkpoint, the same on all ranks, and of the dtype they were
        registered with on any engine.
        """
        return

    def flops_per_row(self, units_a_row: int) -> float:
        """Return the FLOPs of training on a row of so many units, forward and backward."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of ``nn.Module``."""
        ...

    def named_buffers(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
        """As of ``nn.Module``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """As of ``nn.Module``."""
        ...

    def get_submodule(self, target: str) -> nn.Module:
        """As of ``nn.Module``."""
        ...


class LossModule(nn.Module):
    """What engines shard and call: hooks of FSDP2 and DeepSpeed stand around a module's call, and
    this one is the loss.

    Parameters are named by the task inside, as if this were not there.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(self, batch: Batch, measure: bool = False) -> Tensor | dict[str, Tensor]:
        """Return the task's ``loss_sum``, or with ``measure`` its ``eval_sums``."""
        return self.task.eval_sums(batch) if measure else self.task.loss_sum(batch)


def build_task(section: ModelSection, rows: Any = None) -> Task:
    """Return the model of a section, on the current device with weights of no meaning; see
    ``ModelSection.build``.
    """
    task: Task = section.build(rows)
    return task


# --- what is known without allocating anything ----------------------------------------------------


def on_meta(section: ModelSection) -> Task:
    """Return the model on the meta device: names and shapes, no storage."""
    with torch.device("meta"), _Uninitialised():
        return build_task(section)


class _Uninitialised(TorchFunctionMode):
    """Leaves out `torch.nn.init`: drawing from a normal distribution on the meta device imports
    torch's compiler, more than a second of processor time.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def shapes_of(section: ModelSection) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter, by name."""
    return {name: tuple(parameter.shape) for name, parameter in on_meta(section).named_parameters()}


def flops_per_row(section: ModelSection, units_a_row: int) -> float:
    """Return ``Task.flops_per_row`` of a section's model."""
    return on_meta(section).flops_per_row(units_a_row)


# --- buffers --------------------------------------------------------------------------------------


def blank_buffers(task: Task, kind: str) -> dict[str, Tensor]:
    """Return the buffers of a task, by all of their names: for their shapes and dtypes.

    Raises:
        ConfigError: one of them is persistent: it would be the task's to change, and lost at a
            resume.
    """
    kept = task.state_dict().keys() - {name for name, _ in task.named_parameters()}
    buffers = dict(task.named_buffers(remove_duplicate=False))
    if lost := sorted(kept & buffers.keys()):
        raise ConfigError(
            f"model.kind is {kind}, whose buffer {lost[0]} is persistent, but checkpoints hold "
            "weights and the optimizer's state only; register it with persistent=False and fill it "
            "in init_buffers"
        )
    return buffers


@torch.no_grad()
def fill_buffers(task: Task, blank: Mapping[str, Tensor], device: torch.device) -> None:
    """Make the buffers of a task anew on a device, of the shapes and dtypes of ``blank``, and fill
    them.

    Engines call it last, whatever they have done to the buffers before: DeepSpeed casts them with
    the weights.

    Raises:
        ConfigError: ``init_buffers`` leaves one without values.
    """
    made: dict[int, Tensor] = {}  # one tensor may have several names
    for name, like in blank.items():
        if id(like) not in made:
            empty = torch.nan if like.is_floating_point() else 0
            made[id(like)] = torch.full(like.shape, empty, dtype=like.dtype, device=device)
        owner, _, attribute = name.rpartition(".")
        setattr(task.get_submodule(owner), attribute, made[id(like)])
    with device:
        task.init_buffers()
    for name, buffer in task.named_buffers():
        if buffer.is_floating_point() and buffer.isnan().any():
            raise ConfigError(
                f"{type(task).__name__}.init_buffers: leaves {name} without values (found nan); "
                "fill every buffer there"
            )
