"""The training loop, as each rank runs it (rank.py): a step, then the hooks in their order.

Rerunning the same command resumes from the newest checkpoint. Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and
SIGUSR2 finish the step, write a checkpoint and stop, on all ranks together
(dnt_scale/train/signals.py).
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing

from dnt_scale.distributed.heartbeat import beat
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.record.speed import speed
from dnt_scale.record.system_metrics import sampling
from dnt_scale.train.hooks import HOOKS, Hook
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
                step = take_step(run, hooks)
                for hook in hooks:
                    hook.after_step(run, step)
            for hook in hooks:
                hook.after_training(run)
            run.outcome = "FINISHED" if run.complete or run.halted else "KILLED"
    run.engine.close()
    return farewell(run)


def take_step(run: Training, hooks: Sequence[Hook]) -> Step:
    """Do one optimizer step on the next global batch; hooks see its gradient. A collective."""

    def judge(loss: float, grad_norm: float) -> float:
        for hook in hooks:
            hook.before_update(run)
        return run.guard.judge(loss, grad_norm)

    beat(f"step {run.state.step + 1}")
    stage = run.stage
    started = time.perf_counter()
    with run.clock.spending("step"):
        batch, consumed_rows = next(run.batches)
        stats = run.engine.train_step(batch, judge)
    seconds = time.perf_counter() - started
    before = run.state
    run.state = before.model_copy(
        update={
            "step": before.step + 1,
            "consumed_rows": consumed_rows,
            run.unit.name: run.stages.units_at(before.step + 1),
            "skipped": before.skipped + stats.skipped,
        }
    )
    metrics = {
        "train/loss": stats.loss,
        "lr": stats.lr,
        "grad_norm": stats.grad_norm,
        "skipped": int(stats.skipped),
        **run.guard.metrics(),
        **speed(stage.run, stage.source.unit, stage.flops_a_row, seconds, run.ranks),
    }
    return Step(run.state.step, stage, before.consumed_rows, run.complete, stats, metrics)


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
