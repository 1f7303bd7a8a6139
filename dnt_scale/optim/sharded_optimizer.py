"""The optimizer as engines have it: an algorithm's rule, on the tensors that they hold."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dnt_scale.optim.algorithm import Algorithm, Group
from dnt_scale.optim.norms import fixed_norms
from dnt_scale.optim.segments import Division, Segment, rows_held
from dnt_scale.optim.shards import Shard, local
from dnt_scale.optim.stochastic_rounding import RandomBits
from dnt_scale.optim.updates.plain import Plain


class ShardedOptimizer(torch.optim.Optimizer):
    """Step DTensors, whole tensors or local shards; each rank its own elements.

    ``allocate`` makes the buffers, not the first step: with dampening that would change the first
    update, and loaders of checkpoints need them. The random bits of a bf16 buffer are a function of
    (seed, updates, the parameter's place in the groups): a resumed run draws the same.

    Attributes:
        updates: how many updates were made before; whoever steps sets it. It decides nothing but
            the random bits.
        segments: what a parameter that is stepped holds of the model's, for updates that look at
            rows or tensors: every rank lists all of a group's parameters in the same order, with
            length 0 where it holds nothing of one, and every rank steps. One without an entry is
            whole.
        division: among which ranks those with an entry are divided.

    Args:
        groups: dicts of ``params`` and any of lr, weight_decay, update, algorithm; see
            `parameter_groups`.
        seed: seeds the stochastic rounding of buffers in bf16.
    """

    def __init__(self, algorithm: Algorithm, groups: Iterable[Group], seed: int) -> None:
        defaults: Group = {"lr": algorithm.lr, "weight_decay": algorithm.weight_decay}
        defaults |= {"update": Plain(pattern=None), "algorithm": algorithm}
        super().__init__(groups, defaults)
        self.algorithm = algorithm
        self.updates = 0
        self.segments: dict[Tensor, list[Segment]] = {}
        self.division = Division()
        self._bits = RandomBits(seed)
        self._place: dict[Tensor, int] = {}  # a parameter's number, over all groups
        self._groups: dict[Tensor, Group] = {}  # each parameter's
        self._roundings: dict[Tensor, int] = {}  # how often its buffer was rounded in this update

    def allocate(self) -> None:
        """Make the state, all zeros, of the parameters that the groups hold now."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._place[parameter] = len(self._place)
                state = self.state[parameter]
                self._groups[parameter] = group
                for name in self._counters(group):
                    state[name] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                for name, storage in group["algorithm"].buffers().items():
                    # Only in tests are weights not fp32: then fp64, which buffers have too.
                    dtype = torch.bfloat16 if storage == "bf16" else parameter.dtype
                    state[name] = torch.zeros_like(parameter, dtype=dtype)
                for name in group["update"].row_buffers:
                    state[name] = parameter.new_zeros(sum(self._rows_held(parameter)))

    def set_updates(self, updates: int) -> None:
        """Go on as after ``updates`` updates: the random bits, and an algorithm's counters."""
        self.updates = updates
        for parameter, state in self.state.items():
            for name in self._counters(self._groups[parameter]):
                state[name].fill_(updates)

    def buffers(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return a parameter's buffers by their names in checkpoints, each of its shape."""
        state = self.state[parameter]
        return {name: state[name] for name in self._groups[parameter]["algorithm"].buffers()}

    def row_buffers(self, parameter: Tensor) -> dict[str, Sequence[Tensor]]:
        """Return a parameter's buffers of a number a row by their names in checkpoints.

        They are views: for each segment (rows,), of the rows that `rows_held` says.
        """
        state, names = self.state[parameter], self._groups[parameter]["update"].row_buffers
        return {name: state[name].split(self._rows_held(parameter)) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse torch's state dicts: they would cast bf16 buffers and replace the groups.

        See ``Engine.shards`` for what checkpoints do instead.
        """
        raise NotImplementedError("copy into the buffers in place, then call set_updates")

    @property
    def skips_on_device(self) -> bool:
        """Whether ``step`` takes a ``go``: where all of its rules do."""
        return all(
            group["algorithm"].skips_on_device and group["update"].skips_on_device
            for group in self.param_groups
        )

    @torch.no_grad()
    def step(self, closure: None = None, go: Tensor | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            go: whether to: a bool scalar on the parameters' device, which the host does not wait
                for. Where it is false nothing changes, not a bit, whatever the gradients hold.
        """
        assert go is None or self.skips_on_device
        for group in self.param_groups:
            shards = [self._shard(p, p.grad, go=go) for p in group["params"] if p.grad is not None]
            if shards:
                with fixed_norms(shards) if group["update"].fixed_norm else nullcontext():
                    group["algorithm"].step(shards, group)

    @torch.no_grad()
    def add_gradient(
        self,
        parameter: Tensor,
        grad: Tensor,
        *,
        scale: float | Tensor,
        first: bool,
    ) -> None:
        """Add ``scale`` times a gradient to the momentum, without moving the parameter.

        Args:
            grad: of the parameter's shape or its local shard's, finite, any float dtype; neither
                kept nor changed.
            scale: a number, or a 0-d tensor on the gradient's device, which is not waited for.
            first: whether this is the update's first gradient of this parameter; micro-batches add
                more.
        """
        algorithm: Algorithm = self._groups[parameter]["algorithm"]
        rounding = 0 if first else self._roundings[parameter] + 1
        self._roundings[parameter] = rounding
        scaled = isinstance(scale, Tensor) or scale != 1.0
        for _, gradient, momentum in self._shard(parameter, grad, rounding).pieces():
            added = gradient * scale if scaled else gradient
            algorithm.accumulate(momentum, added, first=first)

    @torch.no_grad()
    def apply(self) -> None:
        """Move every parameter by its momentum, which ``add_gradient`` has filled."""
        for group in self.param_groups:
            shards = [self._shard(p, None) for p in group["params"]]
            with fixed_norms(shards) if group["update"].fixed_norm else nullcontext():
                group["algorithm"].move(shards, group)

    def _counters(self, group: Group) -> tuple[str, ...]:
        return *group["algorithm"].counters, *group["update"].counters

    def _segments(self, parameter: Tensor) -> Sequence[Segment]:
        weights = local(parameter)
        return self.segments.get(parameter) or [
            Segment(tuple(weights.shape), 0, 0, weights.numel())
        ]

    def _division(self, parameter: Tensor) -> Division | None:
        return self.division if parameter in self.segments else None

    def _rows_held(self, parameter: Tensor) -> list[int]:
        division = self._division(parameter)
        return [rows_held(segment, division)[1] for segment in self._segments(parameter)]

    def _shard(
        self,
        parameter: Tensor,
        grad: Tensor | None,
        rounding: int = 0,
        go: Tensor | None = None,
    ) -> Shard:
        weights = local(parameter)
        flat = weights.view(-1)
        buffers = self.buffers(parameter)
        numbers = self.updates, self._place[parameter], rounding
        return Shard(
            weights=flat,
            gradient=None if grad is None else local(grad).reshape(-1),
            buffers={name: local(buffer).view(-1) for name, buffer in buffers.items()},
            row_buffers=self.row_buffers(parameter),
            counters={
                name: self.state[parameter][name]
                for name in self._counters(self._groups[parameter])
            },
            segments=self._segments(parameter),
            division=self._division(parameter),
            generator=partial(self._bits.generator, flat.device, *numbers),
            go=go,
        )
