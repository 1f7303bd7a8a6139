"""DeepSpeed ZeRO 0 to 3: forward, backward, reduction and sharding are DeepSpeed's; the optimizer is ours.

Our optimizer steps DeepSpeed's flat fp32 partitions, so its buffers are sharded as the master weights are. Between the
backward pass and DeepSpeed's step we measure the gradient and let the judge scale or drop it.
"""

import gc
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from dnt_scale.checkpoint.tensor_shards import Box, flat_boxes
from dnt_scale.config import DeepSpeedEngineConfig, RunConfig
from dnt_scale.config.deepspeed_json import JSON, deepspeed_json
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.engine.base import Judge, StepStats
from dnt_scale.engine.parallelize import prepare_blocks
from dnt_scale.engine.reductions import over_ranks, read_over_ranks, recorded_over_ranks, squared_norms
from dnt_scale.engine.zero_internals import Part, Partitions, free, join, partitions
from dnt_scale.model.dnt import DNT, IGNORED
from dnt_scale.model.init import initial_tensor
from dnt_scale.optim.build import allocate, build_optimizer, set_updates
from dnt_scale.optim.msgdw import MSGDW, Segment
from dnt_scale.optim.schedule import Schedule


def build(config: RunConfig, model_fn: Callable[[], DNT], ranks: Ranks, total_steps: int) -> "DeepSpeedEngine":
    """Shard ``model_fn()`` as ``engine.name`` says, fill it, and allocate its optimizer; see ``engine.build``.

    Raises:
        ConfigError: an optimizer group or a schedule that does not fit the model or the run, a value that DeepSpeed
            does not take, or a release of DeepSpeed that lacks what we rely on.
    """
    assert isinstance(config.engine, DeepSpeedEngineConfig)
    schedule = Schedule(config.optim.schedule, total_steps)
    with torch.device("meta"):
        blank = model_fn()
    optimizer = build_optimizer(blank.named_parameters(), config.optim, config.run.seed)
    join(ranks)
    import deepspeed

    json = deepspeed_json(config, ranks.world_size, pin_memory=ranks.device.type == "cuda")
    stage, bf16 = config.engine.stage, config.train.dtype == "bf16"
    if stage == 3:
        model = _sharded(model_fn, json)
    else:  # filled below; in stage 0 the weights are the fp32 masters
        model = (blank.to(torch.bfloat16) if bf16 and stage else blank).to_empty(device=ranks.device)
    prepare_blocks(model, config)
    named = dict(model.named_parameters())
    for group in optimizer.param_groups:  # made from blank: ZeRO 3's parameters have no shape
        group["params"] = [named[name] for name in group["names"]]
    if bf16 and not stage:
        _compute_in_bf16(model)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=json, dist_init_required=False)[0]
    zero = partitions(engine, {parameter: name for name, parameter in named.items()})
    parts = zero.parts()
    with zero.groups_filled():
        if isinstance(optimizer, MSGDW):
            optimizer.segments.update(_segments(optimizer, parts))
        allocate(optimizer)
    _fill(parts, config)
    zero.refresh()
    return DeepSpeedEngine(engine, optimizer, zero, parts, schedule, config, ranks)


class _InBf16(nn.Module):
    """A weight as the model sees it: a bf16 copy, whose gradient is added to the fp32 weight's."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(torch.bfloat16)


def _compute_in_bf16(model: DNT) -> None:
    """For stage 0, where DeepSpeed's own bf16 would sum and reduce gradients in bf16."""
    for module in list(model.modules()):
        for name, _ in list(module.named_parameters(recurse=False)):
            register_parametrization(module, name, _InBf16(), unsafe=True)  # unsafe: its dtype is another


def _sharded(model_fn: Callable[[], DNT], json: JSON) -> DNT:
    """The model, each module's parameters divided over the ranks as soon as they are made."""
    import deepspeed

    with torch.random.fork_rng(), deepspeed.zero.Init(config_dict_or_path=json):
        return model_fn()


def _segments(optimizer: MSGDW, parts: list[Part]) -> dict[Tensor, list[Segment]]:
    """Where the rows of row-normalised parameters lie in flat tensors."""
    segments: dict[Tensor, list[Segment]] = {}
    for group in optimizer.param_groups:
        if group["update"] == "row_normalized":
            for flat in group["params"]:
                if flat.dim() == 1:
                    segments[flat] = [Segment(p.shape, p.start, p.offset, p.length) for p in parts if p.flat is flat]
    return segments


