"""Memory of a rank at the peak of a step, by part: what `memory_plan` says is held, and what comes
on top for a moment.

A step has four moments that may be the highest:

    loss      all activations and what the loss makes, the head's gradient above all; of a single
              micro-batch no other gradient is there yet
    head      all activations, and the gradient of a head that is not tied in its reduce-scatter
    backward  activations, and the first gradients on their way through buckets or reduce-scatters
    update    everything that is held, and what the last reduce-scatter, of the embedding or the
              root, or DeepSpeed's step copies

Measured against real ranks by benchmarks/plan_accuracy.py.
"""

from dataclasses import dataclass, field

from dnt_scale.config import DeepSpeedEngineConfig, ModelConfig, RunConfig, TorchEngineConfig
from dnt_scale.config.deepspeed_json import bucket_of
from dnt_scale.config.engine import copies_of
from dnt_scale.costs import memory_plan
from dnt_scale.costs.memory_plan import FP32, REUSED, Memory
from dnt_scale.costs.work import (
    activation_bytes,
    block_bytes,
    loss_bytes,
    norm_bytes,
)

# elements: of what DeepSpeed all-reduces at a time (MEMORY_OPT_ALLREDUCE_SIZE)
ALLREDUCED = 500_000_000


@dataclass(frozen=True)
class Peak:
    """Bytes in a device's memory at the highest moment of a step, on the rank that holds most."""

    held: Memory
    parts: dict[str, int] = field(default_factory=dict)  # in the device's memory, by name
    moment: str = ""

    def total(self) -> int:
        """Return their sum."""
        return sum(self.parts.values())


