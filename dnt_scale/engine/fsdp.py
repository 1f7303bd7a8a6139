"""FSDP2: weights, gradients and optimizer state sharded over the ranks, block by block; ddp and hsdp keep copies."""

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dnt_scale.checkpoint.tensor_shards import Box
from dnt_scale.config import MSGDWConfig, RunConfig, TorchEngineConfig
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.engine.base import Judge, StepStats
from dnt_scale.engine.parallelize import parallelize
from dnt_scale.engine.reductions import over_ranks, read_over_ranks, recorded_over_ranks, squared_norms
from dnt_scale.model.dnt import DNT, IGNORED
from dnt_scale.model.init import initial_tensor
from dnt_scale.optim.build import allocate, build_optimizer, set_updates
from dnt_scale.optim.msgdw import MSGDW, local
from dnt_scale.optim.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Part:
    """This rank's rows of a parameter.

    The optimizer steps ``rows`` and not FSDP2's parameter, whose storage they are: it then meets plain tensors only,
    which its fused kernels take, and DTensors leave no host objects behind each step (torchtitan #3790).
    """

    name: str
    parameter: DTensor  # FSDP2's; backward leaves the gradient here
    rows: nn.Parameter  # fp32, (rows of this rank, ...); 0 rows where there are more ranks than rows
    offset: tuple[int, ...]  # of the rows in the whole tensor

    @property
    def grad(self) -> Tensor:
        """Of the rows."""
        assert self.parameter.grad is not None
        return local(self.parameter.grad)


def build(config: RunConfig, model_fn: Callable[[], DNT], ranks: Ranks, total_steps: int) -> "FSDPEngine":
    """Shard ``model_fn()`` (called on the meta device), fill it, and allocate its optimizer; see ``engine.build``."""
    assert isinstance(config.engine, TorchEngineConfig)
    schedule = Schedule(config.optim.schedule, total_steps)
    with torch.device("meta"):
        model = model_fn()
    parallelize(model, config, ranks)
    model.to_empty(device="cpu" if config.engine.cpu_offload else ranks.device)
    parts = [_part(name, parameter) for name, parameter in model.named_parameters()]
    fill(parts, model, config.run.seed)
    optimizer = build_optimizer([(part.name, part.rows) for part in parts], config.optim, config.run.seed)
    allocate(optimizer)
    return FSDPEngine(model, parts, optimizer, schedule, config, ranks)


def _part(name: str, parameter: nn.Parameter) -> Part:
    assert isinstance(parameter, DTensor)
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return Part(name, parameter, nn.Parameter(local(parameter.detach())), tuple(offset))


@torch.no_grad()
def fill(parts: Iterable[Part], model: DNT, seed: int) -> None:
    """Initial weights: every rank draws a whole tensor by name and keeps its rows, so sharding changes nothing."""
    for part in parts:
        whole = initial_tensor(part.name, part.parameter.shape, model.config, seed)
        part.rows.copy_(whole[part.offset[0] :][: len(part.rows)])


