"""Seconds of a step: each kind of work over the rate that the device reaches, and what of the
communication the computing does not hide.

    step = max(sum of work / rate, calls call_s) + exposed communication + optimizer

a roofline (Williams et al., 2009) of operations that are each bound by one
resource.
"""

import math
from dataclasses import dataclass

from dnt_scale.config import ModelConfig, RunConfig, TorchEngineConfig
from dnt_scale.config.engine import copies_of
from dnt_scale.costs import memory_plan
from dnt_scale.costs.memory_plan import FP32, Traffic
from dnt_scale.costs.peak import micro_batch_of
from dnt_scale.costs.work import work_of
from dnt_scale.model.task import flops_per_row
from dnt_scale.tools.planner.machine import HOP_S, Machine

# Assumed: how much of the computing hides communication. FSDP2 and ZeRO 3 gather the next block and
# reduce the last one meanwhile; DeepSpeed's stages 0 to 2 reduce when backward is done.
HIDES = {"zero0": 0.0, "zero1": 0.0, "zero2": 0.0}
HIDES_ELSE = 0.9
NEWTON_SCHULZ = "orthogonalized"
STEPS = 5  # the default of the rule


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what they go into; communication twice: all of it, and the part that
    computing does not hide, which alone counts.
    """

    parts: dict[str, float]
    communication: float
    traffic: Traffic
    sent: float  # bytes that a rank sends

    @property
    def seconds(self) -> float:
        """Return those of a step."""
        return math.fsum(self.parts.values())


def step_time(run: RunConfig, machine: Machine, seq_len: int) -> StepTime:
    """Return the seconds of a run's step on a machine.

    Args:
        seq_len: tokens of a row.
    """
    rates, c = machine.rates, memory_plan.compute_bytes(run)
    _, micro_batches = micro_batch_of(run, machine.ranks)
    rows = max(1, run.train.global_batch // machine.ranks)
    work = work_of(run, rows, seq_len, c, gpus=machine.gpus)
    parts = {
        "matmuls": work.matmul / rates.matmul,
        "attention": work.attention / rates.attention,
        "norms": work.norms / rates.norms,
        "pointwise": work.pointwise / rates.pointwise,
        "loss": work.loss / rates.loss,
    }
    calls = work.operations * rates.call_s
    parts["host"] = max(0.0, calls - math.fsum(parts.values()))
    computing = math.fsum(parts.values())
    parts["copies"] = micro_batches * copied_bytes(run, machine) / rates.copy
    traffic = memory_plan.traffic(run, machine.ranks, machine.nodes)
    seconds, sent = communication(run, machine, traffic, micro_batches)
    update, reduced = update_traffic(run, machine)
    hidden = HIDES.get(run.engine.name, HIDES_ELSE) * computing
    parts["communication"] = max(0.0, seconds - hidden) + update
    parts["optimizer"] = optimizer_seconds(run, machine)
    return StepTime(parts, seconds + update, traffic, sent + reduced)


def units_per_s(run: RunConfig, time: StepTime, seq_len: int) -> float:
    """Return the tokens a second of all ranks."""
    return run.train.global_batch * seq_len / time.seconds


def mfu(run: RunConfig, machine: Machine, tokens_per_s: float, seq_len: int) -> float | None:
    """Return tokens/s x FLOPs a token / (ranks x peak), as training prints it; see
    `model.flops.flops_per_token` for what counts. None where no peak is known.
    """
    if machine.peak_flops is None:
        return None
    flops = flops_per_row(run.model, seq_len) / seq_len
    return tokens_per_s * flops / (machine.ranks * machine.peak_flops)


# --- communication --------------------------------------------------------------------------------


def communication(
    run: RunConfig, machine: Machine, traffic: Traffic, micro_batches: int
) -> tuple[float, float]:
    """Return the seconds that a step's collectives take one after the other, and the bytes that a
    rank sends.

    In a ring of n ranks (n - 1) / n of a gathered or reduce-scattered tensor passes each link, and
    twice that of an all-reduced one (Patarasuk and Yuan, 2009); each collective also waits for
    log2(n) hops. Rings that leave their node do so over the adapters of all their ranks there, each
    of which carries its share.
    """
    ranks = machine.ranks
    engine = run.engine
    copies = copies_of(engine, ranks, machine.nodes) if isinstance(engine, TorchEngineConfig) else 1
    shards = ranks // copies if isinstance(engine, TorchEngineConfig) else ranks
    reducing = copies if isinstance(engine, TorchEngineConfig) else ranks
    within = _link(machine, shards)
    # ranks of one copy lie side by side, so those that are reduced are a copy's size apart
    apart = shards if isinstance(engine, TorchEngineConfig) else 1
    between = _link(machine, ranks, max(1, machine.ranks_per_node // apart))
    units = memory_plan.fsdp_units_of(run.model).count
    gathers = traffic.all_gather + traffic.reduce_scatter
    sent = gathers * (shards - 1) / shards + traffic.all_reduce * 2 * (reducing - 1) / reducing
    seconds = gathers * (shards - 1) / shards / within
    seconds += traffic.all_reduce * 2 * (reducing - 1) / reducing / between
    calls = 3 * units * micro_batches if gathers else 0
    hops = calls * _hops(shards) + (units * _hops(reducing) if traffic.all_reduce else 0)
    return seconds + hops * HOP_S, sent


def update_traffic(run: RunConfig, machine: Machine) -> tuple[float, float]:
    """Return the seconds and bytes sent of what Newton-Schulz steps add up over the ranks of a
    copy: each matrix twice, in bf16 on GPUs.
    """
    shards = _shards(run, machine)
    whole = 2 * (2 if machine.gpus else FP32) * _orthogonalized(run)
    sent = 2.0 * whole * (shards - 1) / shards
    return sent / _link(machine, shards), sent


def _link(machine: Machine, ranks: int, on_a_node: int | None = None) -> float:
    """Return the bytes/s of a ring.

    Args:
        ranks: over how many, side by side, it stretches.
        on_a_node: how many of them on a node are its own; None: all.
    """
    if ranks <= machine.ranks_per_node:
        return machine.link
    return min(machine.link, machine.network * (on_a_node or machine.ranks_per_node))


def _hops(ranks: int) -> float:
    return math.log2(ranks) if ranks > 1 else 0.0


def _shards(run: RunConfig, machine: Machine) -> int:
    """Return how many ranks share the optimizer's work."""
    if isinstance(run.engine, TorchEngineConfig):
        return machine.ranks // copies_of(run.engine, machine.ranks, machine.nodes)
    return 1 if run.engine.name == "zero0" else machine.ranks


