"""Sums that engines make: squares of gradients, and anything over the ranks."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dnt_scale.distributed import device_metrics
from dnt_scale.model.batch import Batch
from dnt_scale.model.task import Task

# elements whose squares torch may add up in fp32 on a CPU, one after the other: 1e7 are 4e-4 wrong,
# these 2e-7
PIECE = 1 << 16


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The squared norm of each of fp32 ``tensors``: float64 of shape (len(tensors),), on their
    device.

    Right to 1e-6 of itself however large a tensor is; not finite where the tensor is not.
    """
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(list(tensors))).double().square()
    norms = [
        torch.stack(torch._foreach_norm(tensor.reshape(-1).split(PIECE))) for tensor in tensors
    ]
    return torch.stack([pieces.double().square().sum() for pieces in norms])


def over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """The sum over all ranks of ``values``, whose shape it has: float64, on ``device``. A
    collective.
    """
    # What the host counted goes to the device without a wait for the work that is queued there.
    wide, from_host = values.detach().double(), values.device.type == "cpu"
    total = wide.to(device, copy=True, non_blocking=from_host)
    dist.all_reduce(total)
    return total


class EvalSums:
    """Sums of what a task measures in validation, float64 on a device, and their means over all
    ranks.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task = task
        self.device = device
        self.totals: dict[str, Tensor] = {}
        self.targets = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, sums: Mapping[str, Tensor], batch: Batch) -> None:
        """Add what ``Task.eval_sums`` gave for a batch."""
        for name, value in sums.items():
            self.totals.setdefault(name, torch.zeros_like(self.targets)).add_(value)
        self.targets += self.task.count(batch).to(self.device)

    def means(self) -> dict[str, float]:
        """Return the mean over all targets of all ranks, by name. A collective."""
        *sums, targets = over_ranks(
            torch.stack([*self.totals.values(), self.targets]), self.device
        ).tolist()
        return {name: value / targets for name, value in zip(self.totals, sums, strict=True)}


def with_recorded(values: Tensor, device: torch.device) -> tuple[Tensor, Tensor, list[str]]:
    """Return the sums over all ranks of ``values``, of shape (n,), and of the metrics that were
    recorded until now. A collective, one for all of them.

    Returns:
        The sums, float64 (n,); of each metric its sum and count, float64 (2 metrics,), both on the
        device; and the metrics' names.
    """
    names, recorded = device_metrics.take(device)
    own = values.detach().to(device, torch.float64)
    totals = over_ranks(torch.cat([own, recorded.flatten()]), device)
    return totals[: len(own)], totals[len(own) :], names


def means_by_name(sums: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the metrics of ``with_recorded``: float64 scalars, where their sums are."""
    pairs = sums.view(-1, 2)
    return dict(zip(names, (pairs[:, 0] / pairs[:, 1]).unbind(), strict=True))


def read_over_ranks(values: Tensor, device: torch.device) -> tuple[list[float], dict[str, Tensor]]:
    """Return the sums over all ranks of ``values``, of shape (n,), and the metrics that were
    recorded until now.

    The host waits for the device here, once for all of them. A collective.

    Returns:
        The sums, and the means by name: float64 scalars on the host, the same on every rank.
    """
    sums, recorded, names = with_recorded(values, device)
    totals = torch.cat([sums, recorded]).cpu()
    return totals[: len(sums)].tolist(), means_by_name(totals[len(sums) :], names)


def recorded_over_ranks(device: torch.device) -> dict[str, Tensor]:
    """Return the metrics recorded since the last wait, by name: float64 scalars that are still on
    ``device``.

    A collective where any were recorded, which is so on all ranks or on none.
    """
    names, recorded = device_metrics.take(device)
    if not names:
        return {}
    return means_by_name(over_ranks(recorded, device), names)