class FSDPEngine:
    """The engine of ``engine=ddp``, ``fsdp`` and ``hsdp``; see ``engine.base.Engine`` for each method's contract.

    Of several micro-batches each is reduce-scattered over the ranks of a copy, so that a rank never keeps more than
    its own rows of the gradient between them; the sum over copies is made once a step, with the last.

    With ``optim.gradient_buffer: false`` backward adds the gradient to the momentum block by block and frees it. The
    reported norm is then the mean over micro-batches of the norm of each one's own gradient: the whole gradient's if
    there is one micro-batch, else never less than that. ``optim.clip: previous`` goes by it, and a run's first step
    therefore computes its gradient twice, the first time for the norm alone. ``clip: tensor`` bounds each tensor's
    gradient of each micro-batch so that their sum keeps within ``clip_norm``. Where a gradient is not finite, that
    rank's rows of the tensor (with ``clip: tensor``, the tensor) add nothing, and the norm is nan.
    """

    def __init__(
        self,
        model: DNT,
        parts: Sequence[Part],
        optimizer: torch.optim.Optimizer,
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
        self.micro_batch = config.train.micro_batch
        self.step = 0
        self.updates = 0  # steps that changed the weights: AdamW's bias correction counts these
        self.unbuffered: Unbuffered | None = None
        if isinstance(config.optim, MSGDWConfig) and not config.optim.gradient_buffer:
            assert isinstance(optimizer, MSGDW)
            group = self.mesh.get_group("shard")
            self.unbuffered = Unbuffered(optimizer, config.optim, group, ranks.device)
            for members in blockwise(parts):
                for part in members:
                    part.parameter.register_post_accumulate_grad_hook(partial(self.unbuffered.arrived, members))

    def train_step(self, batch: Tensor, judge: Judge) -> StepStats:
        lr_factor = self.schedule.factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        if isinstance(self.optimizer, MSGDW):
            self.optimizer.updates = self.updates
        if self.unbuffered and self.unbuffered.must_measure:
            with self.unbuffered.measuring():
                norm = self._backward(batch)[1]
            self.unbuffered.previous_norm = norm if math.isfinite(norm) else 0.0
        loss, grad_norm, metrics = self._backward(batch)

        factor = judge(loss, grad_norm)
        if factor:
            self._update(factor)
            self.updates += 1
            if self.unbuffered:
                self.unbuffered.previous_norm = grad_norm
        for part in self.parts:
            part.parameter.grad = part.rows.grad = None
        self.step += 1
        metrics |= recorded_over_ranks(self.ranks.device)
        return StepStats(loss, grad_norm, self.optimizer.defaults["lr"] * lr_factor, not factor, metrics)

    @torch.no_grad()
    def eval_loss(self, batches: Iterable[Tensor]) -> float:
        totals = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        for batch in batches:
            totals[0] += self._loss_sum(batch)
            totals[1] += (batch[:, 1:] != IGNORED).sum().to(self.ranks.device)
        for module in self.model.modules():  # without a backward FSDP2 leaves weights gathered
            if isinstance(module, FSDPModule):
                module.reshard()
        loss_sum, tokens = over_ranks(totals, self.ranks.device).tolist()
        return float(loss_sum / tokens)

    def boxes(self) -> list[Box]:
        replica = self.mesh.get_local_rank(0) if self.mesh.ndim == 2 else 0
        found = []
        for part in self.parts:
            state = self.optimizer.state[part.rows]
            buffers = {name: buffer for name, buffer in state.items() if name != "step"}
            for kind, data in {"model": part.rows.detach(), **buffers}.items():
                if data.numel():
                    shape = tuple(part.parameter.shape)
                    found.append(Box(f"{kind}.{part.name}", shape, part.offset, data, replica, self.replicas))
        return found

    def scalars(self) -> dict[str, float]:
        counted = {"step": float(self.step), "updates": float(self.updates)}
        return counted | ({"previous_norm": self.unbuffered.previous_norm} if self.unbuffered else {})

    def refresh(self, scalars: Mapping[str, float]) -> None:
        # the weights themselves are gathered anew from the shards by the next forward
        self.step, self.updates = int(scalars["step"]), int(scalars["updates"])
        set_updates(self.optimizer, self.updates)
        if self.unbuffered:
            self.unbuffered.previous_norm = scalars.get("previous_norm", 0.0)

    def close(self) -> None:
        self.optimizer.state.clear()
        del self.model, self.optimizer, self.parts, self.unbuffered
        gc.collect()  # parameters and FSDP2's hooks on them refer to each other

    def _backward(self, batch: Tensor) -> tuple[float, float, dict[str, Tensor]]:
        """The mean loss, the gradient's norm and what was recorded, of all ranks; the host waits for the device once,
        at the end."""
        assert isinstance(self.model, FSDPModule)
        device = self.ranks.device
        micro_batches = batch.split(self.micro_batch)
        tokens = over_ranks((batch[:, 1:] != IGNORED).sum(), device)
        # FSDP2 averages gradients over ranks, the loss is a sum over them
        scale = (self.ranks.world_size / tokens).float()
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        squares = torch.zeros(len(micro_batches) if self.unbuffered else 1, dtype=torch.float64, device=device)
        for index, micro in enumerate(micro_batches):
            self.model.set_requires_all_reduce(self.unbuffered is not None or index == len(micro_batches) - 1)
            if self.unbuffered:
                self.unbuffered.begin(index, len(micro_batches), squares[index])
            micro_loss = self._loss_sum(micro)
            (micro_loss * scale).backward()
            loss_sum += micro_loss.detach()
        if not self.unbuffered:
            squares += squared_norms(self._grads()).sum().to(device)
        totals = torch.cat([(loss_sum / tokens)[None], squares / self.replicas])
        (loss, *whole_squares), metrics = read_over_ranks(totals, device)
        return loss, math.fsum(math.sqrt(square) for square in whole_squares), metrics

    @torch.no_grad()
    def _update(self, factor: float) -> None:
        if self.unbuffered:
            self.unbuffered.optimizer.apply()
            return
        if factor != 1.0:
            torch._foreach_mul_(self._grads(), factor)
        for part in self.parts:
            if part.rows.numel():
                part.rows.grad = part.grad
        self.optimizer.step()

    def _loss_sum(self, micro: Tensor) -> Tensor:
        micro = micro.to(self.ranks.device, non_blocking=True)
        loss: Tensor = self.model(micro[:, :-1].clamp(min=0), micro[:, 1:])
        return loss

    def _grads(self) -> list[Tensor]:
        return [part.grad for part in self.parts]


def blockwise(parts: Iterable[Part]) -> list[list[Part]]:
    """The parts that FSDP2 reduces together: each block's, and the root's."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        block = ".".join(part.name.split(".")[:2]) if part.name.startswith("blocks.") else ""
        groups.setdefault(block, []).append(part)
    return list(groups.values())


class Unbuffered:
    """Adds gradients to the momentum inside backward, as soon as a block's are reduced, and frees them."""

    def __init__(self, optimizer: MSGDW, config: MSGDWConfig, shards: dist.ProcessGroup, device: torch.device) -> None:
        self.optimizer = optimizer
        self.clip = config.clip if config.clip_norm is not None else None
        self.clip_norm = config.clip_norm or math.inf
        self.shards = shards
        self.device = device
        self.previous_norm = 0.0  # of the last step that was not skipped; 0: none yet
        self.measure_only = False
        self.first = True  # micro-batch of the step
        self.share = 1.0  # of a micro-batch in the step
        self.squares = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def must_measure(self) -> bool:
        return self.clip == "previous" and self.previous_norm == 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Gradients are only measured, and freed."""
        self.measure_only = True
        try:
            yield
        finally:
            self.measure_only = False

    def begin(self, micro_batch: int, micro_batches: int, squares: Tensor) -> None:
        """``squares``: float64 scalar on the device, to which the gradient's squares on this rank are added."""
        self.first = micro_batch == 0
        self.share = 1.0 / micro_batches
        self.squares = squares

    @torch.no_grad()
    def arrived(self, members: Sequence[Part], _: Tensor) -> None:
        """The hook of each of a block's parameters; the last one takes the gradients of all, which are one storage."""
        if any(part.parameter.grad is None for part in members):
            return
        grads = [part.grad for part in members]
        squares = squared_norms(grads)
        self.squares += squares.sum().to(self.device)
        if not self.measure_only:
            scales = self._scales(squares)
            for part, grad, square, scale in zip(members, grads, squares, scales, strict=True):
                if grad.numel():
                    grad.masked_fill_(~square.isfinite(), 0.0)
                    self.optimizer.add_gradient(part.rows, grad, scale=scale, first=self.first)
        for part, grad in zip(members, grads, strict=True):
            part.parameter.grad = None
            _free(grad)

    def _scales(self, squares: Tensor) -> Sequence[float | Tensor]:
        """What each gradient is multiplied by, from the squared norms of this rank's rows, float64 (members,)."""
        if self.clip == "tensor":
            whole = squares.to(self.device, copy=True)
            dist.all_reduce(whole, group=self.shards)
            scales = (self.clip_norm * self.share / whole.sqrt()).clamp(max=1.0)
            return scales.nan_to_num(nan=0.0).to(squares.device, torch.float32).unbind()
        if self.clip is None:
            return [1.0] * len(squares)
        # no norm yet, measured as we are: it was not finite, nor will this gradient be
        return [min(1.0, self.clip_norm / self.previous_norm) if self.previous_norm else 0.0] * len(squares)


def _free(grad: Tensor) -> None:
    """Give the memory back although FSDP2 holds the tensor until the end of backward, where it sums over copies."""
    storage = grad.untyped_storage()
    if grad.device.type != "cpu":
        grad.record_stream(torch.accelerator.current_stream())  # its allocating stream must not reuse it before
    if storage.size():
        storage.resize_(0)
