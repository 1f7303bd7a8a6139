"""FSDP2: weights, gradients and optimizer state sharded over the ranks, unit by unit; ddp and
hsdp keep copies.
"""

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dnt_scale.checkpoint.tensor_shards import TensorShard
from dnt_scale.config import RunConfig, Spans, TorchEngineConfig
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.engine.accumulate_then_step import AccumulateThenStep, GradientStrategy
from dnt_scale.engine.base import Judge, LateJudge, Numbers, StepStats
from dnt_scale.engine.late import Late, Limits
from dnt_scale.engine.momentum_in_backward import MomentumInBackward
from dnt_scale.engine.parallelize import parallelize
from dnt_scale.engine.reductions import (
    EvalSums,
    means_by_name,
    over_ranks,
    recorded_over_ranks,
    with_recorded,
)
from dnt_scale.model.batch import Batch, moved, split
from dnt_scale.model.task import LossModule, Task, blank_buffers, fill_buffers
from dnt_scale.optim.build import build_optimizer
from dnt_scale.optim.clipping import bounds
from dnt_scale.optim.schedule import Schedule
from dnt_scale.optim.segments import Division, Segment
from dnt_scale.optim.sharded_optimizer import ShardedOptimizer
from dnt_scale.optim.shards import local
from dnt_scale.optim.transfer import Ratios


@dataclass(frozen=True, eq=False)
class ParameterShard:
    """This rank's rows of a parameter.

    The optimizer steps ``rows`` and not FSDP2's parameter, whose storage they are: it then meets
    plain tensors only, which its fused kernels take, and DTensors leave no host objects behind each
    step (torchtitan #3790).
    """

    name: str
    parameter: DTensor  # FSDP2's; backward leaves the gradient here
    # fp32, (rows of this rank, ...); 0 rows where there are more ranks than rows
    rows: nn.Parameter
    offset: tuple[int, ...]  # of the rows in the whole tensor

    @property
    def segment(self) -> Segment:
        """The place of the rows in the whole tensor."""
        shape = tuple(self.parameter.shape)
        return Segment(shape, self.offset[0] * math.prod(shape[1:]), 0, self.rows.numel())

    @property
    def grad(self) -> Tensor:
        """Of the rows."""
        assert self.parameter.grad is not None
        return local(self.parameter.grad)


def build(
    config: RunConfig,
    model_fn: Callable[[], Task],
    ranks: Ranks,
    total_steps: int,
    lr_ratios: Ratios | None = None,
    spans: Spans = (),
) -> "FSDPEngine":
    """Shard ``model_fn()`` (called on the meta device), fill it, and allocate its optimizer; see
    ``engine.build``.
    """
    assert isinstance(config.engine, TorchEngineConfig)
    schedule = Schedule(config.optim.schedule, total_steps, spans)
    with torch.device("meta"):
        task = model_fn()
    buffers = blank_buffers(task, config.model.kind)
    model = LossModule(task)
    parallelize(model, config, ranks)
    model.to_empty(device="cpu" if config.engine.cpu_offload else ranks.device)
    fill_buffers(task, buffers, ranks.device)
    parts = [_part(name, parameter) for name, parameter in task.named_parameters()]
    fill(parts, task, config.run.seed)
    optimizer = build_optimizer(
        [(part.name, part.rows) for part in parts], config.optim, config.run.seed, lr_ratios
    )
    for part in parts:
        optimizer.segments[part.rows] = [part.segment]
    mesh = parts[0].parameter.device_mesh
    optimizer.division = Division(mesh.get_group("shard"), ranks.device, cuts_rows=False)
    optimizer.allocate()
    return FSDPEngine(model, parts, optimizer, schedule, config, ranks)


def _part(name: str, parameter: nn.Parameter) -> ParameterShard:
    assert isinstance(parameter, DTensor)
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return ParameterShard(name, parameter, nn.Parameter(local(parameter.detach())), tuple(offset))


@torch.no_grad()
def fill(parts: Iterable[ParameterShard], task: Task, seed: int) -> None:
    """Initial weights: every rank draws a whole tensor by name and keeps its rows, so sharding
    changes nothing.
    """
    for part in parts:
        whole = task.initial(part.name, part.parameter.shape, seed)
        part.rows.copy_(whole[part.offset[0] :][: len(part.rows)])


