"""Measure on the device how large weights and optimizer buffers are."""

import torch
import torch.distributed as dist
from torch import Tensor

from dnt_scale.distributed.device_metrics import record
from dnt_scale.engine.reductions import over_ranks, squared_norms
from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.setup import Training


class TensorRMS(Hook):
    """Records ``rms/weights`` and ``rms/BUFFER`` every ``measure.every`` steps.

    They are of the whole model: sqrt(sum of squares / elements) of the fp32 weights, and of each
    kind of buffer, with which the step's loss is computed. A pass over both, before the step, of
    which the host waits for nothing.
    """

    def __init__(self) -> None:
        self.kinds: list[str] = []  # of tensors, on any rank

    def before_training(self, run: Training) -> None:
        """Agree on the kinds, for a rank may hold no part of any tensor."""
        if run.config.measure.every:
            here = [shard.name.partition(".")[0] for shard in run.engine.shards()]
            found = [here] * run.ranks.world_size
            dist.all_gather_object(found, here)
            self.kinds = sorted({kind for kinds in found for kind in kinds})

    def before_step(self, run: Training) -> None:
        """Measure on the device; the values come to the host with the step's loss."""
        every = run.config.measure.every
        if every and (run.state.step + 1) % every == 0:
            for kind, rms in zip(self.kinds, self.measure(run), strict=True):
                record(f"rms/{'weights' if kind == 'model' else kind}", rms)

    @torch.no_grad()
    def measure(self, run: Training) -> Tensor:
        """Return each kind's root mean square: float64 of shape (kinds,), on the device."""
        device = run.ranks.device
        sums = torch.zeros(len(self.kinds), 2, dtype=torch.float64, device=device)
        for shard in run.engine.shards():
            if shard.replica == 0:  # which one rank holds, or the first of several
                total = sums[self.kinds.index(shard.name.partition(".")[0])]
                total[0] += squared_norms([shard.data.float()])[0].to(device)
                total[1] += shard.data.numel()
        squares, elements = over_ranks(sums, device).unbind(1)
        return (squares / elements).sqrt()
