"""DeepSpeed ZeRO 0 to 3: forward, backward, reduction and sharding are DeepSpeed's; the optimizer
is ours.

Our optimizer steps DeepSpeed's flat fp32 partitions, so its buffers are sharded as the master
weights are. Between the backward pass and DeepSpeed's step we measure the gradient and let the
judge scale or drop it.
"""

import gc
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from dnt_scale.checkpoint.tensor_shards import TensorShard, flat_shards
from dnt_scale.config import DeepSpeedEngineConfig, RunConfig, Spans
from dnt_scale.config.deepspeed_json import JSON, deepspeed_json
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.engine.accumulate_then_step import scale
from dnt_scale.engine.base import Judge, Numbers, StepStats
from dnt_scale.engine.parallelize import prepare_blocks
from dnt_scale.engine.reductions import (
    EvalSums,
    over_ranks,
    read_over_ranks,
    recorded_over_ranks,
    squared_norms,
)
from dnt_scale.engine.zero_internals import Partitions, ZeroSlice, free, join, partitions
from dnt_scale.model.batch import Batch, moved, split
from dnt_scale.model.task import LossModule, Task, blank_buffers, fill_buffers
from dnt_scale.optim.build import build_optimizer
from dnt_scale.optim.clipping import bounds, factors
from dnt_scale.optim.schedule import Schedule
from dnt_scale.optim.segments import Division, Segment
from dnt_scale.optim.sharded_optimizer import ShardedOptimizer
from dnt_scale.optim.transfer import Ratios


def build(
    config: RunConfig,
    model_fn: Callable[[], Task],
    ranks: Ranks,
    total_steps: int,
    lr_ratios: Ratios | None = None,
    spans: Spans = (),
) -> "DeepSpeedEngine":
    """Shard ``model_fn()`` as ``engine.name`` says, fill it, and allocate its optimizer; see
    ``engine.build``.

    Raises:
        ConfigError: an optimizer group or a schedule that does not fit the model or the run, a
            value that DeepSpeed does not take, or a release of DeepSpeed that lacks what we rely
            on.
    """
    assert isinstance(config.engine, DeepSpeedEngineConfig)
    schedule = Schedule(config.optim.schedule, total_steps, spans)
    with torch.device("meta"):
        blank = model_fn()
    buffers = blank_buffers(blank, config.model.kind)
    optimizer = build_optimizer(blank.named_parameters(), config.optim, config.run.seed, lr_ratios)
    join(ranks)
    import deepspeed

    json = deepspeed_json(config, ranks.world_size, pin_memory=ranks.device.type == "cuda")
    stage, bf16 = config.engine.stage, config.train.dtype == "bf16"
    if stage == 3:
        model = _sharded(model_fn, json)
    else:  # filled below; in stage 0 the weights are the fp32 masters
        model = LossModule(blank)
        model = (model.to(torch.bfloat16) if bf16 and stage else model).to_empty(
            device=ranks.device
        )
    task = model.task
    prepare_blocks(task, config)
    named = dict(task.named_parameters())
    for group in optimizer.param_groups:  # made from blank: ZeRO 3's parameters have no shape
        group["params"] = [named[name] for name in group["names"]]
    if bf16 and not stage:
        _compute_in_bf16(model)
    engine = deepspeed.initialize(
        model=model, optimizer=optimizer, config=json, dist_init_required=False
    )[0]
    zero = partitions(engine, {parameter: name for name, parameter in named.items()})
    parts = zero.parts()
    with zero.groups_filled():
        if not zero.replicated:
            optimizer.segments.update(_segments(parts))
        optimizer.division = Division(device=ranks.device)
        optimizer.allocate()
    _fill(parts, task, config.run.seed)
    fill_buffers(task, buffers, ranks.device)
    zero.refresh()
    return DeepSpeedEngine(engine, task, optimizer, zero, parts, schedule, config, ranks)


class _InBf16(nn.Module):
    """A weight as the model sees it: a bf16 copy, whose gradient is added to the fp32 weight's."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(torch.bfloat16)


def _compute_in_bf16(model: nn.Module) -> None:
    """For stage 0, where DeepSpeed's own bf16 would sum and reduce gradients in bf16."""
    for module in list(model.modules()):
        for name, _ in list(module.named_parameters(recurse=False)):
            # unsafe: its dtype is another
            register_parametrization(module, name, _InBf16(), unsafe=True)


def _sharded(model_fn: Callable[[], Task], json: JSON) -> LossModule:
    """The model, each module's parameters divided over the ranks as soon as they are made."""
    import deepspeed

    with torch.random.fork_rng(), deepspeed.zero.Init(config_dict_or_path=json):
        return LossModule(model_fn())


def _segments(parts: list[ZeroSlice]) -> dict[Tensor, list[Segment]]:
    """Return where parameters lie in the flat tensors, in the order of ``parts``."""
    segments: dict[Tensor, list[Segment]] = {}
    for part in parts:
        place = Segment(part.shape, part.start, part.offset, part.length)
        segments.setdefault(part.flat, []).append(place)
    return segments


@torch.no_grad()
def _fill(parts: list[ZeroSlice], task: Task, seed: int) -> None:
    """Initial master weights: every rank draws a tensor by name and keeps its part, one tensor
    at a time.
    """
    for part in parts:
        if part.length:
            full = task.initial(part.name, torch.Size(part.shape), seed)
            part.of(part.flat).copy_(full.view(-1)[part.start : part.start + part.length])