class FSDPEngine:
    """The engine of ``engine=ddp``, ``fsdp`` and ``hsdp``; see ``engine.base.Engine`` for each
    method's contract.

    Of several micro-batches each is reduce-scattered over the ranks of a copy, so that a rank never
    keeps more than its own rows of the gradient between them; the sum over copies is made once a
    step, with the last. What becomes of them is a strategy's: `AccumulateThenStep`, or
    `MomentumInBackward` with ``optim.gradient_buffer: false``.

    On CUDA a step that has a `LateJudge` is judged there, and nothing between its first kernel and
    the next step's waits for the device. What the host has to know of it, whether it counts as an
    update, is read once the next backward is handed out, or when somebody asks.

    Attributes:
        judges_late: whether it does so.
    """

    def __init__(
        self,
        model: LossModule,
        parts: Sequence[ParameterShard],
        optimizer: ShardedOptimizer,
        schedule: Schedule,
        config: RunConfig,
        ranks: Ranks,
    ) -> None:
        self.model = model
        self.parts = parts
        self.optimizer = optimizer
        self.schedule = schedule
        self.ranks = ranks
        self.mesh = parts[0].parameter.device_mesh
        self.replicas = self.mesh.size(0) if self.mesh.ndim == 2 else 1
        self.micro_batch = config.train.rows_a_forward
        self.step = 0
        self.updates = 0  # steps that changed the weights: AdamW's bias correction counts these
        clipped = bounds([part.name for part in parts], config.optim)
        self.gradients: GradientStrategy = AccumulateThenStep(optimizer, parts, clipped)
        if not config.optim.gradient_buffer:
            shards = self.mesh.get_group("shard")
            self.gradients = MomentumInBackward(
                optimizer,
                config.optim,
                unitwise(parts, model.task),
                shards,
                ranks.device,
            )
        self.judges_late = (
            ranks.device.type == "cuda"
            and self.gradients.skips_on_device
            and parts[0].rows.device == ranks.device
        )
        self.unread: Late | None = None  # loss, norm and factor of a step that may be no update

    def train_step(self, batch: Batch, judge: Judge) -> StepStats:
        lr_factor = self.schedule.factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        self.optimizer.updates = self.updates
        self.gradients.before_step(lambda: self._read(*self._backward(batch))[:2])
        sums = self._backward(batch)
        lr = self.optimizer.defaults["lr"] * lr_factor
        if self.judges_late and isinstance(judge, LateJudge):
            if judge.catch_up():
                self._free_gradients()
                sums = self._backward(batch)
            stats = self._step_late(judge.limits(), lr, *sums)
        else:
            stats = self._step(judge, lr, *sums)
        self._free_gradients()
        self.step += 1
        return stats

    def _free_gradients(self) -> None:
        for part in self.parts:
            part.parameter.grad = part.rows.grad = None

    def _step(
        self, judge: Judge, lr: float, sums: Tensor, recorded: Tensor, names: list[str]
    ) -> StepStats:
        """Wait for a step's numbers, have it judged, and update the weights."""
        loss, grad_norm, metrics = self._read(sums, recorded, names)
        factor = judge(loss, grad_norm)
        self._count_update()
        if factor:
            self.optimizer.updates = self.updates
            self.gradients.update(factor, grad_norm)
            self.updates += 1
        metrics |= recorded_over_ranks(self.ranks.device)
        return StepStats(lr, Numbers(loss, grad_norm, not factor, metrics))

    def _step_late(
        self, limits: Limits, lr: float, sums: Tensor, recorded: Tensor, names: list[str]
    ) -> StepStats:
        """Judge a step on the device, and update the weights where the verdict is to."""
        self._count_update()
        self.optimizer.updates = self.updates
        loss, grad_norm = sums[0], self.gradients.late_grad_norm(sums[1:])
        factor = limits.factor(loss, grad_norm)
        means = means_by_name(recorded, names)
        # Before the update, which reading it is not to wait for.
        read = self.unread = Late(torch.stack([loss, grad_norm, factor, *means.values()]))
        go = factor > 0
        self.gradients.update_late(factor, go)
        after = recorded_over_ranks(self.ranks.device)
        read_after = Late(torch.stack([*after.values()])) if after else None

        def numbers() -> Numbers:
            loss, grad_norm, factor, *measured = read.read()
            later = read_after.read() if read_after else []
            metrics = dict(zip([*means, *after], [*measured, *later], strict=True))
            return Numbers(loss, grad_norm, not factor, metrics)

        last = read_after or read
        return StepStats(lr, numbers, go, lambda: last.arrived)

    def _count_update(self) -> None:
        """Read whether the last step was an update, where that is not known yet."""
        if self.unread:
            self.updates += self.unread.read()[2] > 0
            self.unread = None

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        sums = EvalSums(self.model.task, self.ranks.device)
        for batch in batches:
            sums.add(self.model(moved(batch, self.ranks.device), measure=True), batch)
        for module in self.model.modules():  # without a backward FSDP2 leaves weights gathered
            if isinstance(module, FSDPModule):
                module.reshard()
        return sums.means()

    def shards(self) -> list[TensorShard]:
        replica = self.mesh.get_local_rank(0) if self.mesh.ndim == 2 else 0
        found = []
        for part in self.parts:
            held = {"model": part.rows.detach(), **self.optimizer.buffers(part.rows)}
            held |= {name: own for name, [own] in self.optimizer.row_buffers(part.rows).items()}
            for kind, data in held.items():
                if data.numel():
                    shape, offset = tuple(part.parameter.shape)[: data.ndim], part.offset
                    found.append(
                        TensorShard(
                            f"{kind}.{part.name}",
                            shape,
                            offset[: data.ndim],
                            data,
                            replica,
                            self.replicas,
                        )
                    )
        return found

    def gradient_shards(self) -> list[TensorShard]:
        replica = self.mesh.get_local_rank(0) if self.mesh.ndim == 2 else 0
        return [
            TensorShard(
                f"grad.{part.name}",
                tuple(part.parameter.shape),
                part.offset,
                part.grad,
                replica,
                self.replicas,
            )
            for part in self.parts
            if part.parameter.grad is not None and part.rows.numel()
        ]

    def scalars(self) -> dict[str, float]:
        self._count_update()
        counted = {"step": float(self.step), "updates": float(self.updates)}
        return counted | self.gradients.scalars()

    def refresh(self, scalars: Mapping[str, float]) -> None:
        # the weights themselves are gathered anew from the shards by the next forward
        self.step, self.updates = int(scalars["step"]), int(scalars["updates"])
        self.unread = None
        self.optimizer.set_updates(self.updates)
        self.gradients.refresh(scalars)

    def close(self) -> None:
        self.optimizer.state.clear()
        del self.model, self.optimizer, self.parts, self.gradients
        gc.collect()  # parameters and FSDP2's hooks on them refer to each other

    def _backward(self, batch: Batch) -> tuple[Tensor, Tensor, list[str]]:
        """Return the mean loss with squares of norms, and what was recorded, of all ranks: as
        `with_recorded` does. The host waits for nothing.
        """
        assert isinstance(self.model, FSDPModule)
        device = self.ranks.device
        micro_batches = split(batch, self.micro_batch)
        targets = over_ranks(self.model.task.count(batch), device)
        # FSDP2 averages gradients over ranks, the loss is a sum over them
        scale = (self.ranks.world_size / targets).float()
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for index, micro in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            self.model.set_requires_all_reduce(last or self.gradients.sum_copies_each_time)
            self.gradients.before_micro_batch(index, len(micro_batches))
            micro_loss = self.model(moved(micro, device))
            (micro_loss * scale).backward()
            loss_sum += micro_loss.detach()
        squares = self.gradients.norm_squares().to(device)
        totals = torch.cat([(loss_sum / targets)[None], squares / self.replicas])
        return with_recorded(totals, device)

    def _read(
        self, sums: Tensor, recorded: Tensor, names: list[str]
    ) -> tuple[float, float, dict[str, Tensor]]:
        """Wait for what ``_backward`` returned: the loss, the gradient's norm, the metrics."""
        host = torch.cat([sums, recorded]).cpu()
        loss, *squares = host[: len(sums)].tolist()
        return loss, self.gradients.grad_norm(squares), means_by_name(host[len(sums) :], names)


def unitwise(parts: Iterable[ParameterShard], task: Task) -> list[list[ParameterShard]]:
    """The parts that FSDP2 reduces together: each unit's, and the root's."""
    unit_of = {
        id(parameter): number
        for number, unit in enumerate(task.fsdp_units())
        for parameter in unit.parameters()
    }
    groups: dict[int | None, list[ParameterShard]] = {}
    for part in parts:
        groups.setdefault(unit_of.get(id(part.parameter)), []).append(part)
    return list(groups.values())
