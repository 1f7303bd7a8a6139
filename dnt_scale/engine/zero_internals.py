"""What DeepSpeed keeps to itself: where its ZeRO optimizers hold master weights and gradients.

DeepSpeed's public interface hides its partitions, so this file reads attributes of its optimizers.
All such reliance is here; a release without one of them is refused when the engine is built. There
are four optimizers:

    stage 0                     none: ours steps the fp32 parameters themselves
    stage 1 in bf16             BF16_Optimizer; not when the optimizer is offloaded
    stages 1 and 2              DeepSpeedZeroOptimizer
    stage 3                     DeepSpeedZeroOptimizer_Stage3

All but the first give our optimizer flat fp32 tensors to step, one a parameter group (stage 3: one
a sub-group). Each holds this rank's runs of that group's parameters, one after the other, and
padding.
"""

import os
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dnt_scale.config import ConfigError
from dnt_scale.distributed.process_group import Ranks


@dataclass(frozen=True)
class ZeroSlice:
    """A run of a parameter in a tensor that the optimizer steps; length 0 where this rank holds
    none of it.
    """

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    flat: Tensor  # what the optimizer steps
    start: int  # of the run in the flattened parameter
    offset: int  # of the run in flat
    length: int

    def of(self, buffer: Tensor) -> Tensor:
        """The run in a tensor that lies as ``flat`` does, one-dimensional: a view."""
        return buffer.detach().view(-1)[self.offset : self.offset + self.length]


class Partitions(Protocol):
    """One of DeepSpeed's optimizers; see the file's docstring."""

    replicated: bool  # every rank holds everything, rather than a part

    def parts(self) -> list[ZeroSlice]:
        """Of every parameter of every flat tensor, in the same order on all ranks."""
        ...

    def gradients(self) -> list[Tensor]:
        """This rank's part of the reduced gradient after the last backward of a step, as views;
        padding is zero.
        """
        ...

    def gradient_runs(self, parts: list[ZeroSlice]) -> Iterator[tuple[ZeroSlice, Tensor]]:
        """Each part that this rank holds something of, with its run of ``gradients``,
        one-dimensional: a view.
        """
        ...

    def drop(self) -> None:
        """Forget the gradient and take no step."""
        ...

    def refresh(self) -> None:
        """Make the model's weights on all ranks those of the flat tensors. A collective."""
        ...

    @contextmanager
    def groups_filled(self) -> Iterator[None]:
        """The parameter groups of our optimizer hold the flat tensors."""
        ...


def partitions(engine: Any, names: dict[nn.Parameter, str]) -> Partitions:
    """How ``engine``, a DeepSpeedEngine, holds the parameters of these names."""
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        return _Whole(engine, names)
    kinds: dict[str, type[_Bf16 | _Zero12 | _Zero3]] = {
        "BF16_Optimizer": _Bf16,
        "DeepSpeedZeroOptimizer": _Zero12,
        "DeepSpeedZeroOptimizer_Stage3": _Zero3,
    }
    return kinds[type(engine.optimizer).__name__](engine, names)


def join(ranks: Ranks) -> None:
    """Set DeepSpeed up, quietly, on this rank's device and in our process group."""
    if ranks.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # here DeepSpeed reads the device's number; ZeRO 3 in steps
    os.environ["LOCAL_RANK"] = str(ranks.device.index or 0)
    from deepspeed import comm
    from deepspeed.runtime import bf16_optimizer

    # an op for inference, which would be compiled on the spot; comm.torch is PyTorch, not this
    # module
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    # prints, collects garbage and resets CUDA's peaks
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    comm.init_distributed(auto_mpi_discovery=False, dist_init_required=False)


def free(engine: Any) -> None:
    """End ``engine`` and give up its tensors: ZeRO 3 itself stays, in a list of modules and in a
    cache of results.
    """
    engine.destroy()
    for holder in (*engine.module.parameters(), engine):
        vars(holder).clear()


