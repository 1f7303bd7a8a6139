"""The exponential moving average of the weights over the steps (``train.ema``), of any engine.

    e <- decay e + (1 - decay) p        after an update; after the first e = p

It is what validation measures and what inference takes. A rank keeps it, in fp32, of just those
elements of the master weights that it holds, among the engine's shards as ``ema.NAME``: so it is
sharded as they are, the same on any engine and any ranks, and in checkpoints, snapshots and
comparisons of replicas like an optimizer's buffer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dnt_scale.checkpoint.tensor_shards import AVERAGE, WEIGHT, TensorShard
from dnt_scale.engine.base import Engine, Judge, StepStats
from dnt_scale.model.batch import Batch


class AveragingEngine:
    """An engine that keeps an average of another one's weights; see ``engine.base.Engine`` for each
    method's contract.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine = engine
        self.decay = decay
        self.begun = False  # whether an update is known to have been made since a refresh
        held = [shard for shard in engine.shards() if shard.name.startswith(WEIGHT)]
        self.weights = [shard.data for shard in held]
        self.averages = [
            replace(shard, name=average_of(shard.name), data=shard.data.clone()) for shard in held
        ]

    @property
    def micro_batch(self) -> int:
        return self.engine.micro_batch

    @micro_batch.setter
    def micro_batch(self, rows: int) -> None:
        self.engine.micro_batch = rows

    def train_step(self, batch: Batch, judge: Judge) -> StepStats:
        stats = self.engine.train_step(batch, judge)
        if not self.weights:
            return stats
        if self.begun and stats.go is not None:  # Nobody waits for whether it was skipped.
            self._follow_late(stats.go)
            return stats
        updates = self.engine.scalars()["updates"]
        if not stats.skipped:
            self._follow(first=updates == 1)
        self.begun = updates > 0
        return stats

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        self._exchange()
        found = self.engine.evaluate(batches)  # what it raises ends the run: no way back is needed
        self._exchange()
        return found

    def shards(self) -> list[TensorShard]:
        return [*self.engine.shards(), *self.averages]

    def gradient_shards(self) -> list[TensorShard]:
        return self.engine.gradient_shards()

    def scalars(self) -> dict[str, float]:
        return self.engine.scalars()

    def refresh(self, scalars: Mapping[str, float]) -> None:
        self.begun = scalars["updates"] > 0
        self.engine.refresh(scalars)

    def close(self) -> None:
        self.weights.clear()
        self.averages.clear()
        self.engine.close()

    @torch.no_grad()
    def _follow(self, *, first: bool) -> None:
        averages = [shard.data for shard in self.averages]
        if first:
            torch._foreach_copy_(averages, self.weights)
        else:
            torch._foreach_lerp_(averages, self.weights, 1 - self.decay)

    @torch.no_grad()
    def _follow_late(self, go: Tensor) -> None:
        """Follow where ``go``, a bool scalar on the device, is true."""
        for shard, weights in zip(self.averages, self.weights, strict=True):
            followed = torch.lerp(shard.data, weights, 1 - self.decay)
            shard.data.copy_(torch.where(go, followed, shard.data))

    @torch.no_grad()
    def _exchange(self) -> None:
        """Let weights and average change places, a tensor at a time, so that no second copy is
        needed. A collective.
        """
        for weights, shard in zip(self.weights, self.averages, strict=True):
            held = weights.clone()
            weights.copy_(shard.data)
            shard.data.copy_(held)
        self.engine.refresh(self.engine.scalars())


def average_of(name: str) -> str:
    """Return the name of a weight's average, of its name among shards."""
    return AVERAGE + name.removeprefix(WEIGHT)


def begun_from(shards: Iterable[TensorShard]) -> list[TensorShard]:
    """Return shards under the names to read them by where a checkpoint has no average: it begins
    with the weights.
    """
    return [
        replace(shard, name=WEIGHT + shard.name.removeprefix(AVERAGE))
        if shard.name.startswith(AVERAGE)
        else shard
        for shard in shards
    ]
