"""mSGDW, the AdamW baseline, parameter groups by regex, and learning-rate schedules."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dnt_scale.optim import fused_cpu

WORTH_COMPILING = 1 << 20  # elements of a group: compiling takes a quarter of a second


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, or the tensor itself: the same storage, never a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Segment:
    """Elements [start, start + length) of a flattened parameter of ``shape``; they lie at ``offset`` of a flat one."""

    shape: tuple[int, ...]
    start: int
    offset: int
    length: int


class MSGDW(torch.optim.Optimizer):
    """Momentum SGD with decoupled weight decay, one buffer a parameter (arXiv 2507.17501; dnt.md, mSGDW).

        v <- momentum v + (1 - dampening) g
        d  = g (1 - dampening) + momentum v   if nesterov else  v
        plain:           p <- (1 - lr wd) p - lr d
        row_normalized:  p_row <- (1 - lr wd) p_row - lr d_row / |d_row|      (rows with d_row = 0 stay)

    With dampening 0 and weight decay 0 the plain update is torch.optim.SGD's, bit for bit (on CUDA: with fused=True).
    ``allocate`` makes the buffers, not the first step: with dampening that changes the first update, and checkpoint
    loaders need them. Parameters are DTensors, whole tensors or local shards; each rank steps its own elements.

    A bf16 buffer is rounded stochastically: to one of the two neighbours, such that the expectation is exact. The
    random bits are a function of (seed, updates, the parameter's place in the groups): a resumed run draws the same.

    Attributes:
        updates: how many updates were made before; whoever steps sets it. It decides nothing but the random bits.
        segments: what a flat parameter consists of, for the row-normalised update: every rank lists all of a group's
            parameters in the same order, with length 0 where it holds nothing of one. The norms of rows that are cut
            between ranks are summed over all ranks, so all must step. A parameter without an entry holds whole rows.

    Args:
        groups: dicts of ``params`` and any of lr, weight_decay, update; see ``parameter_groups``.
        lr, momentum, dampening, nesterov, weight_decay: defaults of the groups.
        momentum_dtype: of the buffers; None: each parameter's own.
        seed: of the stochastic rounding.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        momentum_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "update": "plain",
        }
        super().__init__(groups, defaults)
        self.momentum_dtype = momentum_dtype
        self.seed = seed
        self.updates = 0
        self.segments: dict[Tensor, list[Segment]] = {}
        self._where: dict[Tensor, tuple[dict[str, Any], int]] = {}  # a parameter's group, and its place in all groups
        self._roundings: dict[Tensor, int] = {}  # of a parameter's buffer in this update
        self._generators: dict[torch.device, torch.Generator] = {}

    def allocate(self) -> None:
        """A buffer of zeros for each parameter of the groups."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._where[parameter] = group, len(self._where)
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, dtype=self.momentum_dtype)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Not for torch's state dicts, which would cast bf16 buffers and replace the groups: see ``Engine.boxes``."""
        raise NotImplementedError("copy into the momentum buffers in place, then call set_updates")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            active = [p for p in group["params"] if p.grad is not None]
            same_dtypes = all(p.dtype == p.grad.dtype == self._buffer(p).dtype for p in active)
            if same_dtypes and group["update"] == "plain" and not group["nesterov"]:
                self._step_in_one_pass(group, active)
                continue
            for parameter in active:
                self.add_gradient(parameter, parameter.grad, scale=1.0, first=True)
                self._move(group, parameter, parameter.grad)

    @torch.no_grad()
    def add_gradient(self, parameter: Tensor, grad: Tensor, *, scale: float | Tensor, first: bool) -> None:
        """v <- (momentum v if first else v) + (1 - dampening) scale g, without moving the parameter.

        Args:
            grad: of the parameter's shape or its local shard's, finite, any float dtype; neither kept nor changed.
            scale: a number, or a 0-d tensor on the gradient's device, which is not waited for.
            first: whether this is the update's first gradient of this parameter; micro-batches add more.
        """
        group, place = self._where[parameter]
        mu, keep = group["momentum"], 1.0 - group["dampening"]
        self._roundings[parameter] = 0 if first else self._roundings[parameter] + 1
        v, g = self._buffer(parameter), local(grad).reshape(-1)
        scaled = isinstance(scale, Tensor) or scale != 1.0
        generator = None
        if v.dtype != parameter.dtype:
            generator = self._generator(v.device, self.updates, place, self._roundings[parameter])
        for v_part, g_part in zip(v.split(_piece(v)), g.split(_piece(v)), strict=True):
            total = v_part if generator is None else v_part.to(parameter.dtype)
            if first:
                total.mul_(mu)
            total.add_(g_part * scale if scaled else g_part, alpha=keep)
            if generator is not None:
                v_part.copy_(stochastic_bf16(total, generator))

    @torch.no_grad()
    def apply(self) -> None:
        """Move every parameter by its momentum, which ``add_gradient`` has filled; not for nesterov."""
        for group in self.param_groups:
            assert not group["nesterov"]
            for parameter in group["params"]:
                self._move(group, parameter, None)

    def _step_in_one_pass(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """The plain update of whole tensors, all of their dtype; by passes over memory: 1 on CPU, 1.4 on CUDA."""
        parameters = [p for p in parameters if local(p).numel()]
        if not parameters:
            return
        ps = [local(p).view(-1) for p in parameters]
        gs = [local(p.grad).reshape(-1) for p in parameters if p.grad is not None]
        vs = [self._buffer(p) for p in parameters]
        mu, dampening, lr = group["momentum"], group["dampening"], group["lr"]
        shrink = 1.0 - lr * group["weight_decay"]
        if ps[0].is_cuda:
            if shrink != 1.0:
                torch._foreach_mul_(ps, shrink)
            torch._fused_sgd_(
                ps,
                gs,
                vs,
                weight_decay=0.0,
                momentum=mu,
                lr=lr,
                dampening=dampening,
                nesterov=False,
                maximize=False,
                is_first_step=False,
            )
            return
        large = ps[0].dtype == torch.float32 and sum(p.numel() for p in ps) >= WORTH_COMPILING
        if large and (update := fused_cpu.load()):
            update(ps, vs, gs, mu, 1.0 - dampening, shrink, lr)
            return
        torch._foreach_mul_(vs, mu)
        torch._foreach_add_(vs, gs, alpha=1.0 - dampening)
        if shrink != 1.0:
            torch._foreach_mul_(ps, shrink)
        torch._foreach_add_(ps, vs, alpha=-lr)

    def _move(self, group: dict[str, Any], parameter: Tensor, grad: Tensor | None) -> None:
        """The weights' part of the update, piece by piece, so that what is temporary stays small."""
        p, v, lr = local(parameter).view(-1), self._buffer(parameter), group["lr"]
        g = local(grad).reshape(-1) if grad is not None and group["nesterov"] else None
        if group["weight_decay"] > 0:
            p.mul_(1.0 - lr * group["weight_decay"])

        def direction(start: int, length: int) -> Tensor:
            d = v[start : start + length].to(p.dtype)
            if g is None:
                return d
            kept_g = g[start : start + length].to(p.dtype) * (1.0 - group["dampening"])
            return torch.add(kept_g, d, alpha=group["momentum"])

        if group["update"] == "plain":
            for start in range(0, len(p), _piece(p)):
                d = direction(start, _piece(p))
                p[start : start + len(d)].add_(d, alpha=-lr)
            return
        whole = [Segment(tuple(local(parameter).shape), 0, 0, len(p))]
        for segment in self.segments.get(parameter, whole):
            cut = []
            squares_R = torch.zeros(segment.shape[0], dtype=torch.float64, device=p.device)
            for part in _row_parts(segment, _piece(p)):
                d_RC = direction(part.offset, part.rows * part.columns).view(part.rows, part.columns)
                norms_R = torch.linalg.vector_norm(d_RC, dim=1)
                if part.columns < segment.shape[1]:
                    cut.append(part)
                    squares_R[part.row] += norms_R[0].double().square()
                else:
                    _move_rows(p, part, d_RC, norms_R, lr)
            if parameter in self.segments and dist.is_initialized():
                dist.all_reduce(squares_R)
            for part in cut:
                d_RC = direction(part.offset, part.columns)[None]
                _move_rows(p, part, d_RC, squares_R[part.row, None].sqrt().to(p.dtype), lr)

    def _buffer(self, parameter: Tensor) -> Tensor:
        return local(self.state[parameter]["momentum_buffer"]).view(-1)

    def _generator(self, device: torch.device, *numbers: int) -> torch.Generator:
        """This optimizer's own, seeded by its seed and ``numbers``."""
        generator = self._generators.setdefault(device, torch.Generator(device))
        digest = hashlib.sha256(repr((self.seed, *numbers)).encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little"))
        return generator


class RowPart(NamedTuple):
    """Whole rows of a segment, or one row's part of it."""

    row: int  # the first, in the whole parameter
    offset: int  # of its first element, in the flat one
    rows: int
    columns: int


def _row_parts(segment: Segment, piece: int) -> Iterator[RowPart]:
    """The segment's rows in parts of at most ``piece`` elements or one row."""
    width = segment.shape[1]
    place, end = segment.start, segment.start + segment.length
    while place < end:
        row, column = divmod(place, width)
        whole = 0 if column else (end - place) // width
        rows = min(whole, max(1, piece // width)) or 1
        columns = width if whole else min(width - column, end - place)
        yield RowPart(row, segment.offset + place - segment.start, rows, columns)
        place += rows * columns


def _move_rows(p: Tensor, part: RowPart, d_RC: Tensor, norms_R: Tensor, lr: float) -> None:
    p_RC = p[part.offset : part.offset + d_RC.numel()].view_as(d_RC)
    p_RC.addcdiv_(d_RC, norms_R.where(norms_R > 0, 1.0)[:, None], value=-lr)


def _piece(tensor: Tensor) -> int:
    """Elements to work on at a time: a CPU keeps them in its cache, a GPU needs many to be busy."""
    return 1 << 17 if tensor.device.type == "cpu" else 1 << 24


def stochastic_bf16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round flat fp32 values to bf16: up with the probability that makes the expectation exact, else down.

    A bf16 is the upper half of an fp32's bits: adding 16 random bits to the lower half carries with that probability.
    Values that bf16 holds stay as they are; those that are not finite become NaN.
    """
    count = values.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=values.device)
    words.random_(-(2**63), None, generator=generator)  # all 64 bits: four values' worth
    bits = words.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF)
    rounded = bits.add_(values.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
    return rounded.add_(values, alpha=0).to(torch.bfloat16)  # 0 * inf: what carried out of a NaN's bits is one again
