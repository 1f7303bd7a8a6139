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
    total = values.detach().to(device, torch.float64, copy=True)
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


def read_over_ranks(values: Tensor, device: torch.device) -> tuple[list[float], dict[str, Tensor]]:
    """Return the sums over all ranks of ``values``, of shape (n,), and the metrics that were
    recorded until now.

    The host waits for the device here, once for all of them. A collective.

    Returns:
        The sums, and the means by name: float64 scalars on the host, the same on every rank.
    """
    names, recorded = device_metrics.take(device)
    own = values.detach().to(device, torch.float64)
    totals = over_ranks(torch.cat([own, recorded.flatten()]), device).cpu()
    means = totals[len(own) :].view(-1, 2)
    return totals[: len(own)].tolist(), dict(zip(names, means[:, 0] / means[:, 1], strict=True))


def recorded_over_ranks(device: torch.device) -> dict[str, Tensor]:
    """Return the metrics recorded since the last wait, by name: float64 scalars that are still on
    ``device``.

    A collective where any were recorded, which is so on all ranks or on none.
    """
    names, recorded = device_metrics.take(device)
    if not names:
        return {}
    totals = over_ranks(recorded, device)
    return dict(zip(names, (totals[:, 0] / totals[:, 1]).unbind(), strict=True))
