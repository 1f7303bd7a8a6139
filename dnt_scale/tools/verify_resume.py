"""``dnt verify-resume``: whether a run that is killed and resumed ends as one that is left alone.

1. The configuration is trained for a few steps with real processes, straight through.
2. It is trained again; every rank is killed (SIGKILL) once the checkpoint of the middle is in
   place, and the same command goes on from there, if asked with another engine or number of ranks.
3. Every record of metrics.jsonl and every tensor of the last checkpoints is compared: to the bit if
   nothing but the kill differs, else within ``TOLERANCE``.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dnt_scale.checkpoint.inspection import differences, state_differences
from dnt_scale.checkpoint.read import read_parts
from dnt_scale.checkpoint.state import read_state
from dnt_scale.checkpoint.storage import Storage
from dnt_scale.config import ConfigError, TrainSection, from_yaml, load
from dnt_scale.train import launch

# of each step's loss in nats and of each weight, where engines or ranks differ: rounding, over some
# tens of steps
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp8": 1e-1}
# Time or the machine decides these metrics, and NAME_per_s.
NOT_COMPARED = {"time", "mfu", "memory_gb"}
TRIES = 5  # to kill a run before it is done

Record = Mapping[str, Any]


class Failed(ValueError):
    """A training process did not do what it should; the message holds what it said."""


def verify_resume(
    overrides: Sequence[str],
    *,
    steps: int = 20,
    ranks: int = 1,
    then: Sequence[str] = (),
    then_ranks: int | None = None,
    keep: bool = False,
) -> bool:
    """Print how a killed and resumed run differs from one that was not; whether that is as it
    should be.

    Args:
        overrides: as of ``dnt train``.
        steps: of both runs; the checkpoint and the kill are half-way.
        then: more overrides of the resumed part, for example engine=zero1.
        then_ranks: of the resumed part; None: the same.
        keep: leave the run folders, and say where they are.

    Raises:
        ValueError: the configuration is wrong, or a run failed by itself.
    """
    if steps < 2 or ranks < 1 or (then_ranks is not None and then_ranks < 1):
        raise ConfigError(
            f"--steps is {steps}, --ranks {ranks}; a kill half-way takes 2 steps and 1 rank at "
            "least"
        )
    folder = Path(tempfile.mkdtemp(prefix="dnt-verify-resume-"))
    straight, resumed = folder / "straight", folder / "resumed"
    middle = steps // 2
    try:
        once, first = (complete(overrides, place, steps) for place in (straight, resumed))
        second = complete([*overrides, *then], resumed, steps)
        with Show(steps) as show:
            run(show, "straight", once, ranks, straight)
            # for auto; so the others do not choose again
            taken = from_yaml(straight / "config.yaml").train
            first, second = (as_taken(lines, taken) for lines in (first, second))
            dtype = max((taken.dtype, load(second).train.dtype), key=TOLERANCE.__getitem__)
            kill_at(show, first, ranks, resumed, middle, steps)
            run(show, "resumed", second, then_ranks or ranks, resumed)
        if not then and then_ranks in (None, ranks):
            return equal(straight, resumed)
        return near(straight, resumed, middle, TOLERANCE[dtype], dtype)
    finally:
        if keep:
            print(f"kept: {straight} and {resumed}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def as_taken(overrides: list[str], taken: TrainSection) -> list[str]:
    """Return the overrides with the dtype and the micro-batch that another run took where they say
    auto.
    """
    asked = load(overrides).train
    return [
        *overrides,
        *(
            f"train.{key}={getattr(taken, key)}"
            for key in ("dtype", "micro_batch")
            if getattr(asked, key) == "auto"
        ),
    ]


def complete(overrides: Sequence[str], folder: Path, steps: int) -> list[str]:
    """The overrides of a run of ``steps`` steps in ``folder``, with all that would keep it from
    being one.

    Raises:
        ConfigError: they make no run.
    """
    whole = [
        "run.name=verify-resume",
        *overrides,
        f"run.dir={folder}",
        f"train.steps={steps}",
        "train.tokens=null",
        "eval.every=0",
        "tracking.enabled=false",
        "checkpoint.dir=null",
        f"checkpoint.every={steps // 2}",
        "checkpoint.keep=1",
        "checkpoint.keep_every=null",
    ]
    warmup = load(whole).optim.schedule.steps_of_warmup(steps)
    return [*whole, f"optim.schedule.warmup_steps={min(warmup, steps // 4)}"]


# --- running


class Show:
    """How far the runs are: a bar on a terminal, else a line a run."""

    def __init__(self, steps: int) -> None:
        console = Console(stderr=True, highlight=False)
        columns = (
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(24),
            TimeElapsedColumn(),
        )
        self.bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self.steps = steps
        self.task = self.bar.add_task("", total=steps)

    def __enter__(self) -> "Show":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        self.bar.console.print(line, soft_wrap=True, markup=False)
        self.bar.reset(self.task)

    def look(self, folder: Path) -> None:
        """Show how far the run in ``folder`` is."""
        found = records(folder)
        self.bar.update(self.task, completed=found[-1]["step"] if found else 0)


def run(show: Show, name: str, overrides: Sequence[str], ranks: int, folder: Path) -> None:
    """Train to the end."""
    show.say(f"{name}: to step {show.steps} on {in_words(ranks)}")
    with started(overrides, ranks, folder.parent / f"{name}.log") as process:
        wait_for(show, folder, lambda: process.poll() is not None)
    if process.returncode:
        raise Failed(f"the {name} run failed: {launch.complaint(folder.parent / f'{name}.log')}")


def kill_at(
    show: Show, overrides: Sequence[str], ranks: int, folder: Path, middle: int, steps: int
) -> None:
    """Train, and kill every rank after the checkpoint of step ``middle``, before the last one."""
    show.say(f"to be killed: past the checkpoint of step {middle} on {in_words(ranks)}")
    log = folder.parent / "killed.log"
    for _ in range(TRIES):
        with started(overrides, ranks, log) as process:
            wait_for(
                show,
                folder,
                lambda: process.poll() is not None or checkpoint(folder, middle).is_file(),
            )
            if process.poll():
                raise Failed(f"the run to be killed failed by itself: {launch.complaint(log)}")
            kill_ranks(process, ranks)
        last = records(folder)[-1]["step"]
        if checkpoint(folder, middle).is_file() and not checkpoint(folder, steps).is_file():
            show.say(f"killed at step {last}; goes on from the checkpoint of step {middle}")
            return
        shutil.rmtree(folder)
    raise Failed(f"the run was done {TRIES} times before it could be killed; give more --steps")


@contextmanager
def started(overrides: Sequence[str], ranks: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``dnt_scale.train`` in one process, or under torchrun; nothing of it is left after the
    block.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            launch.command(overrides, ranks),
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            env=launch.environment(),
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_ranks(process, ranks)
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def kill_ranks(process: subprocess.Popen[bytes], ranks: int) -> None:
    """SIGKILL to all ranks at once, as when the power fails."""
    for pid in children(process.pid) if ranks > 1 else [process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """The processes that ``pid`` has started."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == pid:
            found.append(int(file.parent.name))
    return found


