"""The judge of every step: clips its gradient, and skips, clips or undoes a step that is not as the
last ones were.

1. ``Guard.judge`` (engine.base.Judge) is called between backward and update. What it decides
   depends on nothing but the loss, the gradient norm and those of earlier steps, which are equal on
   all ranks: they decide alike, unasked. On a device that the host is ahead of, ``Guard.limits``
   are asked for in its place; the same verdict is found there, and here by ``judge`` once loss and
   norm have come, before the next step's limits are asked for. A rollback is done then too, and
   that next step's gradient, which is of the weights before it, made anew.
2. A loss or norm that is not finite is bad. So is a spike (``health.spike``): more than
   ``spike_sigmas`` standard deviations above the mean of the last ``spike_window`` good steps, once
   there are half as many; OLMo-core's SkipStepOptimizer reads the same two values. Bad steps do not
   enter the window.
3. ``Guard.undo`` rolls back where that is asked for, and ``Guard.after`` writes what was bad to
   ``logs/bad_steps.jsonl`` and ends a run in which too many steps in a row were lost.
4. A rollback restores weights and optimizer state from a ``Snapshot``. The step and the place in
   the data go on: the rows since the snapshot are not seen again, those of the bad stretch least of
   all.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import orjson
import torch
from torch import Tensor

from dnt_scale.config import HealthSection
from dnt_scale.distributed.errors import AgreedError
from dnt_scale.engine.base import Engine
from dnt_scale.engine.late import Limits

Action = Literal["skip", "clip", "rollback"]

# below this part of the mean a spread is rounding: a stream that does not vary has no spikes
LEAST_SPREAD = 1e-6


class HopelessRun(AgreedError):
    """Too many steps in a row were lost, which every rank finds at once; the message says why
    and what to do.
    """


@dataclass(frozen=True)
class BadStep:
    """What was wrong with a step, and what was done about it."""

    loss: float
    grad_norm: float
    why: str  # not finite, loss spike, gradient spike, or both spikes
    action: Action
    factor: float  # that the gradient was multiplied by
    # loss and grad_norm above which a step is a spike; empty: the window is not half full
    limits: dict[str, float]
    window: int  # good steps behind the limits


class Guard:
    """Judges the steps of one run.

    Args:
        clip_norm: bound of the gradient norm of every step; None: none, or the engine clips by
            group. One that clips by itself (``optim.clip``) minds a factor of 0 only.
        max_skipped: lost steps in a row that end the run.
    """

    def __init__(self, health: HealthSection, clip_norm: float | None, max_skipped: int) -> None:
        self.health = health
        self.clip_norm = clip_norm
        self.max_skipped = max_skipped
        self.losses: deque[float] = deque(maxlen=health.spike_window)
        self.norms: deque[float] = deque(maxlen=health.spike_window)
        self.lost_in_a_row = 0
        self.bad: BadStep | None = None  # the step that was judged last, if it was bad
        self.snapshot = Snapshot()

    def judge(self, loss: float, grad_norm: float) -> float:
        """What the gradient is multiplied by: 1.0, less to clip it, 0.0 to skip the step.

        Args:
            loss: mean of the global batch, nats a token.
            grad_norm: of the whole gradient, before clipping.
        """
        factor = 1.0
        if self.clip_norm is not None and grad_norm > self.clip_norm:
            factor = self.clip_norm / grad_norm
        self.bad = self._judge(loss, grad_norm, factor)
        self.lost_in_a_row = self.lost_in_a_row + 1 if self.bad and self.bad.action != "clip" else 0
        if self.bad is None:
            self.losses.append(loss)
            self.norms.append(grad_norm)
            return factor
        return self.bad.factor

    @property
    def rolls_back(self) -> bool:
        """Whether the step that was judged last is undone, or has been."""
        return self.bad is not None and self.bad.action == "rollback"

    def limits(self) -> Limits:
        """Return what ``judge`` goes by now."""
        clip_norm = math.inf if self.clip_norm is None else self.clip_norm
        above = self._limits() if self.health.spike != "off" else {}
        usual = self._usual() if above and self.health.spike == "clip" else None
        return Limits(clip_norm, usual=usual, **above)

    def _usual(self) -> float:
        """Return the mean of the window's norms."""
        return math.fsum(self.norms) / len(self.norms)

    def _judge(self, loss: float, grad_norm: float, clipped: float) -> BadStep | None:
        spike = self.health.spike
        limits = {} if spike == "off" else self._limits()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            # after a rollback the weights that made it are gone; whatever else was asked for,
            # clipping mends nothing
            action: Action = "rollback" if spike == "rollback" else "skip"
            return BadStep(loss, grad_norm, "not finite", action, 0.0, limits, len(self.losses))
        if spike == "off":
            return None
        above = [
            name
            for name, value in (("loss", loss), ("grad_norm", grad_norm))
            if value > limits.get(name, value)
        ]
        if not above:
            return None
        why = (
            " and ".join({"loss": "loss", "grad_norm": "gradient"}[name] for name in above)
            + " spike"
        )
        usual = self._usual()
        factor = 0.0
        if spike == "clip":
            factor = min(clipped, usual / grad_norm) if grad_norm > usual else clipped
        return BadStep(loss, grad_norm, why, spike, factor, limits, len(self.losses))

    def _limits(self) -> dict[str, float]:
        if 2 * len(self.losses) < self.health.spike_window:
            return {}
        return {
            "loss": limit(self.losses, self.health.spike_sigmas),
            "grad_norm": limit(self.norms, self.health.spike_sigmas),
        }

    def undo(self, engine: Engine) -> None:
        """Go back to the snapshot where the step that was judged last asks for it. Every rank calls
        it, before anybody looks at the weights.
        """
        if self.rolls_back:
            self.snapshot.restore(engine)

    def after(self, step: int, rows: Callable[[], Mapping[str, object]], log: Path | None) -> None:
        """To be called once a step is on record: writes down a bad one. Every rank calls it.

        Args:
            step: the step's number, from 1.
            rows: where the global batch's rows lie, as ``rows_behind`` gives them; called for a bad
                step only.
            log: ``bad_steps.jsonl``, on rank 0 only.

        Raises:
            HopelessRun: ``max_skipped`` steps in a row were lost.
            OSError: the log cannot be written.
        """
        bad = self.bad
        if bad is None:
            return
        if log:
            record(log, step, bad, rows())
        if self.lost_in_a_row >= self.max_skipped:
            what = "had a non-finite loss or gradient"
            if bad.why != "not finite":
                what = f"were lost, this one to a {bad.why}"
            raise HopelessRun(
                f"step {step}: {self.lost_in_a_row} steps in a row {what} (loss {bad.loss}, "
                f"gradient norm {bad.grad_norm}); {self._left(bad)}: lower optim.lr or set "
                "optim.clip_norm, and run again to go on from the newest checkpoint"
            )

    def told(self) -> str | None:
        """Of the step that was judged last, if it was bad: why, and what is done about it, in a
        sentence.
        """
        bad = self.bad
        if bad is None:
            return None
        what = (
            "a loss or gradient that is not finite" if bad.why == "not finite" else f"a {bad.why}"
        )
        done = (
            f"gradient multiplied by {bad.factor:.3g}"
            if bad.action == "clip"
            else f"left out, {self._left(bad)}"
        )
        return f"{what} (loss {bad.loss:.4g}, gradient norm {bad.grad_norm:.4g}): {done}"

    def _left(self, lost: BadStep) -> str:
        """What a lost step leaves behind."""
        if lost.action == "rollback":
            return f"back to the weights of step {self.snapshot.scalars['step']:.0f}"
        return "the weights are unchanged"

    def keep(self, step: int, engine: Engine, *, at_checkpoint: bool = False) -> None:
        """Take a snapshot where one is due: at the start, every ``snapshot_every`` steps, and at
        every checkpoint.

        A run that resumes takes its first at the checkpoint's step, so the run that wrote it does
        so too: both then roll back to the same weights. Not so the checkpoint of a run that is
        stopped (Ctrl-C, SIGTERM): left alone it would have had no snapshot there. A rollback before
        the next one then goes back less far than it would have.
        """
        if self.snapshot_due(step, at_checkpoint=at_checkpoint):
            self.snapshot.take(engine)

    def snapshot_due(self, step: int, *, at_checkpoint: bool = False) -> bool:
        """Return whether ``keep`` takes one."""
        due = (
            at_checkpoint or step % self.health.snapshot_every == 0 or self.snapshot.copies is None
        )
        return self.health.spike == "rollback" and due

    def metrics(self) -> dict[str, int]:
        """For metrics.jsonl, of the last step: 1 where it was bad and this was done about it. A
        skip is told anyway.
        """
        actions: tuple[Action, ...] = ("clip", "rollback") if self.health.spike != "off" else ()
        return {
            f"health/{action}": int(self.bad is not None and self.bad.action == action)
            for action in actions
        }

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint holds, so that a resumed run judges alike; equal on all ranks."""
        return {
            "losses": list(self.losses),
            "grad_norms": list(self.norms),
            "lost_in_a_row": [float(self.lost_in_a_row)],
        }

    def forget(self) -> None:
        """Empty the window: what comes is not to be judged by what was."""
        self.losses.clear()
        self.norms.clear()

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take over ``state()``; an empty one, as checkpoints of old have, is a window with
        nothing in it.
        """
        self.losses = deque(state.get("losses", ()), maxlen=self.health.spike_window)
        self.norms = deque(state.get("grad_norms", ()), maxlen=self.health.spike_window)
        self.lost_in_a_row = int(sum(state.get("lost_in_a_row", ())))


