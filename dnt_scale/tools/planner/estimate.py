"""All that `dnt plan` tells of a run on a machine, each number with where it is from.

measured  timed on this machine (`--measure`)
derived   follows from the configuration, or from a formula that is checked against real runs
assumed   from a data sheet, or efficiencies that published runs suggest
"""

from dataclasses import dataclass
from typing import Literal

from dnt_scale import config
from dnt_scale.config import ConfigError, ModelConfig, RunConfig
from dnt_scale.config.hardware import Hardware
from dnt_scale.costs import memory_plan
from dnt_scale.tools.planner.goodput import (
    GPU_HOURS_A_FAILURE,
    HOST_COPY_BYTES_S,
    Goodput,
    goodput,
    storage_seconds,
)
from dnt_scale.tools.planner.machine import GB, Machine, gpu_machine
from dnt_scale.tools.planner.search import (
    Choice,
    best,
    evaluate,
    fewest,
    is_legal,
    least,
    with_number,
)
from dnt_scale.tools.planner.step_time import is_language_model, mfu

Source = Literal["measured", "derived", "assumed"]
DAY_S = 86400.0


@dataclass(frozen=True)
class Number:
    """A value, and where it is from."""

    value: float
    unit: str
    source: Source


@dataclass(frozen=True)
class Rival:
    """The same model with another optimizer: what it takes at least, and on how many GPUs."""

    optimizer: str
    held: int  # bytes of a rank between backward and update, as the run is sharded
    peak: int
    fewest_ranks: int | None


@dataclass(frozen=True)
class Outlook:
    """What a submission tells of a plan."""

    asked: Choice
    best: Choice | None  # None: nothing fits
    mfu: float | None


def outlook(
    run: RunConfig, hardware: Hardware, nodes: int, gpus_per_node: int, seq_len: int
) -> Outlook | None:
    """Return a plan in short, of a run that need not fit; None where it cannot be planned."""
    compiled = run.engine.compile
    machine = gpu_machine(hardware, nodes, gpus_per_node, run.train.dtype, compiled=compiled)
    if not is_language_model(run) or not is_legal(run, machine):
        return None
    run = with_number(run, machine, seq_len)
    asked = evaluate(run, machine, seq_len)
    share = mfu(run, machine, asked.units_per_s, seq_len)
    return Outlook(asked, best(run, machine, seq_len), share)


@dataclass(frozen=True)
class Estimate:
    """A run on a machine."""

    asked: Choice
    best: Choice
    seq_len: int
    tokens: int  # the budget
    steps: int
    mfu: float | None
    speed_source: Source
    checkpoint_bytes: int
    save_s: float  # until a checkpoint is written
    waits_s: float  # how long training waits for it
    goodput: Goodput
    rivals: tuple[Rival, ...]

    @property
    def seconds(self) -> float:
        """Return those of training without failures."""
        return self.steps * self.asked.time.seconds

    def numbers(self) -> dict[str, Number]:
        """Return the numbers by name."""
        choice, speed = self.asked, self.speed_source
        time, traffic = choice.time, choice.time.traffic
        found = {
            "ranks": Number(choice.machine.ranks, "ranks", "derived"),
            "parameters": Number(memory_plan.parameters_of(choice.run.model), "weights", "derived"),
            "tokens": Number(self.tokens, "tokens", "derived"),
            "steps": Number(self.steps, "steps", "derived"),
            "peak_memory": Number(choice.peak.total(), "bytes a rank", "derived"),
            "sent": Number(time.sent, "bytes a rank a step", "derived"),
            "all_gather": Number(traffic.all_gather, "bytes a rank a step", "derived"),
            "reduce_scatter": Number(traffic.reduce_scatter, "bytes a rank a step", "derived"),
            "all_reduce": Number(traffic.all_reduce, "bytes a rank a step", "derived"),
            "step": Number(time.seconds, "s", speed),
            "tokens_per_s": Number(choice.units_per_s, "tokens/s", speed),
            "training": Number(self.seconds, "s", speed),
            "device_hours": Number(
                self.seconds / self.goodput.share * choice.machine.ranks / 3600, "hours", speed
            ),
            "checkpoint": Number(self.checkpoint_bytes, "bytes", "derived"),
            "checkpoint_save": Number(self.save_s, "s", "assumed"),
            "goodput": Number(self.goodput.share, "of the time", "assumed"),
            "between_failures": Number(self.goodput.between_failures, "s", "assumed"),
            "best_tokens_per_s": Number(self.best.units_per_s, "tokens/s", speed),
        }
        if choice.machine.memory is not None:
            found["memory"] = Number(choice.machine.memory, "bytes a rank", "assumed")
        if self.mfu is not None:
            found["mfu"] = Number(self.mfu, "of peak", speed)
        found |= {
            f"memory.{part}": Number(size, "bytes a rank", "derived")
            for part, size in choice.peak.parts.items()
        }
        return found | {
            f"step.{part}": Number(seconds, "s", speed) for part, seconds in time.parts.items()
        }


