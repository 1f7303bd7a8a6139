"""``optim.gradient_buffer: false``: backward adds gradients to the momentum and frees them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from dnt_scale.config import OptimizerConfig
from dnt_scale.distributed import device_metrics
from dnt_scale.engine.reductions import squared_norms
from dnt_scale.optim.sharded_optimizer import ShardedOptimizer

if TYPE_CHECKING:
    from dnt_scale.engine.fsdp import ParameterShard


class MomentumInBackward:
    """Add gradients to the momentum inside backward, once a unit's are reduced, and free them.

    The reported norm is then the mean over micro-batches of the norm of each one's own gradient:
    the whole gradient's if there is one micro-batch, else never less than that. ``optim.clip:
    previous`` goes by it, and a run's first step therefore computes its gradient twice, the first
    time for the norm alone. ``clip: tensor`` bounds each tensor's gradient of each micro-batch so
    that their sum keeps within ``clip_norm``. Where a gradient is not finite, that rank's rows of
    the tensor (with ``clip: tensor``, the tensor) add nothing, and the norm is nan.

    Args:
        units: the parameters whose gradients arrive together.
        shards: the ranks that share a copy of the model.
        device: the rank's.
    """

    sum_copies_each_time = True  # a gradient that is freed cannot be summed over copies later
    # The next backward needs the last norm, and random bits that are a function of the updates.
    skips_on_device = False

    def __init__(
        self,
        optimizer: ShardedOptimizer,
        config: OptimizerConfig,
        units: Iterable[Sequence["ParameterShard"]],
        shards: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self.optimizer = optimizer
        self.clip = config.clip if config.clip_norm is not None else None
        self.clip_norm = config.clip_norm or math.inf
        self.shards = shards
        self.device = device
        self.previous_norm = 0.0  # of the last step that was not skipped; 0: none yet
        self.measure_only = False
        self.micro_batch = 0
        self.micro_batches = 1
        self.squares_M = torch.zeros(1, dtype=torch.float64, device=device)
        for members in units:
            for part in members:
                hook = partial(self.on_gradients_ready, members)
                part.parameter.register_post_accumulate_grad_hook(hook)

    def before_step(self, backward: Callable[[], tuple[float, float]]) -> None:
        """Measure the gradient's norm where clipping has none yet: a backward that adds nothing."""
        if self.clip != "previous" or self.previous_norm != 0.0:
            return
        self.measure_only = True
        try:
            with device_metrics.ignored():  # The pass is of no step; what hooks recorded stays.
                _, norm = backward()
        finally:
            self.measure_only = False
        self.previous_norm = norm if math.isfinite(norm) else 0.0

    def before_micro_batch(self, number: int, micro_batches: int) -> None:
        self.micro_batch, self.micro_batches = number, micro_batches
        if number == 0:
            self.squares_M = torch.zeros(micro_batches, dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def on_gradients_ready(self, members: Sequence["ParameterShard"], _: Tensor) -> None:
        """Take a unit's gradients: each parameter's hook, of which the last one finds them all.

        They are one storage, so that none can be freed before all are there.
        """
        if any(part.parameter.grad is None for part in members):
            return
        grads = [part.grad for part in members]
        squares = squared_norms(grads)
        self.squares_M[self.micro_batch] += squares.sum().to(self.device)
        if not self.measure_only:
            first = self.micro_batch == 0
            scales = self._scales(squares)
            for part, grad, square, scale in zip(members, grads, squares, scales, strict=True):
                if grad.numel():
                    grad.masked_fill_(~square.isfinite(), 0.0)
                    self.optimizer.add_gradient(part.rows, grad, scale=scale, first=first)
        for part, grad in zip(members, grads, strict=True):
            part.parameter.grad = None
            _free(grad)

    def norm_squares(self) -> Tensor:
        """Return each micro-batch's own."""
        return self.squares_M

    def grad_norm(self, squares: Sequence[float]) -> float:
        return math.fsum(math.sqrt(square) for square in squares)

    def update(self, factor: float, grad_norm: float) -> None:
        """Move the weights by the momentum; ``factor`` comes too late, clipping was done before."""
        self.optimizer.apply()
        self.previous_norm = grad_norm

    def late_grad_norm(self, squares: Tensor) -> Tensor:
        raise NotImplementedError("see skips_on_device")

    def update_late(self, factor: Tensor, go: Tensor) -> None:
        raise NotImplementedError("see skips_on_device")

    def scalars(self) -> dict[str, float]:
        return {"previous_norm": self.previous_norm}

    def refresh(self, scalars: Mapping[str, float]) -> None:
        self.previous_norm = scalars.get("previous_norm", 0.0)

    def _scales(self, squares: Tensor) -> Sequence[float | Tensor]:
        """Return what each gradient is multiplied by.

        Args:
            squares: squared norms of this rank's rows, float64 (members,).
        """
        if self.clip == "tensor":
            whole = squares.to(self.device, copy=True)
            dist.all_reduce(whole, group=self.shards)
            scales = (self.clip_norm * (1.0 / self.micro_batches) / whole.sqrt()).clamp(max=1.0)
            return scales.nan_to_num(nan=0.0).to(squares.device, torch.float32).unbind()
        if self.clip is None:
            return [1.0] * len(squares)
        if not self.previous_norm:  # It was just measured and not finite, nor will this one be.
            return [0.0] * len(squares)
        return [min(1.0, self.clip_norm / self.previous_norm)] * len(squares)


def _free(grad: Tensor) -> None:
    """Give the memory back; FSDP2 may hold the tensor until backward ends, to sum over copies."""
    storage = grad.untyped_storage()
    if grad.device.type != "cpu":
        # The stream that allocated it must not use it again before this one is done.
        grad.record_stream(torch.accelerator.current_stream())
    if storage.size():
        storage.resize_(0)