def wait_for(show: Show, folder: Path, condition: Callable[[], bool]) -> None:
    looked = 0.0
    while not condition():
        time.sleep(0.002)
        if time.monotonic() - looked > 0.2:
            looked = time.monotonic()
            show.look(folder)


def checkpoint(folder: Path, step: int) -> Path:
    """The file that makes a checkpoint complete."""
    return folder / "checkpoints" / f"step-{step:08d}" / "state.json"


def in_words(ranks: int) -> str:
    return f"{ranks} ranks" if ranks > 1 else "1 rank"


# --- comparing


def records(folder: Path) -> list[Record]:
    """The whole lines of metrics.jsonl. JSON keeps every bit of a float."""
    path = folder / "metrics.jsonl"
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [
        {
            k: v
            for k, v in json.loads(line).items()
            if k not in NOT_COMPARED and not k.endswith("_per_s")
        }
        for line in whole
    ]


def last_checkpoint(folder: Path) -> Storage:
    return Storage(str((folder / "checkpoints" / "latest").resolve()))


def equal(straight: Path, resumed: Path) -> bool:
    """Whether two runs are equal to the bit; prints that, or the first divergence."""
    a, b = records(straight), records(resumed)
    divergence = first_divergence(a, b)
    if divergence is None:
        one, other = last_checkpoint(straight), last_checkpoint(resumed)
        tensor = next(differences(one, other), None)
        numbers = state_differences(read_state(one.path), read_state(other.path))
        divergence = f"the last checkpoint: {tensor or numbers[0]}" if tensor or numbers else None
    if divergence:
        print(f"first divergence (straight, then resumed): {divergence}")
        return False
    print(f"bitwise equal: {len(a)} steps, and every tensor of the last checkpoint")
    return True