class _Whole:
    replicated = True

    def __init__(self, engine: Any, names: dict[nn.Parameter, str]) -> None:
        self.engine = engine
        self.names = names

    def parts(self) -> list[ZeroSlice]:
        groups = self.engine.optimizer.param_groups
        return [
            ZeroSlice(self.names[p], tuple(p.shape), p, 0, 0, p.numel())
            for group in groups
            for p in group["params"]
        ]

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.names if parameter.grad is not None]

    def gradient_runs(self, parts: list[ZeroSlice]) -> Iterator[tuple[ZeroSlice, Tensor]]:
        for part in parts:
            if part.flat.grad is not None:
                yield part, part.flat.grad.detach().view(-1)

    def drop(self) -> None:
        self.engine.zero_grad()

    def refresh(self) -> None:
        pass  # the optimizer steps the weights themselves

    @contextmanager
    def groups_filled(self) -> Iterator[None]:
        yield


class _Sharded:
    replicated = False
    needs: tuple[str, ...]

    def __init__(self, engine: Any, names: dict[nn.Parameter, str]) -> None:
        self.optimizer = engine.optimizer
        self.names = names
        missing = [name for name in self.needs if not hasattr(self.optimizer, name)]
        if missing:
            import deepspeed

            raise ConfigError(
                f"deepspeed {deepspeed.__version__}: its {type(self.optimizer).__name__} has no "
                f"{', '.join(missing)}, which dnt-scale relies on; pip install "
                "'deepspeed>=0.19.8,<0.20'"
            )

    def gradients(self) -> list[Tensor]:
        raise NotImplementedError

    def gradient_runs(self, parts: list[ZeroSlice]) -> Iterator[tuple[ZeroSlice, Tensor]]:
        """See `Partitions.gradient_runs`.

        One after the other, gradients lie as the flat tensors do, padding too; but one tensor of
        gradients may be of several flat ones (stage 3), or of one parameter (stages 1 and 2).
        """
        begin_of: dict[int, int] = {}  # a flat tensor's place among all of them
        end = 0
        for part in parts:
            if id(part.flat) not in begin_of:
                begin_of[id(part.flat)] = end
                end += part.flat.numel()
        gradients = [gradient.detach().view(-1) for gradient in self.gradients()]
        starts = list(accumulate((gradient.numel() for gradient in gradients), initial=0))
        assert starts[-1] == end, "DeepSpeed's gradients do not lie as its weights do"
        for part in parts:
            if part.length:
                place = begin_of[id(part.flat)] + part.offset
                number = bisect_right(starts, place) - 1
                first = place - starts[number]
                run = gradients[number][first : first + part.length]
                assert len(run) == part.length, f"the gradient of {part.name} is in two tensors"
                yield part, run

    @contextmanager
    def groups_filled(self) -> Iterator[None]:
        yield

    def part(
        self, parameter: Any, shape: torch.Size, flat: Tensor, begin: int, size: int, offset: int
    ) -> ZeroSlice:
        """The part of a parameter whose elements from ``begin`` on, at most ``size``, lie in
        ``flat``.

        Args:
            begin: may be negative: this rank's partition then begins before the parameter.
            offset: of element ``begin`` in flat.
        """
        start = min(max(begin, 0), shape.numel())
        length = max(0, min(shape.numel(), begin + size) - start)
        return ZeroSlice(
            self.names[parameter],
            tuple(shape),
            flat,
            start,
            offset + start - begin if length else 0,
            length,
        )


class _Bf16(_Sharded):
    needs = (
        "bf16_groups",
        "fp32_groups_flat_partition",
        "fp32_groups_gradient_flat_partition",
        "dp_rank",
    )

    def parts(self) -> list[ZeroSlice]:
        parts = []
        for parameters, flat in zip(
            self.optimizer.bf16_groups, self.optimizer.fp32_groups_flat_partition, strict=True
        ):
            begin, size = self.optimizer.dp_rank * flat.numel(), flat.numel()
            for parameter in parameters:
                parts.append(self.part(parameter, parameter.shape, flat, begin, size, 0))
                begin -= parameter.numel()
        return parts

    def gradients(self) -> list[Tensor]:
        return list(self.optimizer.fp32_groups_gradient_flat_partition)

    def drop(self) -> None:
        self.optimizer.zero_grad()

    def refresh(self) -> None:
        self.optimizer.update_lp_params()


