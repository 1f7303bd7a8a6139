"""What a submission is going to do: how the run spreads over ranks, what it holds and writes, how
long it may take."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import run_record
from cluster.cluster_config import ClusterConfig
from cluster.slurm import Node, Partition
from data_prep.words import counted, duration, megabytes, named_lines
from dnt_scale import checkpoint
from dnt_scale.config import RunConfig, Unit
from dnt_scale.config.hardware import hardware_of
from dnt_scale.costs.memory_plan import FIELDS, Memory, checkpoint_bytes, memory, parameters_of
from dnt_scale.distributed import compute_dtype
from dnt_scale.record import timeline
from dnt_scale.record.metrics_file import last_metrics
from dnt_scale.tools.planner.estimate import Outlook, outlook
from dnt_scale.train.stages import Stage, Stages

RECENT = 50  # steps whose median tells a run's speed
WORTH_TELLING = 1.05  # times as fast; a roofline is not exact enough for less


@dataclass(frozen=True)
class PastPace:
    """What a run's own folder tells of its pace."""

    units_per_s: float  # median of the last steps
    steps: int  # how many steps the median is of
    ranks: int
    step_s: float
    # From the end of a step until its checkpoint was in place; None: not known.
    save_s: float | None


@dataclass(frozen=True)
class Plan:
    run: RunConfig
    site: ClusterConfig
    dtype: str  # bf16 or fp32: train.dtype, or what auto is likely to become there
    micro_batch: int  # the same
    partition: str
    gpu: str  # SLURM's type of it; empty: it gives none
    stages: Stages
    done: int  # how many of them a checkpoint has that the run goes on from
    parameters: int
    checkpoint_bytes: int
    most_checkpoints: int  # on disk at a time, one that is being written included
    memory: Memory
    units_per_s: float | None
    why: str  # where that number is from
    outlook: Outlook | None  # what `dnt plan` says; None: of GPUs or a model that it does not know
    notes: tuple[str, ...]

    @property
    def steps(self) -> int:
        return self.stages.total_steps

    @property
    def unit(self) -> Unit:
        return self.stages.source.unit

    @property
    def seconds(self) -> float | None:
        """Return the seconds of training that are left, if its speed is known."""
        left = self.stages.units_at(self.steps) - self.stages.units_at(self.done)
        return left / self.units_per_s if self.units_per_s else None


def make_plan(
    run: RunConfig, site: ClusterConfig, partition: Partition, stages: Stages, done: int = 0
) -> Plan:
    """Return the plan of a run that fits its cluster, see
    :func:`cluster.submit.checks.check_and_plan`.

    Args:
        done: steps that the run's newest checkpoint has.
    """
    unit = stages.source.unit
    gpu = type_of_gpu(partition.nodes) if site.gpus_per_node else ""
    likely = compute_dtype.expected(run, gpus=bool(site.gpus_per_node))
    before = read_past_pace(run, unit)
    found = expected_on(likely, unit, site, gpu)
    units_per_s, why = expected_speed(unit, site.ranks, found, before)
    return Plan(
        run=run,
        site=site,
        dtype=likely.train.dtype,
        micro_batch=(found.asked.run if found else run).train.rows_a_forward,
        partition=partition.name,
        gpu=gpu,
        stages=stages,
        done=done,
        parameters=parameters_of(run.model),
        checkpoint_bytes=checkpoint_bytes(run),
        most_checkpoints=most_checkpoints(run, stages.total_steps),
        memory=memory(likely, site.ranks, site.nodes),
        units_per_s=units_per_s,
        why=why,
        outlook=found,
        notes=(),
    )


# --- how long -------------------------------------------------------------------------------------


def read_past_pace(run: RunConfig, unit: Unit) -> PastPace | None:
    """Return the pace of a run that has trained before, from its metrics.jsonl; None where there
    are no steps."""
    rows = [row for row in last_metrics(run.run.dir) if row.get(f"{unit.name}_per_s")]
    if not rows:
        return None
    recent = [float(row[f"{unit.name}_per_s"]) for row in rows[-RECENT:]]
    started = run_record.last_event(timeline.read(run.run.dir), "start")
    median = statistics.median(recent)
    return PastPace(
        units_per_s=median,
        steps=len(recent),
        ranks=int(started["ranks"]) if started else 1,
        step_s=_units_a_step(run, unit, rows) / median,
        save_s=_save_seconds(run, rows),
    )


def _units_a_step(run: RunConfig, unit: Unit, rows: Sequence[dict[str, Any]]) -> float:
    """Return the units of the last step: of a run's stages each has its own batch."""
    if len(rows) < 2 or rows[-1]["step"] == rows[-2]["step"]:
        return unit.of(run.train.global_batch)
    before, last = rows[-2:]
    return float((last[unit.name] - before[unit.name]) / (last["step"] - before["step"]))


