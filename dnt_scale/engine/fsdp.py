"""FSDP2: weights, gradients and optimizer state sharded over all ranks, block by block."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dnt_scale import checkpoint
from dnt_scale.config import RunConfig
from dnt_scale.engine.base import StepStats
from dnt_scale.model import DNT, IGNORED, initial_tensor
from dnt_scale.optim import Schedule, build_optimizer, local
from dnt_scale.ranks import Ranks


def build(config: RunConfig, model_fn: Callable[[], DNT], ranks: Ranks, total_steps: int) -> "FSDPEngine":
    """Shard ``model_fn()`` (called on the meta device), fill it, and allocate its optimizer; see ``engine.build``."""
    schedule = Schedule(config.optim.schedule, total_steps)
    with torch.device("meta"):
        model = model_fn()
    shard(model, config, ranks)
    model.to_empty(device=ranks.device)
    fill(model, config.run.seed)
    return FSDPEngine(model, build_optimizer(model.named_parameters(), config.optim), schedule, config, ranks)


def shard(model: DNT, config: RunConfig, ranks: Ranks) -> None:
    """Each block is one all-gather; the embeddings and outer norms are the root's."""
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.engine.reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy)


@torch.no_grad()
def fill(model: DNT, seed: int) -> None:
    """Initial weights: every rank draws the full tensor by name and keeps its rows, so sharding changes nothing."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        full = initial_tensor(name, parameter.shape, model.config, seed)
        window = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        local(parameter).copy_(full[window])


class FSDPEngine:
    """The engine of ``engine=fsdp``; see ``engine.base.Engine`` for the contract of each method."""

    def __init__(
        self,
        model: DNT,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        config: RunConfig,
        ranks: Ranks,
    ) -> None:
        assert isinstance(model, FSDPModule)
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.ranks = ranks
        self.micro_batch = config.train.micro_batch
        self.clip_norm = config.optim.clip_norm
        self.step = 0
        self.updates = 0  # steps that changed the weights: AdamW's bias correction counts these

    def train_step(self, batch: Tensor) -> StepStats:
        assert isinstance(self.model, FSDPModule)
        micro_batches = batch.split(self.micro_batch)
        tokens = self._sum_over_ranks((batch[:, 1:] != IGNORED).sum())
        loss_sum = torch.zeros((), device=self.ranks.device)
        for index, micro in enumerate(micro_batches):
            # one reduce-scatter a step, after the last micro-batch
            self.model.set_requires_gradient_sync(index == len(micro_batches) - 1)
            loss = self._loss_sum(micro)
            # FSDP2 averages gradients over ranks, the loss is a sum over them
            (loss * (self.ranks.world_size / tokens)).backward()
            loss_sum += loss.detach()
        mean_loss = self._sum_over_ranks(loss_sum) / tokens
        grad_norm = self._grad_norm()

        finite = math.isfinite(mean_loss) and math.isfinite(grad_norm)
        factor = self.schedule.factor(self.step)
        if finite:
            if self.clip_norm is not None and grad_norm > self.clip_norm:
                torch._foreach_mul_(self._local_grads(), self.clip_norm / grad_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            self.optimizer.step()
            self.updates += 1
        self.optimizer.zero_grad()
        self.step += 1
        return StepStats(mean_loss, grad_norm, self.optimizer.defaults["lr"] * factor, not finite)

    @torch.no_grad()
    def eval_loss(self, batches: Iterable[Tensor]) -> float:
        totals = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            totals[0] += self._loss_sum(batch).item()
            totals[1] += int((batch[:, 1:] != IGNORED).sum())
        for module in self.model.modules():  # without a backward FSDP2 leaves weights gathered: save() needs shards
            if isinstance(module, FSDPModule):
                module.reshard()
        dist.all_reduce(totals)
        return float(totals[0] / totals[1])

    def save(self, path: Path) -> None:
        checkpoint.save_tensors(path, self._tensors())

    def load(self, path: Path) -> None:
        tensors = self._tensors()
        checkpoint.load_tensors(path, tensors)
        self.step, self.updates = (int(value) for value in tensors["counters"])
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(self.updates)

    def close(self) -> None:
        self.optimizer.state.clear()

    def _tensors(self) -> dict[str, Tensor]:
        """The canonical names: model.NAME, and BUFFER.NAME for each optimizer buffer of the parameter's shape."""
        tensors: dict[str, Tensor] = {"counters": torch.tensor([self.step, self.updates])}
        for name, parameter in self.model.named_parameters():
            assert isinstance(parameter, DTensor)
            tensors[f"model.{name}"] = parameter.detach()
            for buffer, value in self.optimizer.state[parameter].items():
                if buffer != "step":
                    tensors[f"{buffer}.{name}"] = value
        return tensors

    def _loss_sum(self, micro: Tensor) -> Tensor:
        micro = micro.to(self.ranks.device, non_blocking=True)
        loss: Tensor = self.model(micro[:, :-1].clamp(min=0), micro[:, 1:])
        return loss

    def _local_grads(self) -> list[Tensor]:
        grads = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
        return [grad for grad in grads if grad.numel()]

    def _grad_norm(self) -> float:
        squares = torch.stack(torch._foreach_norm(self._local_grads())).square().sum()
        return math.sqrt(self._sum_over_ranks(squares))

    def _sum_over_ranks(self, value: Tensor) -> float:
        total = value.to(self.ranks.device, torch.float64)
        dist.all_reduce(total)
        return float(total)
