"""The training loop, as each rank runs it (:mod:`dnt_scale.train.rank`).

Rerunning the same command resumes from the newest checkpoint. Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 finish the
step, write a checkpoint and stop, on all ranks together (dnt_scale/train/signals.py).
"""

import time
from contextlib import closing, suppress

from dnt_scale import checkpoint, engine
from dnt_scale.checkpoint.replicas import check_replicas
from dnt_scale.data.sources import check_parts, load_source
from dnt_scale.distributed.agree import highest, on_first, together
from dnt_scale.distributed.heartbeat import beat
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.model.task import build_task
from dnt_scale.record.files import warn
from dnt_scale.record.metrics_file import last_metrics
from dnt_scale.record.plots import plot_run
from dnt_scale.record.speed import Metrics, speed
from dnt_scale.record.system_metrics import sampling
from dnt_scale.record.timeline import Clock
from dnt_scale.record.tracker import Status
from dnt_scale.train.progress import TrainProgress, opening_line
from dnt_scale.train.resume import changes, check_place, starting_state
from dnt_scale.train.run_facts import start_tracking
from dnt_scale.train.run_start import Begun, make_room
from dnt_scale.train.signals import stop_signals
from dnt_scale.train.spike_guard import Guard, HopelessRun
from dnt_scale.train.validation import validation


