"""Measure tails of gradients and sizes of updates, tensor by tensor, into RUN/diagnostics.jsonl."""

import math
import statistics
import time
from collections import defaultdict, deque
from typing import Any

import orjson
import torch

from dnt_scale.distributed.agree import on_first
from dnt_scale.model.task import build_task
from dnt_scale.optim.groups import group_labels
from dnt_scale.record.metrics_file import DIAGNOSTICS, drop_after, whole_lines
from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.setup import Step, Training
from dnt_scale.train.tensor_statistics import (
    Changes,
    TensorStatistics,
    gradient_statistics,
    rms_of,
)

SPIKE = 5.0  # times the median of a group's last updates: told as a spike
USUAL = 20  # measured updates behind the median
LEAST_USUAL = 5  # and so many at least

Line = dict[str, Any]


class Diagnose(Hook):
    """Writes a line every ``diagnose.every`` steps, and a handful of it into metrics.jsonl.

    Gradients are those between backward and update: summed over micro-batches and ranks, not yet
    clipped, which changes none of the measures but their RMS. Nothing of the run is changed.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.matrices: set[str] = set()  # of two dimensions or more, inside of blocks
        self.blocks: list[list[str]] = []  # names in each
        self.group: dict[str, str] = {}  # of each tensor, by its label in optim.groups
        self.before: Changes | None = None
        self.gradients: list[TensorStatistics] = []
        # of each group, the RMS of the last updates that were measured
        self.usual: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=USUAL))

    def before_training(self, run: Training) -> None:
        """Note what tensors there are, and cut the lines that will be written again."""
        on_first(run.ranks, lambda: self.read_back(run))
        if not run.config.diagnose.every:
            return
        with torch.device("meta"):
            task = build_task(run.config.model, run.source.rows)
        name_of = {id(parameter): name for name, parameter in task.named_parameters()}
        self.names = list(name_of.values())
        self.group = group_labels(self.names, run.config.optim)
        for block in task.blocks:
            own = list(block.parameters())
            self.blocks.append([name_of[id(parameter)] for parameter in own])
            self.matrices |= {name_of[id(each)] for each in own if each.ndim >= 2}
        if not run.config.optim.gradient_buffer:
            run.progress.say(
                "diagnose.every: optim.gradient_buffer is false, so that there is no gradient to "
                "look at; its statistics are left out, those of updates are measured"
            )

    def read_back(self, run: Training) -> None:
        """Cut the file, and take from it what updates were usual before. Raises OSError."""
        file = run.config.run.dir / DIAGNOSTICS
        drop_after(file, run.state.step)
        for line in whole_lines(file):
            self.remember(line)

    def due(self, run: Training) -> bool:
        """Say whether the step to come, ``run.state.step + 1``, is measured."""
        every = run.config.diagnose.every
        return bool(every) and (run.state.step + 1) % every == 0

    def waits_after(self, run: Training, number: int) -> bool:
        """Say so of a step that is measured."""
        return self.before is not None

    def before_step(self, run: Training) -> None:
        """Keep the weights of a step that is measured."""
        self.before = None  # what was kept where a rollback has the step begin anew
        if self.due(run):
            self.before = Changes(run.engine.shards())

    def before_update(self, run: Training) -> None:
        """Look at the gradient."""
        if self.due(run) and run.config.optim.gradient_buffer:
            device = run.ranks.device
            self.gradients = gradient_statistics(run.engine.gradient_shards(), self.names, device)

    def after_step(self, run: Training, step: Step) -> None:
        """Compare the weights with those before, and write it down."""
        if self.before is None:
            return
        line: Line = {"step": step.number, "time": time.time()}
        tensors: dict[str, Line] = {name: {} for name in self.names}
        if self.gradients:
            gradients = dict(zip(self.names, self.gradients, strict=True))
            for name, gradient in gradients.items():
                tensors[name] |= of_gradient(gradient)
            parts = [[gradients[name] for name in names] for names in self.blocks]
            line["block_grad_rms"] = [rms_of([(g.elements, g.rms) for g in part]) for part in parts]
        if not step.stats.skipped:
            changes = self.before.since(run.engine.shards(), self.names, run.ranks.device)
            moved: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for name, change in zip(self.names, changes, strict=True):
                tensors[name] |= change._asdict()
                moved[self.group[name]].append((change.elements, change.update_rms))
            line["update_rms"] = {label: rms_of(parts) for label, parts in moved.items()}
        self.before, self.gradients = None, []
        step.metrics |= self.summary(line, tensors)
        if run.ranks.first:
            self.tell_of_spikes(run, line)
            write(run, {**line, "tensors": tensors})

    def summary(self, line: Line, tensors: dict[str, Line]) -> Line:
        """Return what goes into metrics.jsonl: the worst or the middle of the blocks' matrices."""
        values: dict[str, list[float]] = defaultdict(list)
        for name in self.matrices:
            for key, value in tensors[name].items():
                if math.isfinite(value):
                    values[key].append(value)
        found: Line = {}
        for metric, key, choose in (
            ("kurtosis_max", "grad_kurtosis", max),
            ("hill_min", "grad_hill", min),
            ("update_ratio_median", "update_ratio", statistics.median),
            ("angle_median", "angle", statistics.median),
        ):
            if values[key]:
                found[f"diagnose/{metric}"] = choose(values[key])
        if (rms := line.get("block_grad_rms")) and min(rms) > 0:
            found["diagnose/grad_rms_spread"] = max(rms) / min(rms)
        for label, value in line.get("update_rms", {}).items():
            found[f"diagnose/update_rms/{label}"] = value
        return found

    def tell_of_spikes(self, run: Training, line: Line) -> None:
        """Warn where a group's update is far above its last ones; rank 0 knows those."""
        for label, value in line.get("update_rms", {}).items():
            usual = self.usual[label]
            if len(usual) >= LEAST_USUAL and value > SPIKE * (middle := statistics.median(usual)):
                run.progress.say(
                    f"step {line['step']}: the update of group {label} has RMS {value:.3g}, "
                    f"{value / middle:.1f} times the median of the last {len(usual)} measured "
                    f"({middle:.3g}); see {DIAGNOSTICS}"
                )
        self.remember(line)

    def remember(self, line: Line) -> None:
        """Take the updates of a line into what is usual."""
        for label, value in line.get("update_rms", {}).items():
            if value is not None:
                self.usual[label].append(value)


def of_gradient(found: TensorStatistics) -> Line:
    """Return the statistics of a gradient by their names in a line."""
    values = found._asdict()
    return {"elements": values.pop("elements")} | {f"grad_{key}": values[key] for key in values}


def write(run: Training, line: Line) -> None:
    """Append a line; numbers have 6 digits. An error waits for ``hooks.agreement``."""
    file = run.config.run.dir / DIAGNOSTICS
    data = orjson.dumps(rounded(line), option=orjson.OPT_APPEND_NEWLINE)
    try:
        with file.open("ab") as opened:
            opened.write(data)
    except OSError as error:
        run.unwritten = run.unwritten or error


def rounded(value: Any) -> Any:
    """Return what JSON is made of, with numbers of 6 digits; ``time`` is kept as it is."""
    if isinstance(value, dict):
        return {key: own if key == "time" else rounded(own) for key, own in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
