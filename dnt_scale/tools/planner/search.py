"""The best of the engines, meshes and micro-batches that a run may have on a machine, and the
fewest GPUs that it fits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dnt_scale.config import ConfigError, RunConfig, TorchEngineConfig
from dnt_scale.config.engine import DeepSpeedEngineConfig, copies_of
from dnt_scale.costs.peak import Peak, peak
from dnt_scale.tools.planner.machine import Machine
from dnt_scale.tools.planner.step_time import StepTime, step_time, units_per_s

MOST_RANKS = 1 << 16
MOST_COPIES = 6  # choices of hsdp's copies that are tried


@dataclass(frozen=True)
class Choice:
    """A way to run a run on a machine."""

    run: RunConfig
    machine: Machine
    peak: Peak
    time: StepTime
    units_per_s: float

    @property
    def fits(self) -> bool:
        """Return whether a rank's memory holds the peak; true where the memory is not known."""
        return self.machine.memory is None or self.peak.total() <= self.machine.memory

    @property
    def overrides(self) -> str:
        """Return how to ask `dnt train` for it."""
        engine, words = self.run.engine, [f"engine={self.run.engine.name}"]
        if isinstance(engine, TorchEngineConfig):
            words += [f"engine.replicas={engine.replicas}"] * (engine.replicas is not None)
            words += ["engine.reshard_after_forward=false"] * (not engine.reshard_after_forward)
        if engine.activation_checkpointing != "none":
            words.append(f"engine.activation_checkpointing={engine.activation_checkpointing}")
        return " ".join([*words, f"train.micro_batch={self.run.train.micro_batch}"])


def evaluate(run: RunConfig, machine: Machine, seq_len: int) -> Choice:
    """Return what a run takes as it is.

    Raises:
        ConfigError: the copies of hsdp do not share the ranks equally.
    """
    most = peak(run, machine.ranks, machine.nodes, seq_len, gpus=machine.gpus)
    time = step_time(run, machine, seq_len)
    return Choice(run, machine, most, time, units_per_s(run, time, seq_len))


def best(run: RunConfig, machine: Machine, seq_len: int) -> Choice | None:
    """Return the fastest choice that fits; None where none does.

    Recomputing activations is tried only where nothing fits without.
    """
    asked = run.engine.activation_checkpointing
    for recomputed in dict.fromkeys([asked, "full"]):
        found = [
            choice
            for each in choices(run, machine, recomputed)
            if (choice := evaluate(each, machine, seq_len)).fits
        ]
        if found:
            return max(found, key=lambda choice: choice.units_per_s)
    return None


def with_number(run: RunConfig, machine: Machine, seq_len: int) -> RunConfig:
    """Return the run with the fastest micro-batch that fits in the place of auto, its engine being
    what it is; one row where none fits.
    """
    if run.train.micro_batch != "auto":
        return run
    found = [evaluate(run.with_micro_batch(size), machine, seq_len) for size in sizes(run, machine)]
    fits = [choice for choice in found if choice.fits] or found[:1]
    return max(fits, key=lambda choice: choice.units_per_s).run


def sizes(run: RunConfig, machine: Machine) -> list[int]:
    """Return the micro-batches that are compared, ascending: powers of two up to a rank's rows."""
    rows = max(1, run.train.global_batch // machine.ranks)
    return sorted({min(1 << power, rows) for power in range(rows.bit_length() + 1)})


def choices(run: RunConfig, machine: Machine, recomputed: str | int) -> Iterator[RunConfig]:
    """Yield the run with each legal engine and mesh, and micro-batches of powers of two rows."""
    for engine in engines(run, machine, recomputed):
        for size in sizes(run, machine):
            yield run.model_copy(update={"engine": engine}).with_micro_batch(size)


def engines(
    run: RunConfig, machine: Machine, recomputed: str | int
) -> Iterator[TorchEngineConfig | DeepSpeedEngineConfig]:
    """Yield the engines that go with a run: what it offloads stays as it is."""
    shared = {"compile": run.engine.compile, "activation_checkpointing": recomputed}
    ranks = machine.ranks
    torch = {**shared, "cpu_offload": getattr(run.engine, "cpu_offload", False)}
    yield TorchEngineConfig(name="fsdp", **torch)
    if ranks > 1:
        yield TorchEngineConfig(name="fsdp", reshard_after_forward=False, **torch)
        yield TorchEngineConfig(name="ddp", **torch)
        for copies in _copies(machine):
            yield TorchEngineConfig(name="hsdp", replicas=copies, **torch)
    if not run.optim.gradient_buffer:
        return  # DeepSpeed sums gradients in buffers of its own
    for stage in (1, 2, 3):
        swaps = stage == 3 and (run.engine.compile or recomputed == "selective")
        if not swaps:
            offload = {
                "offload_optimizer": getattr(run.engine, "offload_optimizer", False),
                "offload_parameters": stage == 3
                and getattr(run.engine, "offload_parameters", False),
                "deepspeed": getattr(run.engine, "deepspeed", {}),
            }
            yield DeepSpeedEngineConfig(name=f"zero{stage}", **shared, **offload)


def _copies(machine: Machine) -> list[int]:
    """Return numbers of hsdp's copies: one a node, and fewer whose shards are whole nodes."""
    several = [
        machine.nodes // divisor
        for divisor in (1, 2, 4, 8, 16, 32)
        if machine.nodes % divisor == 0 and machine.nodes // divisor > 1
    ]
    return [copies for copies in several[:MOST_COPIES] if machine.ranks % copies == 0]


def is_legal(run: RunConfig, machine: Machine) -> bool:
    """Return whether ranks share the global batch and hsdp's copies share the ranks equally."""
    if run.train.global_batch % machine.ranks:
        return False
    if isinstance(run.engine, TorchEngineConfig):
        try:
            copies_of(run.engine, machine.ranks, machine.nodes)
        except ConfigError:
            return False
    return True


def fewest(
    run: RunConfig, machine: Machine, seq_len: int, fits: Callable[[Machine], bool] | None = None
) -> Machine | None:
    """Return the smallest machine of the same nodes that some choice fits; None: none of up to
    65,536 ranks.

    Fewer than a node's ranks are powers of two; beyond, whole nodes. A micro-batch is as small as
    it may be, and the global batch as large as it has to be.
    """

    def holds(size: Machine) -> bool:
        return least(run, size, seq_len).fits

    enough = fits or holds
    inside = [1 << power for power in range(machine.ranks_per_node.bit_length())]
    for count in [each for each in inside if each < machine.ranks_per_node]:
        if enough(machine.of_nodes(1, count)):
            return machine.of_nodes(1, count)
    low, high = 0, 1
    while not enough(machine.of_nodes(high)):
        low, high = high, 2 * high
        if high * machine.ranks_per_node > MOST_RANKS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(machine.of_nodes(middle)) else (middle, high)
    return machine.of_nodes(high)


def least(run: RunConfig, machine: Machine, seq_len: int) -> Choice:
    """Return the choice that takes the least memory, with micro-batches of one row."""
    rows = max(run.train.global_batch, machine.ranks)
    train = run.train.model_copy(update={"micro_batch": 1, "global_batch": rows})
    asked = run.engine.activation_checkpointing
    found = [
        evaluate(run.model_copy(update={"engine": engine, "train": train}), machine, seq_len)
        for recomputed in dict.fromkeys([asked, "full"])
        for engine in engines(run, machine, recomputed)
    ]
    return min(found, key=lambda choice: choice.peak.total())