# --- beside the model -----------------------------------------------------------------------------


def copied_bytes(run: RunConfig, machine: Machine) -> float:
    """Return the bytes that casts and copies of weights and gradients move a micro-batch.

    FSDP2 reads the fp32 shard and casts it, copies what it gathers to where it is used, and back:
    4 p + 5 c P a pass; a gradient goes to fp32, is reduced and added: c P + 12 P + 12 p. Stage 3 of
    ZeRO is taken to do the same; its other stages add each gradient to its fp32 sum: (c + 8) P.
    """
    c, whole = memory_plan.compute_bytes(run), memory_plan.parameters_of(run.model)
    gathers = isinstance(run.engine, TorchEngineConfig) or run.engine.name == "zero3"
    if not gathers:
        return (c + 8.0) * whole
    part = whole / _shards(run, machine)
    passes = 2 if getattr(run.engine, "reshard_after_forward", True) else 1
    return passes * (4 * part + 5 * c * whole) + (c + 12) * whole + 12 * part


def newton_schulz_flops(shape: tuple[int, ...], steps: int) -> float:
    """Return the FLOPs to orthogonalize a matrix: 4 R^2 C + 2 R^3 a step, R the fewer of rows and
    columns.
    """
    few, many = sorted(shape)
    return float(steps * (4 * few**2 * many + 2 * few**3))


def optimizer_seconds(run: RunConfig, machine: Machine) -> float:
    """Return the seconds of the gradient's norm and of the update: 16 + 2 b bytes a weight that a
    rank holds, b those of its buffers; and Newton-Schulz steps, which the ranks of a copy share.
    """
    shards = _shards(run, machine)
    held = memory_plan.parameters_of(run.model) / shards
    buffers = memory_plan.memory(run, machine.ranks, machine.nodes).buffers
    moved = 16 * held + 2 * buffers
    flops = sum(newton_schulz_flops(shape, STEPS) for shape in _matrices(run))
    return moved / machine.rates.copy + flops / shards / machine.rates.update


def _matrices(run: RunConfig) -> list[tuple[int, ...]]:
    return memory_plan.shapes_updated_by(run, NEWTON_SCHULZ)


def _orthogonalized(run: RunConfig) -> int:
    """Return the weights of all orthogonalized matrices."""
    return sum(math.prod(shape) for shape in _matrices(run))


def is_language_model(run: RunConfig) -> bool:
    """Return whether planning knows the run's kind of model."""
    return isinstance(run.model, ModelConfig)
