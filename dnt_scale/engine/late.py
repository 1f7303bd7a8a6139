"""Judge a step on its device, and let the host read it a step late.

On CUDA the host is to be ahead: it hands out the kernels of a step while those of the one before
are at work. To wait for a number in between leaves the device idle until the next kernels come. So
the verdict on a step is computed where its numbers are, the update minds it there
(``ShardedOptimizer.step(go)``), and the numbers are read while the next step's backward is at work.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """What a step is judged by: numbers that the host knows before the step's own.

    clip_norm: of the whole gradient; infinite: it is not clipped.
    loss, grad_norm: a step with more of either is a spike; infinite: there are none.
    usual: what a spike's gradient is clipped to; None: a spike is skipped, maybe undone later.
    """

    clip_norm: float = math.inf
    loss: float = math.inf
    grad_norm: float = math.inf
    usual: float | None = None

    def factor(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Return what the gradient is multiplied by, 0 to skip the step, as the host would: bit for
        bit ``Guard.judge``'s.

        The host waits for nothing.

        Args:
            loss, grad_norm: float64 scalars on the device, as is what is returned.
        """
        one = torch.ones_like(loss)
        clipped = torch.where(grad_norm > self.clip_norm, one * self.clip_norm / grad_norm, one)
        if self.usual is None:
            spiked = torch.zeros_like(loss)
        else:
            to_usual = torch.minimum(clipped, one * self.usual / grad_norm)
            spiked = torch.where(grad_norm > self.usual, to_usual, clipped)
        is_spike = (loss > self.loss) | (grad_norm > self.grad_norm)
        factor = torch.where(is_spike, spiked, clipped)
        return torch.where(loss.isfinite() & grad_norm.isfinite(), factor, 0.0)


class Late:
    """Numbers on their way to the host.

    Args:
        values: float64 (n,), on the device. What is handed to the device after this, reading does
            not wait for.
    """

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            # Page-locked, for a copy into other memory makes the host wait.
            self._host = torch.empty_like(values, device="cpu", pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = values.clone()

    @property
    def arrived(self) -> bool:
        """Whether reading waits for nothing."""
        return self._arrived is None or self._arrived.query()

    def read(self) -> list[float]:
        """Return the numbers, and wait for them where they are not there yet."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._host.tolist()