def first_divergence(straight: Sequence[Record], resumed: Sequence[Record]) -> str | None:
    """Where the records of two runs part, in words: step, value, both, and by how much."""
    for a, b in zip(straight, resumed, strict=False):
        for name in sorted(a.keys() | b.keys(), key=lambda name: (name != "step", name)):
            one, other = a.get(name), b.get(name)
            if one != other:
                return (
                    f"step {a['step']}: {name} is {one!r} and {other!r}, "
                    f"{distance(one, other):.3g} apart"
                )
    if len(straight) != len(resumed):
        return f"metrics.jsonl has {len(straight)} and {len(resumed)} steps"
    return None


def near(straight: Path, resumed: Path, middle: int, tolerance: float, dtype: str) -> bool:
    """Whether two runs are equal to the bit up to step ``middle`` and near each other after;
    prints how near.
    """
    a, b = records(straight), records(resumed)
    divergence = first_divergence(a[:middle], b[:middle])
    if divergence or len(a) != len(b):
        print(f"first divergence (straight, then resumed): {divergence or first_divergence(a, b)}")
        return False
    loss, at_loss = furthest(a, b, "train/loss")
    norm, at_norm = furthest(a, b, "grad_norm")
    print(f"largest difference of the loss: {loss:.3g} (step {at_loss})")
    print(f"largest difference of the gradient norm: {norm:.3g} (step {at_norm})")
    one, other = last_checkpoint(straight), last_checkpoint(resumed)
    worst = {name.partition(".")[0]: (0.0, "bitwise equal") for name in read_parts(one)}
    for found in differences(one, other):
        kind = found.name.partition(".")[0]
        apart = (math.inf, str(found)) if found.what else (found.largest, found.name)
        if apart[0] >= worst.get(kind, apart)[0]:
            worst[kind] = apart
    for kind, (largest, name) in worst.items():
        what = "the weights" if kind == "model" else kind
        print(f"largest difference of {what} in the last checkpoint: {largest:.3g} ({name})")
    good = loss <= tolerance and worst["model"][0] <= tolerance
    print(
        f"{'within' if good else 'not within'} {tolerance:g} of loss and weights, the tolerance of "
        f"{dtype}"
    )
    return good


def furthest(straight: Sequence[Record], resumed: Sequence[Record], name: str) -> tuple[float, int]:
    """The largest difference of a value, and the first step with it."""
    apart = [distance(a.get(name), b.get(name)) for a, b in zip(straight, resumed, strict=True)]
    return max(apart), straight[apart.index(max(apart))]["step"]


def distance(one: float | None, other: float | None) -> float:
    """Of two values of metrics.jsonl, where what is not a finite number is null; infinite where
    only one is.
    """
    if one is None or other is None:
        return 0.0 if one is other else math.inf
    return abs(one - other)
