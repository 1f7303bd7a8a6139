"""The training loop, as each rank runs it (rank.py): a step, then the hooks in their order.

On CUDA the host hands out the next step before it has the numbers of this one (engine/late.py).
What goes by them, ``StepJudge`` does in the middle of the next step: so nothing is judged without
them, and only they come late.

Rerunning the same command resumes from the newest checkpoint. Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and
SIGUSR2 finish the step, write a checkpoint and stop, on all ranks together
(dnt_scale/train/signals.py).
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing

from dnt_scale.distributed.heartbeat import beat
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.engine.late import Limits
from dnt_scale.record.speed import speed
from dnt_scale.record.system_metrics import sampling
from dnt_scale.train.hooks import HOOKS, Hook
from dnt_scale.train.hooks.records import Records
from dnt_scale.train.run_start import Begun
from dnt_scale.train.setup import Step, Training, set_up
from dnt_scale.train.signals import stop_signals


def train(begun: Begun, ranks: Ranks) -> int:
    """Train a run to its last step or to a signal, and return the exit status.

    Raises:
        ValueError: the configuration, the data and the checkpoint do not fit together, a file is
            damaged, or too many steps in a row were lost.
        OSError: the run folder cannot be written.
    """
    beat("start")
    run = set_up(begun, ranks)
    hooks = [hook() for hook in HOOKS]
    with ExitStack() as ending:
        for hook in hooks:
            ending.callback(hook.close, run)
        ending.callback(write_last, run, hooks)
        with (
            stop_signals() as run.signals,
            run.progress,
            run.batches,
            closing(run.saver),
            sampling(run.config, ranks, lambda: run.state.step),
        ):
            for hook in hooks:
                hook.before_training(run)
            while not (run.complete or run.halted or run.stopped_by):
                for hook in hooks:
                    hook.before_step(run)
                act(run, take_step(run, hooks), hooks)
            for hook in hooks:
                hook.after_training(run)
            run.outcome = "FINISHED" if run.complete or run.halted else "KILLED"
    run.engine.close()
    return farewell(run)


def take_step(run: Training, hooks: Sequence[Hook]) -> Step:
    """Do one optimizer step on the next global batch; hooks see its gradient. A collective."""
    beat(f"step {run.state.step + 1}")
    stage = run.stage
    started = time.perf_counter()
    with run.clock.spending("step"):
        batch, consumed_rows = next(run.batches)
        stats = run.engine.train_step(batch, StepJudge(run, hooks))
    before = run.state
    run.state = before.model_copy(
        update={
            "step": before.step + 1,
            "consumed_rows": consumed_rows,
            run.unit.name: run.stages.units_at(before.step + 1),
        }
    )
    step = Step(run.state.step, stage, before.consumed_rows, run.complete, stats, started, {})
    if stats.go is None:
        take_numbers(run, step)
    else:
        run.unread = step
    return step


class StepJudge:
    """Judges a step (engine.base.LateJudge), once hooks have looked at the gradient."""

    def __init__(self, run: Training, hooks: Sequence[Hook]) -> None:
        self.run = run
        self.hooks = hooks

    def __call__(self, loss: float, grad_norm: float) -> float:
        self._before_update()
        return self.run.guard.judge(loss, grad_norm)

    def catch_up(self) -> bool:
        rolled_back = catch_up(self.run, self.hooks)
        if rolled_back:
            for hook in self.hooks:
                hook.before_step(self.run)
        return rolled_back

    def limits(self) -> Limits:
        self._before_update()
        return self.run.guard.limits()

    def _before_update(self) -> None:
        for hook in self.hooks:
            hook.before_update(self.run)


def act(run: Training, step: Step, hooks: Sequence[Hook]) -> None:
    """Let the hooks act after a step; those that go by its numbers later where these are late, and
    nobody waits for the device anyway.
    """
    ends = run.complete or run.halted
    if run.unread and (ends or any(hook.waits_after(run, step.number) for hook in hooks)):
        take_numbers(run, step)
    late = run.unread is not None
    for hook in hooks:
        if run.stopped_by:  # A checkpoint follows, of a step that is on record.
            catch_up(run, hooks)
        if not (late and hook.reads_numbers):
            hook.after_step(run, step)


def catch_up(run: Training, hooks: Sequence[Hook]) -> bool:
    """Wait for the last step's numbers where they are late, let hooks act that go by them, and
    return whether the step was undone.
    """
    step = run.unread
    if step is None:
        return False
    take_numbers(run, step)
    for hook in hooks:
        if hook.reads_numbers:
            hook.after_step(run, step)
    return run.guard.rolls_back


def write_last(run: Training, hooks: Sequence[Hook]) -> None:
    """Write the line of the last step that was done, where an error has ended the run before. No
    collective, and no wait: other ranks, or the device, may be gone.
    """
    if run.unread and run.unread.stats.arrived():
        step = run.unread
        take_numbers(run, step)
        for hook in hooks:
            if isinstance(hook, Records):
                hook.after_step(run, step)


def take_numbers(run: Training, step: Step) -> None:
    """Take the numbers of a step into its line, the guard and the state; waits for them."""
    stats = step.stats
    loss, grad_norm = stats.loss, stats.grad_norm
    # Since the step began, or since the device was done with the one before.
    seconds = (now := time.perf_counter()) - max(step.started, run.read_at)
    run.read_at = now
    if run.unread:
        run.unread = None
        factor = run.guard.judge(loss, grad_norm)
        assert (factor == 0) == stats.skipped, "the device judged otherwise"
    run.state = run.state.model_copy(update={"skipped": run.state.skipped + stats.skipped})
    stage = step.stage
    step.metrics = {
        "train/loss": loss,
        "lr": stats.lr,
        "grad_norm": grad_norm,
        "skipped": int(stats.skipped),
        **run.guard.metrics(),
        **speed(stage.run, stage.source.unit, stage.flops_a_row, seconds, run.ranks),
        **step.metrics,
    }


def farewell(run: Training) -> int:
    """Say how the run ended, and return the exit status."""
    state = run.state
    if run.outcome == "KILLED":
        run.progress.say(
            f"stopped at step {state.step} with a checkpoint, from which the run can go on"
        )
        return 128 + run.stopped_by
    if not run.complete:
        run.progress.say(
            f"stopped at step {state.step} with a checkpoint, as run.stop_at asks; without it the "
            "run goes on"
        )
        return 0
    skipped = f"{state.skipped} skipped"
    if state.skipped == state.step:
        skipped = "every step was skipped, so the weights are as they were at the start"
    units = f"{run.stages.units_at(state.step):,} {run.unit.name}"
    run.progress.say(f"done: {state.step} steps, {units}, {skipped}; {run.config.run.dir}")
    return 0
