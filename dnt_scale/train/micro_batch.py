"""Which ``train.micro_batch`` a run takes where it is auto: measured at its first start, recorded,
and kept by a resume.

The ranks time forward and backward of the run's task, or of some layers of a large one, for more
and more rows, while that makes a row clearly cheaper and the memory of a GPU has room for it. They
compute together as in training, send what they send then, and go by the slowest one. Of sizes that
are about as fast the smallest is taken, which needs the least memory.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch.distributed.fsdp import FSDPModule

from dnt_scale.config import ModelConfig, RunConfig, TorchEngineConfig
from dnt_scale.costs import memory_plan
from dnt_scale.costs.peak import peak
from dnt_scale.distributed import device_metrics
from dnt_scale.distributed.agree import highest, together
from dnt_scale.distributed.errors import out_of_memory
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.engine.parallelize import hosts, parallelize
from dnt_scale.model.batch import Batch, each, moved
from dnt_scale.model.task import LossModule, blank_buffers, build_task, fill_buffers
from dnt_scale.optim.shards import local
from dnt_scale.train.run_folder import Start
from dnt_scale.train.stages import Stage, Stages, check_batches, load_stages

GAIN = 1.05  # times as fast as half the rows: less is not worth the memory
MISSES = 2  # sizes in a row that are not, after which no larger one is tried
REPEATS = 3  # of each pass, the least of which counts
LONG_S = 0.5  # of a pass, beside which the costs of calling it do not show
SMALL = 32_000_000  # weights of a model that is timed whole
LAYERS = 2  # that are timed of others
READ = 8  # rows that are read of the data; more are the same ones again
NEVER = 1 << 62  # nanoseconds
SHARE = 0.9  # of a GPU's free memory that the peak may take
Clock = Callable[[], float]


def resolve(
    run: RunConfig, ranks: Ranks, start: Start, clock: Clock = time.perf_counter
) -> tuple[RunConfig, str]:
    """Return ``run`` with a number in the place of auto, the same on all ranks, and a line for the
    user or "". A collective.

    Args:
        start: has the number that the run was trained with, which auto keeps; then nothing is
            measured.

    Raises:
        AgreedError: on every rank: a set is damaged or does not fit the model, or the ranks cannot
            share its batches.
    """
    if run.train.micro_batch != "auto":
        return run, ""
    if start.micro_batch is not None:
        return run.with_micro_batch(start.micro_batch), _kept(start, ranks)
    stages = together(ranks, lambda: load_stages(run))
    together(ranks, lambda: check_batches(run, ranks.world_size))
    batch = together(ranks, lambda: first_rows(stages[0]))
    sample = Sample(stages[0], batch, ranks, clock)
    room = Room(stages, ranks, sample)
    sizes = candidates(run.train.global_batch // ranks.world_size)
    with device_metrics.ignored():
        rows, speeds, refused = search(sizes, lambda *pair: _on_all(sample, room, *pair), room.has)
    line = told(rows, speeds, refused, stages, sample.part)
    sample.close()
    return run.with_micro_batch(rows), line


def candidates(rows: int) -> list[int]:
    """Return the sizes of micro-batches that are tried for a rank's rows of a global batch: powers
    of two, or the fewer rows that make as many micro-batches more alike.
    """
    powers = [min(1 << power, rows) for power in range(rows.bit_length() + 1)]
    return sorted({-(-rows // -(-rows // power)) for power in powers})


def search(
    sizes: Sequence[int],
    time_of: Callable[[int, int | None], tuple[float, float] | None],
    has_room: Callable[[int], bool],
) -> tuple[int, dict[int, float], int | None]:
    """Return the rows to take, the rows a second of each size that was timed, and the size that was
    not tried further for want of memory, if one was.

    Args:
        sizes: ascending.
        time_of: returns the seconds of a size, and again those of the size before, for the machine
            may have become slower meanwhile; None where the memory did not suffice.
        has_room: whether the run has the memory for a size. The smallest one is taken whether or
            not.
    """
    seconds: dict[int, float] = {}
    refused = before = None
    misses = 0
    for size in sizes:
        timed = time_of(size, before) if before is None or has_room(size) else None
        if timed is None:
            refused = size
            break
        seconds[size], again = timed
        if before is not None:
            seconds[before] = min(seconds[before], again)
        best = max((each / seconds[each] for each in seconds if each != size), default=0.0)
        misses = 0 if size / seconds[size] > GAIN * best else misses + 1
        if misses == MISSES or seconds[size] > LONG_S:
            break
        before = size
    speeds = {size: size / each for size, each in seconds.items()}
    if not speeds:
        return min(sizes), {}, refused
    good = [size for size, speed in speeds.items() if speed * GAIN >= max(speeds.values())]
    return min(good), speeds, refused


def told(
    rows: int, speeds: dict[int, float], refused: int | None, stages: Stages, part: str
) -> str:
    """Return a line on what was chosen, and how fast a rank was with each size."""
    unit = stages.source.unit
    rates = [f"{size} at {unit.of(1) * speed:,.0f}" for size, speed in speeds.items()]
    memory = "" if refused is None else f"; the memory does not hold {refused}"
    timed = f", of {', '.join(rates)} {unit.name}/s a rank ({part})" if rates else ""
    return f"train.micro_batch: {rows}{timed}{memory}"


def _kept(start: Start, ranks: Ranks) -> str:
    """Say that the number is another machine's, where that is known."""
    if start.state is None or start.state.world_size == ranks.world_size:
        return ""
    return (
        f"train.micro_batch: {start.micro_batch}, as recorded with the checkpoint of "
        f"{start.state.world_size} ranks; on {ranks.world_size} another number may be faster"
    )


