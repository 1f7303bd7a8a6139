"""Look into a window of steps: ``profile.steps=10..12`` leaves in RUN/profile, and in MLflow,

    steps-10-12.summary.txt       one page: where the time went, by operator
    steps-10-12.trace.json.gz     every operator and kernel on a time line,
                                  for https://ui.perfetto.dev
    steps-10-12.memory.pickle     every allocation on a GPU,
                                  for https://pytorch.org/memory_viz

of rank 0. The trace holds all that happens in these steps, validation, saving and the like too.
Recording slows them down, and writing it takes seconds, so the window should be short, and not the
first steps.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dnt_scale.distributed.heartbeat import moving
from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.setup import Step, Training

TOP = 20  # operators and kernels in the summary
NAME_CHARS = 72
ALLOCATIONS = 200_000  # that a memory snapshot holds; each takes some hundred bytes of the host


class ProfilerWindow(Hook):
    """Profiles the steps of ``profile.steps`` that this start of the run does, on rank 0."""

    def __init__(self) -> None:
        self.profiler: profile | None = None  # while the window is open
        self.first = 0  # step that was profiled
        self.last = 0
        self.mark: record_function | None = None  # the current step's name in the trace

    def before_step(self, run: Training) -> None:
        """Open the window where it begins, and name the step in the trace."""
        number = run.state.step + 1
        if self.mark or not run.ranks.first or number not in run.config.profile.window:
            return
        if self.profiler is None:
            self.first = number
            self.profiler = start(run.ranks.device)
        self.mark = record_function(f"step {number}")
        self.mark.__enter__()

    def after_step(self, run: Training, step: Step) -> None:
        """Close the window where it ends, and write what was seen."""
        if self.mark:
            self.mark.__exit__(None, None, None)
            self.mark, self.last = None, step.number
        if self.profiler and step.number == run.config.profile.window[-1]:
            self.write(run)

    def after_training(self, run: Training) -> None:
        """Write what was seen of a window that a signal has cut short."""
        if self.profiler:
            self.write(run)

    def close(self, run: Training) -> None:
        """Stop a window that an error has left open; nothing of it is written."""
        if self.mark:
            self.mark.__exit__(None, None, None)
            self.mark = None
        if self.profiler:
            profiler, self.profiler = self.profiler, None
            with suppress(RuntimeError):
                stop(profiler)
            if run.ranks.device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)

    def write(self, run: Training) -> None:
        """Stop, and write the three files; a full disk is told, and ends no run."""
        assert self.profiler
        profiler, self.profiler = self.profiler, None
        steps = f"steps-{self.first}-{self.last}"
        folder = run.config.run.dir / "profile"
        try:
            stop(profiler)
            folder.mkdir(exist_ok=True)
            if run.ranks.device.type == "cuda":
                put(folder / f"{steps}.memory.pickle", dump_memory)
            trace = folder / f"{steps}.trace.json.gz"
            put(trace, lambda path: profiler.export_chrome_trace(str(path)))
            page = heading(run, self.first, self.last)
            page += summary(profiler, self.last - self.first + 1)
            put(folder / f"{steps}.summary.txt", lambda path: path.write_text(page))
        except (OSError, RuntimeError) as error:
            why = f"could not be written ({error}); training goes on"
            run.progress.say(f"profile.steps: {folder / steps}.* {why}")
        else:
            run.progress.say(f"profile.steps: see {folder / steps}.summary.txt")
        finally:
            if run.ranks.device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)


def start(device: torch.device) -> profile:
    """Begin to record what the host does, and on CUDA the device's kernels and each allocation."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
    profiler = profile(activities=activities)
    profiler.start()
    return profiler


def stop(profiler: profile) -> None:
    """End the recording; the watchdog is told, for a long window takes a while to be sorted."""
    moving()
    profiler.stop()
    moving()


def dump_memory(path: Path) -> None:
    """Write the memory snapshot."""
    torch.cuda.memory._dump_snapshot(str(path))


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file, and put it in place whole: MLflow's sender reads along."""
    beside = path.with_name(f".{path.name}")  # by its ending torch knows to compress
    write(beside)
    beside.replace(path)
    moving()


def heading(run: Training, first: int, last: int) -> str:
    """Say what was profiled, in two lines."""
    config, ranks = run.stages.at(first - 1).run, run.ranks
    batch = f"{config.train.global_batch} rows a step, {config.train.rows_a_forward} a micro-batch"
    where = f"{config.engine.name} on {ranks.world_size} x {ranks.device.type}"
    return (
        f"{config.run.name}, {config.model.name}, steps {first} to {last}: {batch}\n{where} "
        f"in {config.train.dtype}, torch {torch.__version__}; rank 0, slowed down by the profiler\n"
    )


def summary(profiler: profile, steps: int) -> str:
    """Return the page's tables: what took most time on the host, and of a GPU's kernels."""
    events = [event for event in profiler.key_averages() if not event.is_user_annotation]
    on_host = [event for event in events if event.device_type.name == "CPU"]
    kernels = [event for event in events if event.device_type.name == "CUDA"]
    what = "operator on the host, without those that it calls"
    text = "\n" + table(what, on_host, "self_cpu_time_total", steps)
    if kernels:
        text += "\n" + table("kernel on the GPU", kernels, "self_device_time_total", steps)
    return text


def table(what: str, events: Sequence[Any], time: str, steps: int) -> str:
    """Return the first ``TOP`` of torch's averages by their field ``time``, in microseconds."""
    whole = sum(getattr(event, time) for event in events) or 1.0
    ordered = sorted(events, key=lambda event: getattr(event, time), reverse=True)
    lines = [f"{'share':>7}{'ms a step':>12}{'calls a step':>14}  {what}\n"]
    for event in ordered[:TOP]:
        spent = getattr(event, time)
        name = event.key if len(event.key) <= NAME_CHARS else event.key[: NAME_CHARS - 3] + "..."
        numbers = f"{spent / whole:7.1%}{spent / 1e3 / steps:12.3f}{event.count / steps:14.1f}"
        lines.append(f"{numbers}  {name}\n")
    lines.append(f"{'100.0%':>7}{whole / 1e3 / steps:12.3f}{'':14}  all {len(events)}\n")
    return "".join(lines)