def peak(run: RunConfig, world_size: int, nodes: int, seq_len: int, *, gpus: bool = True) -> Peak:
    """Return the peak of a run's ranks.

    Args:
        seq_len: tokens of a row.
        gpus: whether ranks have GPUs, where the loss makes more logits at a time.
    """
    model = run.model
    assert isinstance(model, ModelConfig)
    held = memory_plan.memory(run, world_size, nodes)
    c = memory_plan.compute_bytes(run)
    rows, micro_batches = micro_batch_of(run, world_size)
    tokens = rows * seq_len
    activations = activation_bytes(run, tokens, c)
    state = {
        name: getattr(held, name)
        for name in memory_plan.FIELDS
        if name not in held.host and getattr(held, name)
    }
    before, of_head = dict(state), dict[str, int]()
    if micro_batches == 1 and isinstance(run.engine, TorchEngineConfig):
        gradients = before.pop("gradients", 0)
        head = memory_plan.fsdp_units_of(model).last
        of_head["gradients"] = gradients * head // memory_plan.parameters_of(model)
    if isinstance(run.engine, TorchEngineConfig):
        top = _torch(run, world_size, nodes, c, gpus=gpus)
    else:
        top = _deepspeed(run, world_size, c)
    # half of the last block's and what is behind it are freed before gradients pile up
    behind = norm_bytes(model, c) * model.final_norm
    left = activations - tokens * (behind + block_bytes(model, c) // 2)
    made = loss_bytes(model, tokens, c, gpus=gpus)
    moments = {
        "loss": {**before, "activations": activations, "loss": made, **top.at_loss},
        "head": {**before, "activations": activations, **top.at_head},
        "backward": {**before, **of_head, "activations": max(0, left), **top.in_backward},
        "update": {**state, **top.at_update},
    }
    name = max(moments, key=lambda each: sum(moments[each].values()))
    parts = {part: size for part, size in moments[name].items() if size}
    return Peak(held, parts, name)


def micro_batch_of(run: RunConfig, world_size: int) -> tuple[int, int]:
    """Return the rows of a rank's micro-batch and how many it has a step."""
    rows = max(1, run.train.global_batch // world_size)
    micro = min(run.train.rows_a_forward, rows)
    return micro, -(-rows // micro)


@dataclass(frozen=True)
class _Beside:
    """Bytes beside what is held and the activations, by part, at each moment."""

    at_loss: dict[str, int]
    in_backward: dict[str, int]
    at_update: dict[str, int]
    at_head: dict[str, int] = field(default_factory=dict)


def _torch(run: RunConfig, world_size: int, nodes: int, c: int, *, gpus: bool) -> _Beside:
    """Return what FSDP2 holds beside: gathered weights, a unit's gradient, and the embedding's or
    the root's at the end.

    The root is gathered in the compute dtype from forward to the end, a head that is not tied from
    the loss to its backward; of several shards ``prefetch`` blocks too, beside the one that
    computes. A gradient is made in that dtype, and for the reduce-scatter once in fp32, whole and
    as this rank's part; the whole stays until the next unit's is reduced. Gloo takes as
    much again, by what is measured.
    """
    assert isinstance(run.engine, TorchEngineConfig)
    units = memory_plan.fsdp_units_of(run.model)
    blocks, block, root, head = units.blocks, units.block, units.root, units.last
    shards = world_size // copies_of(run.engine, world_size, nodes)
    ahead = min(blocks, run.engine.prefetch) if run.engine.reshard_after_forward else blocks
    computing = min(blocks, ahead + 1)
    reduced = FP32 + FP32 // shards if shards > 1 else FP32
    gathered = c * (root + (ahead * block if shards > 1 else 0))
    # of an embedding or a head; this rank's part of an embedding's is counted as a gradient that is
    # held, unless it is added to one
    whole = FP32 + (c + FP32 * (not gpus) if shards > 1 else 0)
    part = FP32 // shards
    added = part if micro_batch_of(run, world_size)[1] > 1 else 0
    return _Beside(
        {"gathered": gathered + c * head},
        {
            "gathered": c * (root + computing * block),
            "reduction": c * root + max(reduced * block, FP32 * head) + c * block,
        },
        {
            "gathered": c * root,
            "reduction": max((c + reduced) * root, (whole + added) * units.first),
        },
        {"gathered": gathered, "reduction": (whole + part) * head} if head else {},
    )


def _deepspeed(run: RunConfig, world_size: int, c: int) -> _Beside:
    """Return the same for ZeRO: weights gathered, and buckets of gradients.

    Stage 1 in bf16 adds each gradient to its fp32 sum at once; these sums, as stage 0's gradients,
    are copied into a buffer that is all-reduced at the end. In stages 1 and 2 gradients otherwise
    wait in a bucket of ``reduce_bucket_size`` numbers of the compute dtype, which backward makes,
    and are summed in fp32; in stage 2 those of other ranks' parts are there too until the bucket is
    full. Stage 3 keeps such a bucket in fp32 all the time, and a model of less than
    ``stage3_max_reuse_distance`` weights gathered.
    """
    assert isinstance(run.engine, DeepSpeedEngineConfig)
    units = memory_plan.fsdp_units_of(run.model)
    block, root = units.block, units.outer
    whole, stage = memory_plan.parameters_of(run.model), run.engine.stage
    reduced = {"reduction": FP32 * min(whole, ALLREDUCED)}
    if stage == 0:  # a copy to compute with, made of each weight as it is used
        copies = {"gathered": c * whole if c < FP32 else 0}
        return _Beside(copies, {**copies, "reduction": c * root}, reduced)
    if stage == 1 and c < FP32 and not run.engine.offload_optimizer:
        return _Beside({}, {"reduction": c * (root + block)}, reduced)
    bucket = bucket_of(run.engine)
    if stage < 3:
        others = c * (whole - whole // world_size) if stage == 2 else 0
        waiting = {"reduction": c * (bucket + root) + others}
        # the bucket in fp32, and the gradients that went into it
        summed = (FP32 + c) * min(bucket, whole)
        return _Beside({}, waiting, {"reduction": c * bucket + summed})
    gathered = c * (whole if whole < REUSED else root + 2 * block) if world_size > 1 else 0
    both = {"gathered": gathered, "reduction": FP32 * bucket}
    # what waits at the end of backward is reduced as in stage 2, the weights being gathered still
    summed = (FP32 + c) * min(bucket, whole)
    last = {"gathered": c * (whole if whole < REUSED else root + 2 * block)}
    return _Beside(both, both, {**last, "reduction": FP32 * bucket + summed})