class _Zero12(_Sharded):
    needs = (
        "all_grad_tensors",
        "averaged_gradients",
        "cpu_offload",
        "dp_process_group",
        "micro_step_id",
        "round_robin_bit16_groups",
        "round_robin_bit16_offsets",
        "single_partition_of_fp32_groups",
        "reset_cpu_buffers",
        "update_lp_params",
        "_wait_for_offload_copies",
    )

    def parts(self) -> list[ZeroSlice]:
        rank = torch.distributed.get_rank(self.optimizer.dp_process_group)
        parts = []
        for parameters, offsets, flat in zip(
            self.optimizer.round_robin_bit16_groups,
            self.optimizer.round_robin_bit16_offsets,
            self.optimizer.single_partition_of_fp32_groups,
            strict=True,
        ):
            size = flat.numel()
            for parameter, offset in zip(parameters, offsets, strict=True):
                parts.append(
                    self.part(parameter, parameter.shape, flat, rank * size - offset, size, 0)
                )
        return parts

    def gradients(self) -> list[Tensor]:
        if self.optimizer.cpu_offload:
            self.optimizer._wait_for_offload_copies()
            return [flat.grad for flat in self.optimizer.single_partition_of_fp32_groups]
        # by number: backward may have begun with the last one
        numbers = sorted(self.optimizer.averaged_gradients)
        return [grad for number in numbers for grad in self.optimizer.averaged_gradients[number]]

    def drop(self) -> None:  # what step() does when it finds that fp16 overflowed
        self.optimizer.zero_grad()
        self.optimizer.micro_step_id = -1
        if self.optimizer.cpu_offload:
            self.optimizer.reset_cpu_buffers()
            self.optimizer._offload_accumulated_param_ids = set()
        for gradients in (self.optimizer.averaged_gradients, self.optimizer.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))

    def refresh(self) -> None:
        self.optimizer.update_lp_params()


class _Zero3(_Sharded):
    needs = (
        "averaged_gradients",
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "grad_partitions_flat_buffer",
        "offload_optimizer",
        "reset_cpu_buffers",
        "sub_group_to_group_id",
        "_partition_all_parameters",
        "_pre_step",
        "_reassign_or_swap_out_partitioned_parameters",
    )

    def parts(self) -> list[ZeroSlice]:
        parts = []
        for parameters, flat in zip(
            self.optimizer.fp16_groups, self.optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            offset = 0
            for parameter in parameters:  # each is divided over the ranks for itself
                size = parameter.partition_numel()
                begin = parameter.ds_zero_partition_rank * size
                parts.append(self.part(parameter, parameter.ds_shape, flat, begin, size, offset))
                offset += size
        return parts

    def gradients(self) -> list[Tensor]:
        if self.optimizer.offload_optimizer:
            return [flat.grad for flat in self.optimizer.fp32_partitioned_groups_flat]
        return [self.optimizer.grad_partitions_flat_buffer]

    def drop(self) -> None:  # what step() does when it finds that fp16 overflowed
        self.optimizer._pre_step()
        self.optimizer._partition_all_parameters()
        self.optimizer.zero_grad()
        if self.optimizer.offload_optimizer:
            self.optimizer.reset_cpu_buffers()
        else:
            self.optimizer.averaged_gradients = {}

    def refresh(self) -> None:
        self.optimizer._partition_all_parameters()
        for number in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(number)

    @contextmanager
    def groups_filled(self) -> Iterator[None]:
        """Stage 3 fills its groups for the moment of a step only."""
        groups = self.optimizer.optimizer.param_groups
        for number, flat in enumerate(self.optimizer.fp32_partitioned_groups_flat):
            groups[self.optimizer.sub_group_to_group_id[number]]["params"].append(flat)
        try:
            yield
        finally:
            for group in groups:
                group["params"] = []
