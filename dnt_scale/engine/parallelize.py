"""The whole sharding recipe, in the order in which it is applied.

``parallelize`` is where tensor and context parallelism will come: before the blocks are prepared,
for checkpointing and compilation then see the split blocks, and with mesh dimensions of their own.
"""

import logging
import socket
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dnt_scale.config import ConfigError, RunConfig, TorchEngineConfig
from dnt_scale.config.engine import copies_of
from dnt_scale.distributed.errors import AgreedError
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.engine import compiled, fp8
from dnt_scale.model import cpu_ops, documents
from dnt_scale.model.task import LossModule, Task

_aten = torch.ops.aten
# what selective checkpointing keeps: matrix products, and attention under each name it has on CPU
# and CUDA
KEPT_OPS = [
    *documents.OPERATIONS,
    *cpu_ops.OPERATIONS,
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    # of fp8, compiled; and the largest number of a tensor, which its scale is
    _aten._scaled_mm.default,
    _aten.max.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
    _aten._scaled_dot_product_attention_math.default,
]


def parallelize(model: LossModule, config: RunConfig, ranks: Ranks) -> None:
    """Spread ``model``, still on the meta device, over the ranks as ``config.engine`` says, in
    place. A collective.

    Raises:
        AgreedError: the copies of hsdp do not share the ranks equally, or no matrix can be
            multiplied in ``train.dtype`` fp8.
    """
    assert isinstance(config.engine, TorchEngineConfig)
    if config.train.dtype == "fp8":
        fp8.convert(model.task)
    prepare_blocks(model.task, config)
    mesh = data_mesh(config.engine, ranks)
    shard(model, mesh, config)
    set_prefetch(model, config.engine.prefetch)


def prepare_blocks(task: Task, config: RunConfig) -> None:
    """Checkpoint the blocks' activations and compile the blocks, as ``config.engine`` says; any
    engine's.

    ``block.forward`` is replaced in place: parameters keep their names, and hooks stay outside of
    what is recomputed and compiled. Blocks of equal shapes share one compilation; rows of another
    shape are compiled anew, for kernels of any shape are slower.
    """
    chosen = config.engine.activation_checkpointing
    if config.engine.compile:
        compiled.prepare()
    for index, block in enumerate(task.blocks):
        forward = block.forward
        # a block draws no random numbers (see Task), so no generator's state need be kept
        recomputed = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        if chosen == "selective":
            # warns of in-place operations
            logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
            forward = partial(
                recomputed, context_fn=partial(create_selective_checkpoint_contexts, KEPT_OPS)
            )
        elif chosen == "full" or (isinstance(chosen, int) and index % chosen == 0):
            forward = recomputed
        if config.engine.compile:
            forward = torch.compile(forward, fullgraph=True, dynamic=False)
        block.forward = forward


def data_mesh(engine: TorchEngineConfig, ranks: Ranks) -> DeviceMesh:
    """The ranks as copies of the model by shards of a copy; fsdp's mesh has no dimension of copies.
    A collective.

    Raises:
        AgreedError: the copies do not share the ranks equally.
    """
    device, world = ranks.device.type, ranks.world_size
    if engine.name == "fsdp":
        return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
    nodes = hosts(world) if engine.name == "hsdp" and engine.replicas is None else 1
    try:
        copies = copies_of(engine, world, nodes)
    except ConfigError as error:  # all ranks have the same configuration
        raise AgreedError(str(error)) from None
    return init_device_mesh(
        device, (copies, world // copies), mesh_dim_names=("replicate", "shard")
    )


def hosts(world: int) -> int:
    """Return on how many machines the ranks are. A collective."""
    names: list[str] = [""] * world
    dist.all_gather_object(names, socket.gethostname())
    return len(set(names))


def shard(model: LossModule, mesh: DeviceMesh, config: RunConfig) -> None:
    """Each of the task's units is one all-gather and one reduce-scatter; what is in none (of a DNT,
    positions, outer norms and a tied embedding) is the root's.

    An embedding's backward does without its weights, so they are not gathered for it; those of a
    unit behind the last block are kept for its backward, which comes next.

    Matrices are multiplied in ``train.dtype``, for fp8 gathered in bf16; the shards, and gradients
    from the reduce-scatter on, are fp32. No module's inputs are cast: a batch comes as the source
    made it, and a block may take fp32 tables beside activations. What meets weights, the model
    casts.
    """
    assert isinstance(config.engine, TorchEngineConfig)
    dtype = torch.bfloat16 if config.train.in_bf16 else torch.float32
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # copies of pinned memory are faster on CUDA, and not waited for: torch 2.11's hooks would see
    # them half made
    pinned = mesh.device_type == "cuda" and config.optim.gradient_buffer
    offload = CPUOffloadPolicy(pin_memory=pinned) if config.engine.cpu_offload else OffloadPolicy()
    reshard = config.engine.reshard_after_forward
    units, blocks = list(model.task.fsdp_units()), set(model.task.blocks)
    for unit in units:
        is_head, embeds = unit is units[-1] and unit not in blocks, isinstance(unit, nn.Embedding)
        fully_shard(
            unit,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=offload,
            reshard_after_forward=reshard and not is_head,
        )
        assert isinstance(unit, FSDPModule)
        if embeds:
            unit.set_unshard_in_backward(False)
        if is_head:
            unit.register_forward_pre_hook(_gather_alone, prepend=True)
    fully_shard(
        model,
        mesh=mesh,
        mp_policy=precision,
        offload_policy=offload,
    )


def _gather_alone(unit: nn.Module, _: object) -> None:
    """Gather a unit's weights, or wait for them, before FSDP2's own hook does: that would keep what
    came over the network, as large again, until the root's forward ends, the loss included.
    """
    assert isinstance(unit, FSDPModule)
    unit.unshard()


def set_prefetch(model: LossModule, ahead: int) -> None:
    """Gather the weights of ``ahead`` units before the one that computes is done, in both
    passes.
    """
    assert isinstance(model, FSDPModule)
    units: list[FSDPModule] = list(model.task.fsdp_units())  # type: ignore[arg-type]
    model.set_modules_to_forward_prefetch(units[:ahead])
    # with an empty list FSDP2 gathers one unit ahead in backward; a module that is gathered
    # already does nothing
    model.set_modules_to_backward_prefetch(units[::-1][:ahead] or [model])
    for index, unit in enumerate(units):
        before = units[:index][::-1]
        unit.set_modules_to_forward_prefetch(units[index + 1 :][:ahead])
        unit.set_modules_to_backward_prefetch(before[:ahead] or [unit])
