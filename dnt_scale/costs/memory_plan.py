"""What training costs each rank in memory and communication: formulas, checked against measurement
(docs/memory.md).

Counted is what is held between backward and update, the bytes that grow with the model and not with
the batch: fp32 weights that the optimizer steps, copies of them to compute with, gradients,
optimizer buffers, the average of the weights; with their padding. Activations, and what is whole
for a moment (a block's gathered weights, a bucket), come on top.

N ranks make C copies of S = N / C shards each; P is the number of weights.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from dnt_scale.config import (
    DeepSpeedEngineConfig,
    ModelSection,
    OptimizerConfig,
    RunConfig,
    TorchEngineConfig,
)
from dnt_scale.config.engine import copies_of
from dnt_scale.model import task
from dnt_scale.optim.groups import parameter_groups

FP32, BF16 = 4, 2
# elements: ZeRO 3 keeps smaller tensors whole (stage3_param_persistence_threshold)
PERSISTENT = 100_000
# elements: and keeps what it needs again so soon (stage3_max_reuse_distance)
REUSED = 1_000_000_000
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that holds most."""

    weights: int  # fp32, what the optimizer steps
    copies: int  # what the model computes with, where it is kept beside the weights
    gradients: int
    buffers: int  # the optimizer's
    average: int  # of the weights (train.ema)
    host: frozenset[str] = frozenset()  # which of these fields lie in the host's memory

    def device(self) -> int:
        """Bytes in the device's memory."""
        return sum(getattr(self, field) for field in FIELDS if field not in self.host)

    def total(self) -> int:
        return sum(getattr(self, field) for field in FIELDS)


FIELDS = ("weights", "copies", "gradients", "buffers", "average")


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank's collectives of one step carry: the whole gathered tensor, the whole
    tensor before a reduce-scatter, the tensor that is all-reduced. In a ring of N ranks (N - 1)/N
    of the first two pass each link, and twice that of the third."""

    all_gather: int
    reduce_scatter: int
    all_reduce: int

    def total(self) -> int:
        return self.all_gather + self.reduce_scatter + self.all_reduce


def shapes_of(model: ModelSection) -> Shapes:
    """Return the shape of every parameter, by name."""
    return _described(model).shapes


@dataclass(frozen=True)
class FsdpUnits:
    """Weights of what is gathered as one, see ``Task.fsdp_units``."""

    blocks: int  # how many there are
    block: int
    first: int  # in units before the first block: an embedding
    last: int  # in those behind the last: a head
    root: int  # in none

    @property
    def count(self) -> int:
        """Return how many units there are, the root's included."""
        return self.blocks + (self.first > 0) + (self.last > 0) + 1

    @property
    def outer(self) -> int:
        """Return the weights that are in no block."""
        return self.first + self.last + self.root


def fsdp_units_of(model: ModelSection) -> FsdpUnits:
    """Return the units of a model."""
    return _described(model).units


@dataclass(frozen=True)
class _Described:
    shapes: Shapes
    inside: frozenset[str]  # names of the parameters in blocks
    units: FsdpUnits


# By the text of the section: planning asks hundreds of times for the same one, which takes a deep
# model half a second to build.
_MODELS: dict[str, _Described] = {}
_GROUPS: dict[tuple[str, str], tuple["_Group", ...]] = {}
MOST_KEPT = 64


def _described(model: ModelSection) -> _Described:
    key = f"{type(model)}{model.model_dump_json()}"
    if key not in _MODELS:
        if len(_MODELS) == MOST_KEPT:
            _MODELS.clear()
        built = task.on_meta(model)
        shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
        blocks = list(built.blocks)
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        names = (name for name, parameter in built.named_parameters() if id(parameter) in inside)
        _MODELS[key] = _Described(shapes, frozenset(names), _fsdp_units(built))
    return _MODELS[key]