@torch.no_grad()
def _fill(parts: list[Part], config: RunConfig) -> None:
    """Initial master weights: every rank draws a tensor by name and keeps its part, one tensor at a time."""
    for part in parts:
        if part.length:
            full = initial_tensor(part.name, torch.Size(part.shape), config.model, config.run.seed)
            part.of(part.flat).copy_(full.view(-1)[part.start : part.start + part.length])


class DeepSpeedEngine:
    """The engine of ``engine=zero0`` to ``zero3``; see ``engine.base.Engine`` for the contract of each method."""

    def __init__(
        self,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        zero: Partitions,
        parts: list[Part],
        schedule: Schedule,
        config: RunConfig,
        ranks: Ranks,
    ) -> None:
        self.engine = engine
        self.optimizer = optimizer
        self.zero = zero
        self.parts = parts
        self.schedule = schedule
        self.ranks = ranks
        self.micro_batch = config.train.micro_batch
        self.step = 0
        self.updates = 0  # steps that changed the weights

    def train_step(self, batch: Tensor, judge: Judge) -> StepStats:
        micro_batches = batch.split(self.micro_batch)
        tokens = float(over_ranks((batch[:, 1:] != IGNORED).sum(), self.ranks.device))
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        self.engine.train()
        for index, micro in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            loss = self._loss_sum(micro)
            # DeepSpeed averages gradients over ranks, the loss is a sum over them
            self.engine.backward(loss * (self.ranks.world_size / tokens), scale_wrt_gas=False)
            loss_sum += loss.detach()
        gradients = self.zero.gradients()
        # also of a gradient that all ranks have: their sums may differ in the last bit, and all must decide alike
        squares = squared_norms(gradients).sum() / (self.ranks.world_size if self.zero.replicated else 1)
        totals, metrics = read_over_ranks(torch.stack([loss_sum, squares.to(loss_sum)]), self.ranks.device)
        mean_loss, grad_norm = totals[0] / tokens, math.sqrt(totals[1])

        lr_factor = self.schedule.factor(self.step)
        factor = judge(mean_loss, grad_norm)
        if factor:
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * lr_factor
            if isinstance(self.optimizer, MSGDW):
                self.optimizer.updates = self.updates
            del gradients  # DeepSpeed frees them as it goes
            self.engine.step()
            assert self.engine.was_step_applied(), "DeepSpeed skipped a step that the judge let through"
            self.updates += 1
        else:
            self.zero.drop()
        self.step += 1
        metrics |= recorded_over_ranks(self.ranks.device)
        return StepStats(mean_loss, grad_norm, self.optimizer.defaults["lr"] * lr_factor, not factor, metrics)

    @torch.no_grad()
    def eval_loss(self, batches: Iterable[Tensor]) -> float:
        self.engine.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        for batch in batches:
            totals[0] += self._loss_sum(batch)
            totals[1] += (batch[:, 1:] != IGNORED).sum().to(self.ranks.device)
        loss_sum, tokens = over_ranks(totals, self.ranks.device).tolist()
        return float(loss_sum / tokens)

    def boxes(self) -> list[Box]:
        replica, replicas = (self.ranks.rank, self.ranks.world_size) if self.zero.replicated else (0, 1)
        boxes: list[Box] = []
        for part in self.parts:
            held = {"model": part.flat, **self.optimizer.state[part.flat]}
            held.pop("step", None)  # AdamW's count of updates
            for kind, buffer in held.items():
                run = part.of(buffer)
                boxes += flat_boxes(f"{kind}.{part.name}", part.shape, part.start, run, replica, replicas)
        return boxes

    def scalars(self) -> dict[str, float]:
        return {"step": self.step, "updates": self.updates}

    def refresh(self, scalars: Mapping[str, float]) -> None:
        self.step, self.updates = int(scalars["step"]), int(scalars["updates"])
        set_updates(self.optimizer, self.updates)
        self.zero.refresh()

    def close(self) -> None:
        self.optimizer.state.clear()
        free(self.engine)
        del self.engine, self.optimizer, self.zero, self.parts
        gc.collect()  # DeepSpeed's objects refer to each other

    def _loss_sum(self, micro: Tensor) -> Tensor:
        micro = micro.to(self.ranks.device, non_blocking=True)
        loss: Tensor = self.engine(micro[:, :-1].clamp(min=0), micro[:, 1:])
        return loss