def limit(values: Sequence[float], sigmas: float) -> float:
    """The mean plus ``sigmas`` standard deviations. Sums are exact (fsum): the same on every
    kind of machine.
    """
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean + sigmas * max(deviation, LEAST_SPREAD * abs(mean))


class Snapshot:
    """A copy of what this rank holds of weights and optimizer state, to go back to.

    It lives in the host's memory, of which there is several times the GPU's: there it would cost 8
    bytes a parameter of a rank's share (12 with two buffers), most of what sharding has won.
    Copying it takes a moment every ``snapshot_every`` steps, and a rollback reads no disk.
    """

    def __init__(self) -> None:
        self.copies: list[Tensor] | None = None  # None: not taken yet
        self.scalars: dict[str, float] = {}

    @torch.no_grad()
    def take(self, engine: Engine) -> None:
        """Copy the engine's shards, over the snapshot before."""
        data = [shard.data for shard in engine.shards()]
        if self.copies is None:
            # page-locked where there is a GPU: several times as fast to copy
            self.copies = [
                torch.empty_like(part, device="cpu", pin_memory=part.is_cuda) for part in data
            ]
        for copy, part in zip(self.copies, data, strict=True):
            copy.copy_(part)
        self.scalars = engine.scalars()

    @torch.no_grad()
    def restore(self, engine: Engine) -> None:
        """Write the copies back; ``step`` stays as it is, ``updates`` is the snapshot's."""
        assert self.copies is not None, "a rollback before the first snapshot"
        for copy, shard in zip(self.copies, engine.shards(), strict=True):
            shard.data.copy_(copy)
        engine.refresh({**self.scalars, "step": engine.scalars()["step"]})


def record(log: Path, step: int, bad: BadStep, rows: Mapping[str, object]) -> None:
    """Append a line to ``bad_steps.jsonl``; a value that is not finite is null, and told in
    ``why``.

    A run that is stopped and goes on from before a bad step meets it again, and has it twice, at
    two times.
    """
    entry = {"step": step, "time": time.time(), **asdict(bad), **rows}
    if bad.why == "not finite":
        entry["why"] = f"not finite: loss {bad.loss}, gradient norm {bad.grad_norm}"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
