"""Batches: what a source yields and a model takes, which nobody between them looks into."""

from collections.abc import Callable

import torch
from torch import Tensor

IGNORED = -1  # a target that does not count in the loss

# A tensor, or tensors by name, that share dimension 0: the rows. Of text, int64 token ids (rows,
# seq_len + 1).
Batch = Tensor | dict[str, Tensor]


def each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Return the batch with each of its tensors changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    return {name: change(tensor) for name, tensor in batch.items()}


def split(batch: Batch, rows: int) -> list[Batch]:
    """Return the batch in parts of so many rows, views of it; the last one may have fewer."""
    if isinstance(batch, Tensor):
        return list(batch.split(rows))
    parts = [tensor.split(rows) for tensor in batch.values()]
    return [dict(zip(batch, tensors, strict=True)) for tensors in zip(*parts, strict=True)]


def moved(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on a device; the host does not wait for the copy, nor for what the device
    has to do before it.
    """
    if device.type == "cpu":
        return each(batch, lambda tensor: tensor.to(device))
    # From memory that is not page-locked the driver may wait for the work that is queued.
    return each(
        batch,
        lambda tensor: (tensor if tensor.is_cuda else tensor.pin_memory()).to(
            device, non_blocking=True
        ),
    )