def _save_seconds(run: RunConfig, rows: Sequence[dict[str, Any]]) -> float | None:
    newest = checkpoint.newest(run.checkpoints)
    if not isinstance(newest, Path):
        return None
    ended = next(
        (row["time"] for row in rows if row["step"] == int(newest.name.removeprefix("step-"))), None
    )
    return None if ended is None else max(0.0, (newest / "state.json").stat().st_mtime - ended)


def expected_on(run: RunConfig, unit: Unit, site: ClusterConfig, gpu: str) -> Outlook | None:
    """Return what `dnt plan` says of a run in bf16 on GPUs that are known; else None."""
    hardware = hardware_of(gpu)
    if hardware is None or run.run.device == "cpu" or run.train.dtype != "bf16":
        return None
    return outlook(run, hardware, site.nodes, site.tasks_per_node, unit.a_row)


def expected_speed(
    unit: Unit, ranks: int, found: Outlook | None, before: PastPace | None
) -> tuple[float | None, str]:
    """Return units a second over all ranks, and where the number is from: the run's past, else a
    roofline where the GPU is known, else None."""
    if before:
        speed = before.units_per_s * ranks / before.ranks
        why = f"at {speed:,.0f} {unit.name}/s: the median of the run's last {before.steps} steps"
        if ranks != before.ranks:
            why += f" on {counted(before.ranks, 'rank')}, times {ranks}/{before.ranks}"
        return speed, why
    if found is not None:
        speed = found.asked.units_per_s
        device, share = found.asked.machine.device, found.mfu
        mfu = "" if share is None else f" and {share:.0%} MFU"
        assumed = f"assumes a roofline{mfu} of {device}, which is not measured; see `dnt plan`"
        return speed, f"at {speed:,.0f} {unit.name}/s: {assumed}"
    return None, "not known before the first steps; `dnt jobs` will tell"


def type_of_gpu(nodes: Sequence[Node]) -> str:
    """Return SLURM's type of the nodes' GPUs, empty if they have none or several."""
    kinds = {node.gpu for node in nodes if node.gpus}
    return kinds.pop() if len(kinds) == 1 else ""


def jobs_needed(seconds: float, site: ClusterConfig) -> int:
    """Return how many jobs so much training takes; each one stops ``signal_s`` before its time is
    up."""
    return max(1, math.ceil(seconds / (site.time * 60 - site.signal_s)))


def most_checkpoints(run: RunConfig, steps: int) -> int:
    """Return how many lie on disk at a time, at most: the newest, one that is being written, one
    whose tasks are being measured, and those kept for good."""
    settings = run.checkpoint
    saved = math.ceil(steps / settings.every) if settings.every else 1
    kept = (
        steps // math.lcm(settings.every, settings.keep_every)
        if settings.every and settings.keep_every
        else 0
    )
    return min(saved, settings.keep + 1 + bool(run.eval.tasks.every) + kept)


# --- in words -------------------------------------------------------------------------------------


def format_plan(plan: Plan) -> str:
    """Return the plan as lines of a name and what there is to say, for a terminal."""
    run, site = plan.run, plan.site
    each_job = duration(site.time * 60)
    lines = [
        ("run", f"{run.run.name} in {run.run.dir.absolute()}"),
        ("cluster", f"partition {plan.partition}: {_format_ranks(plan)}; jobs of {each_job}"),
        (
            "model",
            f"{run.model.name}, {_format_parameters(plan.parameters)} parameters; engine "
            f"{run.engine.name}, optimizer {run.optim.algorithm}, "
            f"{plan.dtype}{' (expected)' if run.train.dtype == 'auto' else ''}",
        ),
        *(("data", line) for line in plan.stages.source.describe()),
        ("batch", _format_batch(plan, plan.stages[0])),
        *(("stage", line) for stage in plan.stages[1:] for line in _format_stage(plan, stage)),
        ("steps", _format_steps(plan)),
        ("checkpoints", _format_checkpoints(plan)),
        ("memory", f"{_format_memory(plan)}; {_format_peak(plan)}"),
        ("expected", _format_expected(plan)),
        *(("faster", line) for line in _format_faster(plan)),
        *(("note", note) for note in plan.notes),
    ]
    return named_lines(lines)