def estimate(
    run: RunConfig,
    machine: Machine,
    seq_len: int,
    gpu_hours_a_failure: float = GPU_HOURS_A_FAILURE,
    rivals: tuple[tuple[str, RunConfig], ...] = (),
) -> Estimate:
    """Return the plan of a run.

    Args:
        run: with ``train.dtype`` bf16 or fp32.
        seq_len: tokens of a row.
        rivals: the run with other optimizers, by their names, to be compared.

    Raises:
        ConfigError: ranks do not share the batch, or it does not fit; names the nearest that does.
    """
    check_kind(run)
    check_shares(run, machine)
    run = with_number(run, machine, seq_len)
    asked = evaluate(run, machine, seq_len)
    found = best(run, machine, seq_len)
    if not asked.fits or found is None:
        raise ConfigError(refusal(asked, found, seq_len))
    spans = run.spans(seq_len)
    steps, tokens = spans[-1].end, spans[-1].units_at(spans[-1].end)
    size = memory_plan.checkpoint_bytes(run)
    save_s = storage_seconds(size, machine.nodes)
    waits = size / machine.ranks / HOST_COPY_BYTES_S if run.checkpoint.background else save_s
    every = run.checkpoint.every or steps
    return Estimate(
        asked=asked,
        best=max(asked, found, key=lambda choice: choice.units_per_s),
        seq_len=seq_len,
        tokens=tokens,
        steps=steps,
        mfu=mfu(run, machine, asked.units_per_s, seq_len),
        speed_source="measured" if machine.rates.measured else "assumed",
        checkpoint_bytes=size,
        save_s=save_s,
        waits_s=waits,
        goodput=goodput(
            machine.ranks,
            gpu_hours_a_failure,
            min(every, steps) * asked.time.seconds,
            waits,
            save_s,
        ),
        rivals=tuple(_rival(name, each, machine, seq_len) for name, each in rivals),
    )


def _rival(name: str, run: RunConfig, machine: Machine, seq_len: int) -> Rival:
    most = evaluate(with_number(run, machine, seq_len), machine, seq_len).peak
    needs = fewest(run, machine, seq_len) if machine.memory is not None else None
    return Rival(name, most.held.total(), most.total(), needs.ranks if needs else None)


# --- what cannot be -------------------------------------------------------------------------------


def check_kind(run: RunConfig) -> None:
    """Raise ConfigError for a model whose work is not known."""
    if not is_language_model(run):
        raise ConfigError(
            f"model.kind is {run.model.kind}, of which dnt plan does not know the work; it plans "
            "language models, model.kind=dnt"
        )


def check_shares(run: RunConfig, machine: Machine) -> None:
    """Raise ConfigError where ranks do not share the batch, or copies the ranks, equally; with the
    nearest that would.
    """
    if is_legal(run, machine):
        return
    ranks, rows = machine.ranks, run.train.global_batch
    if rows % ranks:
        near = max(ranks, round(rows / ranks) * ranks)
        fewer = next(each for each in range(min(ranks, rows), 0, -1) if rows % each == 0)
        raise ConfigError(
            f"train.global_batch is {rows} rows, which {ranks} ranks do not share equally; "
            f"nearest: train.global_batch={near}, or {fewer} ranks"
        )
    copies = getattr(run.engine, "replicas", None) or machine.nodes
    near = min(
        (each for each in range(1, ranks + 1) if ranks % each == 0),
        key=lambda each: abs(each - copies),
    )
    raise ConfigError(
        f"engine.replicas is {copies}, which {ranks} ranks do not share equally; nearest: "
        f"engine.replicas={near}"
    )


def refusal(asked: Choice, found: Choice | None, seq_len: int) -> str:
    """Return in one line what does not fit, and the nearest that would."""
    run, machine = asked.run, asked.machine
    assert machine.memory is not None
    room = f"{machine.device} has {machine.memory / GB:.0f} GB free for it"
    needs = (
        f"{asked.overrides} on {machine.ranks} ranks needs {asked.peak.total() / GB:.1f} GB a "
        f"rank, and an {room}"
    )
    if found is not None:
        return (
            f"{needs}; nearest that fits: {found.overrides}, {found.peak.total() / GB:.1f} GB a "
            "rank"
        )
    where = fewest(run, machine, seq_len)
    if where is not None:
        smallest = least(run, where, seq_len)
        more = f"at least {where.ranks} ranks"
        if where.nodes > 1:
            more += f", {where.nodes} nodes of {where.ranks_per_node}"
        return (
            f"model {run.model.name} with {run.optim.algorithm}: {needs}; by any engine it needs "
            f"{more} ({smallest.overrides})"
        )
    widest = _widest(run, machine, seq_len)
    return (
        f"model.width: {needs}; no number of ranks holds a block of it and the embedding; nearest "
        f"that fits: model.width={widest}"
    )


def _widest(run: RunConfig, machine: Machine, seq_len: int) -> int:
    """Return the widest model of the same heads that fits so many ranks by some engine."""
    section = run.model
    assert isinstance(section, ModelConfig)
    width = section.width
    while width > section.heads:
        width = max(section.heads, width // 2 // section.heads * section.heads)
        raw = run.model_dump(mode="json")
        raw["model"] |= {"width": width}
        if least(config.validate(raw), machine, seq_len).fits:
            return width
    return section.heads