class Sample:
    """A run's task, or its first layers, spread over the ranks as the engine is going to do it: to
    be timed, with weights of no meaning and the run's first rows. Made by all ranks together.

    DeepSpeed's engines are timed as the one of ours that sends the like. Compiled blocks are timed
    as they are before: each size would be compiled by itself.
    """

    def __init__(self, stage: Stage, batch: Batch, ranks: Ranks, clock: Clock) -> None:
        run = stage.run
        self.device, self.clock, self.batch = ranks.device, clock, batch
        self.alone = ranks.world_size == 1
        section, layers = run.model, getattr(run.model, "layers", LAYERS)
        self.part = "forward and backward"
        self.scale = 1.0  # the run's layers for each of these
        if layers > LAYERS and memory_plan.parameters_of(section) > SMALL:
            section = section.model_copy(update={"layers": LAYERS})
            self.part += f" of {LAYERS} of {layers} layers"
            self.scale = layers / LAYERS
        with torch.device("meta"):
            task = build_task(section, stage.source.rows)
        blank = blank_buffers(task, section.kind)
        engine = _stand_in(run)
        self.model = LossModule(task)
        parallelize(self.model, run.model_copy(update={"engine": engine}), ranks)
        assert isinstance(self.model, FSDPModule)
        # copies are summed once a step, or with each micro-batch
        self.model.set_requires_all_reduce(not run.optim.gradient_buffer)
        self.model.to_empty(device="cpu" if engine.cpu_offload else self.device)
        for weight in self.model.parameters():
            data = local(weight.detach())
            generator = torch.Generator(data.device).manual_seed(0)
            data.uniform_(-0.05, 0.05, generator=generator)
        fill_buffers(task, blank, self.device)

    def close(self) -> None:
        """Free the memory."""
        del self.model, self.batch
        self.tidy()

    def tidy(self) -> None:
        """Give what is not used back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def time(self, rows: int, before: int | None) -> tuple[float, float] | None:
        """Return the least seconds of several forward and backward passes of so many rows on the
        slowest rank, and of ``before`` rows by turns with them; infinity where there were none.
        None where memory ran out, which one rank of several cannot get over. A collective.
        """
        try:
            first = self._once(rows)  # also makes kernels, and allocates
            if highest(round(1e9 * first))[0] > 1e9 * LONG_S:
                return self._slowest(first, math.inf)
            least = [math.inf, math.inf]
            for _ in range(REPEATS):
                for place, size in enumerate((rows, before)):
                    if size is not None:
                        least[place] = min(least[place], self._once(size))
        except (RuntimeError, MemoryError) as error:
            if not (self.alone and out_of_memory(error)):
                raise
            return None
        return self._slowest(*least)

    def _slowest(self, *seconds: float) -> tuple[float, float]:
        slowest = highest(*(NEVER if each == math.inf else round(1e9 * each) for each in seconds))
        found, again = (math.inf if each == NEVER else each / 1e9 for each in slowest)
        return found, again

    def _once(self, rows: int) -> float:
        batch = moved(repeated(self.batch, rows), self.device)
        self._wait()
        started = self.clock()
        self.model(batch).backward()  # adds to the gradients of the passes before, as training does
        self._wait()
        return max(self.clock() - started, 1e-9)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _stand_in(run: RunConfig) -> TorchEngineConfig:
    """Return the engine that the sample is spread by."""
    if isinstance(run.engine, TorchEngineConfig):
        return run.engine.model_copy(update={"compile": False})
    name: Literal["fsdp", "ddp"] = "fsdp" if run.engine.stage == 3 else "ddp"
    recomputed = run.engine.activation_checkpointing
    return TorchEngineConfig(name=name, activation_checkpointing=recomputed)


def first_rows(stage: Stage) -> Batch:
    """Return the first rows of a stage's data, the same on every rank."""
    stream = stage.source.stream(
        seed=stage.run.run.seed,
        global_batch=min(READ, stage.run.train.global_batch),
        rank=0,
        world_size=1,
    )
    with stream:
        return next(stream)[0]