def _format_parameters(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def _format_ranks(plan: Plan) -> str:
    site = plan.site
    each = counted(site.tasks_per_node, "rank")
    gpus = (
        f"{counted(site.gpus_per_node, (plan.gpu + ' GPU').strip())}"
        if site.gpus_per_node
        else "no GPUs"
    )
    return (
        f"{counted(site.nodes, 'node')} x {each} = {counted(site.ranks, 'rank')}; a node: {gpus}, "
        f"{_format_cpus(site)}"
    )


def _format_cpus(site: ClusterConfig) -> str:
    memory_gb = (
        ""
        if site.mem_gb is None
        else ", all memory"
        if site.mem_gb == 0
        else f", {site.mem_gb:g} GB memory"
    )
    return counted((site.cpus_per_rank or 1) * site.tasks_per_node, "CPU") + memory_gb


def _format_stage(plan: Plan, stage: Stage) -> Iterator[str]:
    """Return a line on what changes with a stage, and one for each of its sets."""
    span = stage.span
    steps = f"steps {span.begin + 1:,} to {span.end:,}"
    yield f"{span.name}, {steps}: {_format_batch(plan, stage)}"
    if stage.source is not plan.stages.source:
        yield from stage.source.describe()


def _format_batch(plan: Plan, stage: Stage) -> str:
    rows = f"{stage.run.train.global_batch} rows of {stage.span.a_row} {plan.unit.name}"
    return f"{rows} = {_format_split(plan, stage.run)}"


def _format_split(plan: Plan, run: RunConfig) -> str:
    """Return the global batch as ranks x micro-batches x rows, and what is left over."""
    rows = run.train.global_batch // plan.site.ranks
    auto = run.train.micro_batch == "auto"
    micro = min(plan.micro_batch if auto else run.train.rows_a_forward, rows)
    expected = " (expected)" if auto else ""
    full, rest = divmod(rows, micro)
    ranks = counted(plan.site.ranks, "rank")
    if not rest:
        return (
            f"{ranks} x {counted(full, 'micro-batch', 'micro-batches')} x {counted(micro, 'row')}"
            f"{expected}"
        )
    return (
        f"{ranks} x ({counted(full, 'micro-batch', 'micro-batches')} of {counted(micro, 'row')} "
        f"and one of {rest}){expected}"
    )


def _format_steps(plan: Plan) -> str:
    rows = plan.steps * plan.run.train.global_batch
    a_step, unit = plan.unit.of(plan.run.train.global_batch), plan.unit.name
    units = f"{plan.stages.units_at(plan.steps):,} {unit}"
    text = f"{plan.steps:,} of {a_step:,} {unit} = {units}, {plan.stages.source.epochs(rows)}"
    if len(plan.stages) > 1:
        text = f"{plan.steps:,} in {len(plan.stages)} stages = {units}"
    return f"{text}; goes on from step {plan.done:,}" if plan.done else text


def _format_checkpoints(plan: Plan) -> str:
    settings = plan.run.checkpoint
    when = f"every {settings.every:,} steps" if settings.every else "at the end"
    return (
        f"{megabytes(plan.checkpoint_bytes)} each, {when}, at most {plan.most_checkpoints} at a "
        f"time ({megabytes(plan.most_checkpoints * plan.checkpoint_bytes)}), in "
        f"{plan.run.checkpoints}"
    )


def _format_memory(plan: Plan) -> str:
    found = plan.memory
    names = {"buffers": plan.run.optim.state_name, "copies": f"{plan.dtype} weights"}
    parts = [(field, getattr(found, field)) for field in FIELDS if getattr(found, field)]
    words = " + ".join(f"{names.get(field, field)} {megabytes(count)}" for field, count in parts)
    host = (
        f", of which {megabytes(found.total() - found.device())} in the host's memory"
        if found.host
        else ""
    )
    return f"{megabytes(found.total())} a rank: {words}{host}"


def _format_expected(plan: Plan) -> str:
    if plan.seconds is None:
        return plan.why
    jobs = counted(jobs_needed(plan.seconds, plan.site), "job")
    return f"{duration(plan.seconds)} of training in {jobs}, {plan.why}"


def _format_peak(plan: Plan) -> str:
    """Return what comes on top: by `dnt plan`'s formulas where the GPU is known."""
    found = plan.outlook
    if found is None or found.asked.machine.memory is None:
        return "activations come on top"
    most, room = found.asked.peak.total(), int(found.asked.machine.memory)
    text = f"{megabytes(most)} of {megabytes(room)} at a step's peak (derived)"
    if found.asked.fits:
        return text
    nearest = found.best.overrides if found.best else "more ranks"
    return f"{text}, which does not fit; nearest that does: {nearest}"


def _format_faster(plan: Plan) -> Iterator[str]:
    """Yield the engine, mesh and micro-batch that `dnt plan` would take, if it is clearly faster
    than what is asked for."""
    found = plan.outlook
    if found is None or found.best is None or not found.asked.fits:
        return
    gain = found.best.units_per_s / found.asked.units_per_s
    if gain >= WORTH_TELLING:
        yield f"{found.best.overrides} would be {gain:.2f} times as fast (assumed)"