def _fsdp_units(built: task.Task) -> FsdpUnits:
    blocks, sizes = list(built.blocks), {"first": 0, "block": 0, "last": 0}
    for unit in built.fsdp_units():
        place = "block" if unit in blocks else "last" if sizes["block"] else "first"
        sizes[place] += sum(parameter.numel() for parameter in unit.parameters())
    root = sum(parameter.numel() for _, parameter in built.named_parameters()) - sum(sizes.values())
    block = -(-sizes["block"] // max(1, len(blocks)))
    return FsdpUnits(len(blocks), block, sizes["first"], sizes["last"], root)


def parameters_of(model: ModelSection) -> int:
    """P."""
    return sum(_elements(shape) for shape in shapes_of(model).values())


def checkpoint_bytes(run: RunConfig) -> int:
    """A checkpoint's tensors: fp32 weights, their average and the optimizer's buffers, whoever
    shards them; 8 P with a momentum.
    """
    groups = _groups_of(run)
    weights = 1 if run.train.ema is None else 2
    return FP32 * weights * parameters_of(run.model) + sum(
        group.bytes_a_weight * _elements(shape) + group.bytes_a_row * shape[0]
        for group in groups
        for shape in group.shapes
    )


def memory(run: RunConfig, world_size: int, nodes: int = 1) -> Memory:
    """Bytes of the rank that holds most, between backward and update.

    b is what the optimizer's buffers take a weight: 4 for each in fp32, 2 in bf16; each group of
    parameters has its own. What a group keeps of rows (4 bytes a row) is divided as the rows are,
    and whole on every rank with ZeRO.

    ``ddp``, ``fsdp``, ``hsdp`` with p weights a rank after sharding (``_sharded_rows``):

        weights 4 p,  gradients 4 p or 0 without a gradient buffer,  buffers b p

    ZeRO, c = 4 or 2 bytes to compute with (fp32, bf16), p = P / N after padding (``_flat`` for
    stages 1 and 2, of each parameter for itself in stage 3):

        stage   weights   copies   gradients   buffers
        0       4 P       -        4 P         b P
        1       4 p       c P      4 P         b p
        2       4 p       c P      4 p         b p
        3       4 p       c p      4 p         b p

    With ``train.ema`` an average of the weights takes as much as these.

    With ``offload_optimizer`` gradients are 4 p in stage 1 too, and DeepSpeed's own staging copies,
    4 p to 8 p bytes of the host's memory, are not counted.
    """
    shapes = shapes_of(run.model)
    groups = _groups_of(run)
    if isinstance(run.engine, TorchEngineConfig):
        shards = world_size // copies_of(run.engine, world_size, nodes)
        held = sum(_sharded_rows(shape, shards) for shape in shapes.values())
        host = frozenset(FIELDS) if run.engine.cpu_offload else frozenset[str]()
        gradients = FP32 * held if run.optim.gradient_buffer else 0
        buffers = sum(
            group.bytes_a_weight * _sharded_rows(shape, shards)
            + group.bytes_a_row * -(-shape[0] // shards)
            for group in groups
            for shape in group.shapes
        )
        return Memory(FP32 * held, 0, gradients, buffers, _average(run, held), host)
    engine, compute = run.engine, compute_bytes(run)
    whole = sum(_elements(shape) for shape in shapes.values())
    of_rows = sum(group.bytes_a_row * shape[0] for group in groups for shape in group.shapes)
    if engine.stage == 0:
        parts = [sum(map(_elements, group.shapes)) for group in groups]
    elif engine.stage == 3:
        parts = [
            sum(-(-_elements(shape) // world_size) for shape in group.shapes) for group in groups
        ]
        whole = sum(parts)
    else:
        parts = [_flat(group.shapes, world_size) // world_size for group in groups]
        whole = sum(parts) * world_size
    held = sum(parts)
    buffers = of_rows + sum(
        group.bytes_a_weight * part for group, part in zip(groups, parts, strict=True)
    )
    if engine.stage == 0:
        return Memory(FP32 * whole, 0, FP32 * whole, buffers, _average(run, whole))
    gradients = FP32 * (whole if engine.stage == 1 and not engine.offload_optimizer else held)
    host = frozenset({*FIELDS} - {"copies"} if engine.offload_optimizer else ())
    if engine.offload_parameters:
        host |= {"copies"}
    return Memory(FP32 * held, compute * whole, gradients, buffers, _average(run, held), host)


def traffic(run: RunConfig, world_size: int, nodes: int = 1) -> Traffic:
    """What one step sends, over all M micro-batches of a rank; scalars (norms, losses, cut rows)
    are left out.

    ``fsdp``, ``hsdp``, each unit and the root for itself, with p = P / S after padding, c as in
    ``memory``:

        all-gather      c S p a pass: blocks in forward, and in backward if
                        ``reshard_after_forward``; embedding, head and the root once
        reduce-scatter  4 S p a micro-batch
        all-reduce      4 p a step where there are copies; without a gradient buffer, a micro-batch

    ``ddp`` is S = 1: only the all-reduce is left. ZeRO:

        stage 0, 1      all-reduce 4 P a step;           stage 1 also all-gathers c P
        stage 2         all-reduce 4 P a micro-batch,    all-gather c P a step
        stage 3         reduce-scatter 4 P a micro-batch; all-gather c P in forward and in backward
                        of each one, but only once together if P is less than
                        stage3_max_reuse_distance (1e9), and for tensors of at most
                        stage3_param_persistence_threshold (1e5) elements once a step
    """
    shapes, compute = shapes_of(run.model), compute_bytes(run)
    micro_batches = _micro_batches(run, world_size)
    if isinstance(run.engine, TorchEngineConfig):
        copies = copies_of(run.engine, world_size, nodes)
        shards = world_size // copies
        passes = 2 if run.engine.reshard_after_forward else 1
        gathered = reduced = 0
        inside = _described(run.model).inside
        for name, shape in shapes.items():
            padded = shards * _sharded_rows(shape, shards)
            gathered += padded * (passes if name in inside else 1)
            reduced += padded
        sums = 1 if run.optim.gradient_buffer else micro_batches
        return Traffic(
            compute * gathered * micro_batches if shards > 1 else 0,
            FP32 * reduced * micro_batches if shards > 1 else 0,
            FP32 * reduced // shards * sums if copies > 1 else 0,
        )
    assert isinstance(run.engine, DeepSpeedEngineConfig)
    stage, whole = run.engine.stage, sum(_elements(shape) for shape in shapes.values())
    if stage < 3:
        padded = sum(_flat(each.shapes, world_size) for each in _groups_of(run))
        sums = micro_batches if stage == 2 else 1
        return Traffic(compute * padded if stage else 0, 0, FP32 * whole * sums)
    gathered = reduced = 0
    for shape in shapes.values():
        padded = world_size * -(-_elements(shape) // world_size)
        passes = 1 if whole < REUSED else 2
        gathered += padded * (1 if _elements(shape) <= PERSISTENT else passes * micro_batches)
        reduced += padded * micro_batches
    return Traffic(compute * gathered, FP32 * reduced, 0)


def shapes_updated_by(run: RunConfig, update: str) -> list[tuple[int, ...]]:
    """Return the shapes of all parameters whose group has this update rule."""
    return [shape for group in _groups_of(run) if group.update == update for shape in group.shapes]


def _average(run: RunConfig, held: int) -> int:
    """Bytes of the average of so many weights."""
    return 0 if run.train.ema is None else FP32 * held


def _micro_batches(run: RunConfig, world_size: int) -> int:
    return -(-run.train.global_batch // world_size // run.train.rows_a_forward)


def compute_bytes(run: RunConfig) -> int:
    """Return the bytes of a number to compute with."""
    assert run.train.dtype != "auto", "compute_dtype tells what it is or is likely to be"
    return BF16 if run.train.in_bf16 else FP32


def _elements(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _sharded_rows(shape: tuple[int, ...], shards: int) -> int:
    """Elements of a rank's rows: FSDP2 divides dimension 0 and pads each shard to the first
    one's size.
    """
    return -(-shape[0] // shards) * _elements(shape[1:])


def _flat(shapes: Iterable[tuple[int, ...]], world_size: int) -> int:
    """Elements of a group's flat tensor: DeepSpeed pads it to a multiple of 2 N."""
    unit = 2 * world_size
    return -(-sum(_elements(shape) for shape in shapes) // unit) * unit


@dataclass(frozen=True)
class _Group:
    """An optimizer group, which ZeRO 1 and 2 make one flat tensor of."""

    shapes: list[tuple[int, ...]]
    bytes_a_weight: int  # of buffers
    bytes_a_row: int
    update: str  # the rule's name


def _groups_of(run: RunConfig) -> tuple[_Group, ...]:
    key = (run.optim.model_dump_json(), run.model.model_dump_json())
    if key not in _GROUPS:
        if len(_GROUPS) == MOST_KEPT:
            _GROUPS.clear()
        _GROUPS[key] = tuple(_groups(run.optim, shapes_of(run.model)))
    return _GROUPS[key]


def _groups(optim: OptimizerConfig, shapes: Shapes) -> list[_Group]:
    named = (
        (name, torch.nn.Parameter(torch.empty(shape, device="meta")))
        for name, shape in shapes.items()
    )
    return [
        _Group(
            [tuple(parameter.shape) for parameter in group["params"]],
            group["algorithm"].bytes_a_weight,
            FP32 * len(group["update"].row_buffers),
            group["update"].update,
        )
        for group in parameter_groups(named, optim)
    ]