def train(begun: Begun, me: Ranks) -> int:
    """Train a run to its last step or to a signal; returns the exit status.

    Raises:
        ValueError: the configuration, the data and the checkpoint do not fit together, a file is damaged, or
            too many steps in a row were lost.
        OSError: the run folder cannot be written.
    """
    beat("start")
    run = begun.run
    source = together(me, lambda: load_source(run))
    unit = source.unit
    total_steps = run.total_steps(unit.a_row)
    state, newest = on_first(me, lambda: starting_state(begun, source, total_steps, me.world_size))
    together(me, lambda: check_parts(source, state.sets))
    if newest:
        checkpoint.check_files(newest, state, me)
    order = {"seed": run.run.seed, "global_batch": run.train.global_batch, "consumed_rows": state.consumed_rows}
    stream = together(me, lambda: source.stream(rank=me.rank, world_size=me.world_size, **order))
    trainer = engine.build(run, lambda: build_task(run.model, source.rows), me, total_steps)
    on_first(me, lambda: make_room(begun))
    on_first(me, lambda: check_place(run))  # makes the folder, so a run refused above has left none
    clock = Clock(run.run.dir, silent=not me.first)
    clock.start(me.world_size, last_metrics(run.run.dir)[-1:])
    guard = Guard(run.health, run.optim.clip_norm, run.train.max_skipped)
    restoring = time.perf_counter()
    if newest:
        checkpoint.read_tensors(newest, trainer.boxes(), me)
        trainer.refresh(state.scalars)
        guard.restore(state.health)
    restored = time.perf_counter() - restoring
    guard.keep(state.step, trainer, at_checkpoint=True)
    saver = together(
        me,
        lambda: checkpoint.Saver(
            run.checkpoints,
            me,
            keep=run.checkpoint.keep,
            keep_every=run.checkpoint.keep_every,
            background=run.checkpoint.background,
            in_place=lambda step: clock.tell("saved", step=step),
        ),
    )

    tracker = together(me, lambda: start_tracking(run, state, me) if me.first else None)
    for line in changes(begun, unit.a_row) if me.first else []:
        warn(line)
    progress = TrainProgress(total_steps, state.step, source, silent=not me.first)
    progress.say(opening_line(run, source, total_steps, newest, me))
    for line in source.notes(run):
        progress.say(line)

    unwritten: list[OSError] = []

    def report(metrics: Metrics) -> None:
        metrics = {"step": state.step, unit.name: unit.of(state.consumed_rows), "time": time.time(), **metrics}
        if tracker:
            try:
                tracker.log(metrics)
            except OSError as error:  # for all ranks to end together
                unwritten.append(error)
        progress.update(state.step, metrics)

    def check_written() -> None:
        if unwritten:
            raise unwritten[0]

    def judged(first_row: int) -> None:
        if bad := guard.told():
            progress.say(f"step {state.step}: {bad}")
        log = run.run.dir / "logs" / "bad_steps.jsonl" if me.first else None
        try:
            guard.after(
                state.step, trainer, lambda: source.rows_behind(run.run.seed, first_row, state.consumed_rows), log
            )
        except HopelessRun:
            saver.settle(wait=True)  # of a step that was good
            raise

    outcome: Status = "FAILED"
    stopped_by = 0
    try:
        with stop_signals() as signals, progress, stream, closing(saver), sampling(run, me, lambda: state.step):
            check_replicas(me, trainer.boxes(), trainer.scalars())
            clock.tell("ready", step=state.step, restored=round(restored, 3))
            if newest is None and run.eval.every:
                with clock.spending("eval"):
                    report(validation(run, trainer, source, me))
            while state.step < total_steps and not stopped_by:
                beat(f"step {state.step + 1}")
                started = time.perf_counter()
                with clock.spending("step"):
                    batch, consumed_rows = next(stream)
                    stats = trainer.train_step(batch, guard.judge)
                seconds = time.perf_counter() - started
                first_row = state.consumed_rows
                state = state.model_copy(
                    update={
                        "step": state.step + 1,
                        "consumed_rows": consumed_rows,
                        unit.name: unit.of(consumed_rows),
                        "skipped": state.skipped + stats.skipped,
                    }
                )
                last = state.step == total_steps
                metrics: Metrics = {
                    "train/loss": stats.loss,
                    "lr": stats.lr,
                    "grad_norm": stats.grad_norm,
                    "skipped": int(stats.skipped),
                    **guard.metrics(),
                    **speed(run, unit, seconds, me),
                }
                if run.eval.every and (state.step % run.eval.every == 0 or last):
                    with clock.spending("eval"):
                        metrics |= validation(run, trainer, source, me)
                report(metrics)
                judged(first_row)

                stopped_by, writing, failed = highest(signals[0] if signals else 0, saver.busy, bool(unwritten))
                if failed:
                    saver.settle(wait=True)  # a checkpoint of which nothing is missing, or a better reason
                    on_first(me, check_written)
                if saver.pending and not writing:
                    with clock.spending("save"):
                        saver.settle()
                due = bool(run.checkpoint.every and state.step % run.checkpoint.every == 0)
                if save_now := due or last or bool(stopped_by):
                    numbers = {"engine": trainer.scalars(), "health": guard.state()}
                    with clock.spending("save"):
                        saver.save(state.model_copy(update=numbers), trainer.boxes())
                guard.keep(state.step, trainer, at_checkpoint=save_now)
                if run.health.check_every and state.step % run.health.check_every == 0:
                    check_replicas(me, trainer.boxes(), trainer.scalars())
                clock.progress(state.step)
            with clock.spending("save"):
                saver.settle(wait=True)
            outcome = "FINISHED" if state.step == total_steps else "KILLED"
    finally:
        if tracker:
            clock.progress(state.step, now=True)
            clock.tell("end", outcome=outcome, step=state.step)
            with suppress(ValueError, OSError):  # no loss to draw, disk full: what ended the run is told anyway
                plot_run(run.run.dir)
            tracker.finish(outcome)
    trainer.close()
    if outcome == "KILLED":
        progress.say(f"stopped at step {state.step} with a checkpoint, from which the run can go on")
        return 128 + stopped_by
    skipped = f"{state.skipped} skipped"
    if state.skipped == state.step:
        skipped = "every step was skipped, so the weights are as they were at the start"
    progress.say(f"done: {state.step} steps, {unit.of(state.consumed_rows):,} {unit.name}, {skipped}; {run.run.dir}")
    return 0
