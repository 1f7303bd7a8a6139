"""The training loop: ``dnt train``, ``torchrun ... -m dnt_scale.train``, or ``srun python -m dnt_scale.train``.

Rerunning the same command resumes from the newest checkpoint. Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 finish the
step, write a checkpoint and stop, on all ranks together (dnt_scale/signals.py).
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from dnt_scale import checkpoint, config, engine, startup
from dnt_scale.checkpoint.replicas import check_replicas
from dnt_scale.config import RunConfig
from dnt_scale.distributed import output, process_group
from dnt_scale.distributed.agree import highest, on_first, together
from dnt_scale.distributed.errors import AgreedError, Fault, exit_status, lost_peer, out_of_memory
from dnt_scale.distributed.heartbeat import beat
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.distributed.watchdog import watching
from dnt_scale.guard import Guard, HopelessRun, rows_behind
from dnt_scale.model import DNT
from dnt_scale.out_of_memory import out_of_memory_message
from dnt_scale.plots import plot_run
from dnt_scale.progress import Metrics, TrainProgress, opening_line, speed
from dnt_scale.recorded import Typed
from dnt_scale.recording import start_tracking
from dnt_scale.resume import changes, check_place, check_sets, starting_state
from dnt_scale.run_start import Begun, begun_on_all, check_no_job, make_room, only_writer
from dnt_scale.signals import stop_signals
from dnt_scale.sources import fitting_sources
from dnt_scale.stream import Stream
from dnt_scale.system_metrics import sampling
from dnt_scale.timeline import Clock, telling
from dnt_scale.tracking import Status, last_metrics, warn
from dnt_scale.validation import validation


def main(words: list[str], check_no_job: Callable[[Path], None] = check_no_job) -> int:
    """Train what ``words``, overrides and ``--fresh``, describe, and return the exit status, see ``run_rank``."""
    output.guard()
    rank = 0
    overrides = [word for word in words if word != "--fresh"]
    try:
        startup.check_folder()
        rank, _, _ = process_group.environment()
        run = config.load(overrides)
    except ValueError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        else:  # most often all find the same, and torchrun ends them as soon as the first has spoken and ended
            time.sleep(1.0)
            print(f"rank {rank}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return run_rank(run, typed=Typed(overrides), fresh=asked_anew(words), check_no_job=check_no_job)


def asked_anew(words: list[str]) -> bool:
    """Whether to begin anew: with ``--fresh``, but not again where a launcher restarts what it has begun."""
    if "--fresh" not in words:
        return False
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        if (count := os.environ.get(name, "0")) not in ("", "0"):
            warn(f"--fresh is for the first start; this is restart {count} ({name}), which goes on")
            return False
    return True


def run_rank(
    run: RunConfig,
    before: Callable[[Ranks], None] | None = None,
    *,
    typed: Typed = Typed(whole=True),  # noqa: B008
    fresh: bool = False,
    check_no_job: Callable[[Path], None] = check_no_job,
) -> int:
    """Be one rank of ``run``: meet the others, train, and return the exit status.

    Args:
        before: called once the ranks have met and no other process writes the run folder, before anything else.
        typed: what was typed to get ``run``; the rest is as the run's checkpoint records it.
        fresh: move aside what an earlier run has left, and begin at step 0.
        check_no_job: see ``only_writer``.

    Returns:
        0 when the run is complete; 1 after a fault that another try may not meet (a lost rank, a hang); 2 after an
        error that the user has to mend; 128 + n when signal n stopped the run, with a checkpoint.
    """
    output.guard()
    rank = 0
    try:
        rank, _, _ = process_group.environment()
        me = process_group.start(run.run.device, run.health.hang_s)
        with watching(me, run.health.hang_s, telling(run.run.dir)), only_writer(run, me, check_no_job):
            if before:
                before(me)
            begun = begun_on_all(run, me, typed, fresh=fresh)
            run = begun.run
            status = train(begun, me)
    except AgreedError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        status = exit_status(error)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        speaker = "" if rank == 0 else f"rank {rank}: "
        if out_of_memory(error):
            print(f"{speaker}error: {out_of_memory_message(me, run)}", file=sys.stderr)
        elif isinstance(error, ValueError | OSError):
            print(f"{speaker}error: {error}", file=sys.stderr)
        elif isinstance(error, RuntimeError) and lost_peer(error):
            reason = str(error).splitlines()[0]
            print(f"rank {rank}: stopped, for another rank ended before it ({reason})", file=sys.stderr)
            error = Fault(reason)
        else:
            raise
        status = exit_status(error)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    process_group.stop()
    return status


def train(begun: Begun, me: Ranks) -> int:
    """Train a run to its last step or to a signal; returns the exit status.

    Raises:
        ValueError: the configuration, the data and the checkpoint do not fit together, a file is damaged, or
            too many steps in a row were lost.
        OSError: the run folder cannot be written.
    """
    beat("start")
    run = begun.run
    sources = together(me, lambda: fitting_sources(run))
    manifest = sources[0].manifest  # all have its seq_len, eos_id and tokenizer
    total_steps = run.total_steps(manifest.seq_len)
    state, newest = on_first(me, lambda: starting_state(begun, sources, total_steps, me.world_size))
    together(me, lambda: check_sets(sources, state))
    if newest:
        checkpoint.check_files(newest, state, me)
    order = {"seed": run.run.seed, "global_batch": run.train.global_batch, "consumed_rows": state.consumed_rows}
    stream = together(me, lambda: Stream(sources, rank=me.rank, world_size=me.world_size, **order))
    document_eos = manifest.eos_id if run.data.document_mask else None
    trainer = engine.build(run, lambda: DNT(run.model, document_eos), me, total_steps)
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
    for line in changes(begun, manifest.seq_len) if me.first else []:
        warn(line)
    progress = TrainProgress(total_steps, state.step, silent=not me.first)
    progress.say(opening_line(run, sources, total_steps, newest, me))
    if (unused := run.model.vocab_size - manifest.tokenizer.vocab_size) > manifest.tokenizer.vocab_size:
        pieces = f"{manifest.tokenizer.vocab_size:,} pieces"
        progress.say(f"model.vocab_size: {unused:,} rows are never used, for the tokenizer has {pieces} only")

    unwritten: list[OSError] = []

    def report(metrics: Metrics) -> None:
        metrics = {"step": state.step, "tokens": state.tokens, "time": time.time(), **metrics}
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
                state.step, trainer, lambda: rows_behind(sources, run.run.seed, first_row, state.consumed_rows), log
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
                    report(validation(run, trainer, sources, me))
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
                        "tokens": state.tokens + run.train.global_batch * manifest.seq_len,
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
                    **speed(run, manifest.seq_len, seconds, me),
                }
                if run.eval.every and (state.step % run.eval.every == 0 or last):
                    with clock.spending("eval"):
                        metrics |= validation(run, trainer, sources, me)
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
    progress.say(f"done: {state.step} steps, {state.tokens:,} tokens, {skipped}; {run.run.dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