def repeated(batch: Batch, rows: int) -> Batch:
    """Return a batch of so many rows, which are those of ``batch`` in turn."""
    return each(batch, lambda tensor: tensor[torch.arange(rows) % len(tensor)])


class Room:
    """Whether a GPU has the memory for a micro-batch: by the formulas of a step's peak, of another
    model than a language model by what the sample took. On CPUs always. Made by all ranks together.
    """

    def __init__(self, stages: Stages, ranks: Ranks, sample: Sample) -> None:
        self.run, self.world_size = stages[0].run, ranks.world_size
        # of the stages that take the number, the one with the longest rows
        self.seq_len = max(
            stage.span.a_row for stage in stages if stage.run.train.micro_batch == "auto"
        )
        self.sample = sample
        self.row_bytes = 0  # that the whole model keeps of a row, as far as it was measured
        self.free = math.inf
        self.nodes = 1
        if ranks.device.type == "cuda":
            self.nodes = hosts(ranks.world_size)
            sample.tidy()
            # the sample, which is there already, is to go
            taken = torch.cuda.memory_allocated(ranks.device)
            free = torch.cuda.mem_get_info(ranks.device)[0] + taken
            self.free = SHARE * -highest(-free)[0]

    def has(self, rows: int) -> bool:
        """Return whether so many rows fit."""
        if self.free == math.inf:
            return True
        if isinstance(self.run.model, ModelConfig):
            run = self.run.with_micro_batch(rows)
            return peak(run, self.world_size, self.nodes, self.seq_len).total() <= self.free
        held = memory_plan.memory(self.run, self.world_size, self.nodes).device()
        return held + rows * self.row_bytes <= self.free


def _on_all(
    sample: Sample, room: Room, rows: int, before: int | None
) -> tuple[float, float] | None:
    """Return ``Sample.time``, and tell ``room`` what the memory of a row is. A collective."""
    if sample.device.type != "cuda":
        return sample.time(rows, before)
    torch.cuda.reset_peak_memory_stats(sample.device)
    held = torch.cuda.memory_allocated(sample.device)
    timed = sample.time(rows, before)
    if timed is None:
        sample.tidy()  # now that the error, which holds what was computed, is gone
    most = torch.cuda.max_memory_allocated(sample.device)
    [a_row] = highest(round(sample.scale * max(0, most - held) / rows))
    room.row_bytes = max(room.row_bytes, a_row)
    return timed