class DeepSpeedEngine:
    """The engine of ``engine=zero0`` to ``zero3``; see ``engine.base.Engine`` for the contract
    of each method.
    """

    def __init__(
        self,
        engine: Any,
        task: Task,
        optimizer: ShardedOptimizer,
        zero: Partitions,
        parts: list[ZeroSlice],
        schedule: Schedule,
        config: RunConfig,
        ranks: Ranks,
    ) -> None:
        self.engine = engine
        self.task = task
        self.optimizer = optimizer
        self.zero = zero
        self.parts = parts
        self.schedule = schedule
        self.ranks = ranks
        self.micro_batch = config.train.rows_a_forward
        self.bounds = bounds([part.name for part in parts], config.optim)
        self.step = 0
        self.updates = 0  # steps that changed the weights

    def train_step(self, batch: Batch, judge: Judge) -> StepStats:
        micro_batches = split(batch, self.micro_batch)
        targets = float(over_ranks(self.task.count(batch), self.ranks.device))
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        self.engine.train()
        for index, micro in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            loss = self.engine(moved(micro, self.ranks.device))
            # DeepSpeed averages gradients over ranks, the loss is a sum over them
            self.engine.backward(loss * (self.ranks.world_size / targets), scale_wrt_gas=False)
            loss_sum += loss.detach()
        gradients = self.zero.gradients()
        # also of a gradient that all ranks have: their sums may differ in the last bit, and all
        # must decide alike
        whole = squared_norms(gradients).sum().to(loss_sum)
        squares = torch.stack([whole, *self._bounded_squares()])
        copies = self.ranks.world_size if self.zero.replicated else 1
        totals, metrics = read_over_ranks(
            torch.cat([loss_sum[None], squares / copies]), self.ranks.device
        )
        mean_loss, grad_norm, bounded = totals[0] / targets, math.sqrt(totals[1]), totals[2:]

        lr_factor = self.schedule.factor(self.step)
        factor = judge(mean_loss, grad_norm)
        if factor:
            if self.bounds:
                places, runs = self._runs()
                own = factors(self.bounds, bounded, factor, len(self.parts))
                scale(runs, [own[place] for place in places])
            else:
                scale(gradients, [factor] * len(gradients))
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * lr_factor
            self.optimizer.updates = self.updates
            del gradients  # DeepSpeed frees them as it goes
            self.engine.step()
            assert self.engine.was_step_applied(), (
                "DeepSpeed skipped a step that the judge let through"
            )
            self.updates += 1
        else:
            self.zero.drop()
        self.step += 1
        metrics |= recorded_over_ranks(self.ranks.device)
        lr = self.optimizer.defaults["lr"] * lr_factor
        return StepStats(lr, Numbers(mean_loss, grad_norm, not factor, metrics))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        self.engine.eval()
        sums = EvalSums(self.task, self.ranks.device)
        for batch in batches:
            sums.add(self.engine(moved(batch, self.ranks.device), measure=True), batch)
        return sums.means()

    def shards(self) -> list[TensorShard]:
        replica, replicas = (
            (self.ranks.rank, self.ranks.world_size) if self.zero.replicated else (0, 1)
        )
        shards: list[TensorShard] = []
        places: dict[Tensor, int] = {}  # of the part in its flat tensor
        for part in self.parts:
            held = {"model": part.flat, **self.optimizer.buffers(part.flat)}
            for kind, buffer in held.items():
                run = part.of(buffer)
                shards += flat_shards(
                    f"{kind}.{part.name}", part.shape, part.start, run, replica, replicas
                )
            place = places[part.flat] = places.get(part.flat, -1) + 1
            for kind, rows in self.optimizer.row_buffers(part.flat).items():  # all, on every rank
                rank, ranks = self.ranks.rank, self.ranks.world_size
                name, shape = f"{kind}.{part.name}", part.shape[:1]
                shards.append(TensorShard(name, shape, (0,), rows[place], rank, ranks))
        return shards

    def gradient_shards(self) -> list[TensorShard]:
        replica, replicas = (
            (self.ranks.rank, self.ranks.world_size) if self.zero.replicated else (0, 1)
        )
        shards: list[TensorShard] = []
        for part, run in self.zero.gradient_runs(self.parts):
            shards += flat_shards(
                f"grad.{part.name}", part.shape, part.start, run, replica, replicas
            )
        return shards

    def scalars(self) -> dict[str, float]:
        return {"step": self.step, "updates": self.updates}

    def refresh(self, scalars: Mapping[str, float]) -> None:
        self.step, self.updates = int(scalars["step"]), int(scalars["updates"])
        self.optimizer.set_updates(self.updates)
        self.zero.refresh()

    def _runs(self) -> tuple[list[int], list[Tensor]]:
        """Return of which of ``parts`` this rank holds a gradient, by place, and the gradients."""
        place_of = {id(part): place for place, part in enumerate(self.parts)}
        found = [(place_of[id(part)], run) for part, run in self.zero.gradient_runs(self.parts)]
        return [place for place, _ in found], [run for _, run in found]

    def _bounded_squares(self) -> list[Tensor]:
        """Return this rank's part of the squared norm of each of ``bounds``, float64 scalars."""
        if not self.bounds:
            return []
        places, runs = self._runs()
        squares = torch.zeros(len(self.parts), dtype=torch.float64, device=self.ranks.device)
        if runs:
            squares[places] = squared_norms(runs).to(self.ranks.device)
        return [squares[bound.members].sum() for bound in self.bounds]

    def close(self) -> None:
        self.optimizer.state.clear()
        free(self.engine)
        del self.engine, self.task, self.optimizer, self.zero, self.parts
        gc.collect()  # DeepSpeed's objects refer to each other
