"""The training loop: ``dnt train``, ``torchrun ... -m dnt_scale.train``, or ``srun python -m dnt_scale.train``.

Rerunning the same command resumes from the newest checkpoint. Ctrl-C and SIGTERM finish the step, write a
checkpoint and stop, on all ranks together.
"""

import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from dnt_scale import checkpoint, config, engine, ranks
from dnt_scale.checkpoint import State
from dnt_scale.config import ConfigError, RunConfig
from dnt_scale.engine.base import Engine
from dnt_scale.model import DNT, count_parameters, flops_per_token
from dnt_scale.plots import plot_run
from dnt_scale.progress import TrainProgress, peak_flops
from dnt_scale.ranks import Ranks
from dnt_scale.resume import check_sets, starting_state
from dnt_scale.sources import Sources, fitting_sources
from dnt_scale.stream import Stream, validation_batches
from dnt_scale.tracking import Status, Tracker, git_commit

Metrics = dict[str, float | int | None]


class TrainingError(ranks.AgreedError):
    """The run cannot go on, which every rank finds at once; the message says why and what to do."""


def main(overrides: list[str]) -> int:
    """Compose the configuration, train, and return the exit status.

    Returns:
        0 when the run is complete, 2 after an error the user can mend, 128 + n when signal n stopped the run.
    """
    rank, local_rank, _ = ranks.environment()
    try:
        run = config.load(overrides)
    except ConfigError as error:
        if local_rank == 0:  # all of a node find the same
            print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        status = train(run, ranks.start(run.run.device))
    except ranks.AgreedError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        status = 2
    except (ValueError, OSError) as error:
        print(f"error: {error}" if rank == 0 else f"rank {rank}: error: {error}", file=sys.stderr)
        status = 2
    except RuntimeError as error:
        if not ranks.lost_peer(error):
            raise
        reason = str(error).splitlines()[0]
        print(f"rank {rank}: stopped, for another rank ended before it ({reason})", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    ranks.stop()
    return status


def train(run: RunConfig, me: Ranks) -> int:
    """Train ``run`` to its last step or to a signal; returns the exit status.

    Raises:
        ValueError: the configuration, the data and the checkpoint do not fit together, a file is damaged, or
            too many steps in a row were not finite.
        OSError: the run folder cannot be written.
    """
    sources = ranks.together(me, lambda: fitting_sources(run))
    manifest = sources[0].manifest  # all have its seq_len, eos_id and tokenizer
    total_steps = run.total_steps(manifest.seq_len)
    state, newest = ranks.on_first(me, lambda: starting_state(run, sources, total_steps, me.world_size))
    ranks.together(me, lambda: check_sets(sources, state))
    if newest:
        checkpoint.check_files(newest, state, me)
    stream = ranks.together(me, lambda: training_stream(run, sources, state, me))
    document_eos = manifest.eos_id if run.data.document_mask else None
    trainer = engine.build(run, lambda: DNT(run.model, document_eos), me, total_steps)
    if newest:
        trainer.load(newest)

    tracker = start_tracking(run, state, me) if me.first else None
    progress = TrainProgress(total_steps, state.step, silent=not me.first)
    progress.say(opening_line(run, sources, total_steps, newest, me))

    def report(metrics: Metrics) -> None:
        metrics = {"step": state.step, "tokens": state.tokens, "time": time.time(), **metrics}
        if tracker:
            tracker.log(metrics)
        progress.update(state.step, metrics)

    outcome: Status = "FAILED"
    stopped_by = skipped_in_a_row = 0
    try:
        with stop_signals() as signals, progress, stream:
            if newest is None and run.eval.every:
                report(validation(run, trainer, sources, me))
            while state.step < total_steps and not stopped_by:
                started = time.perf_counter()
                batch, consumed_rows = next(stream)
                stats = trainer.train_step(batch)
                seconds = time.perf_counter() - started
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
                    **speed(run, manifest.seq_len, seconds, me),
                }
                if run.eval.every and (state.step % run.eval.every == 0 or last):
                    metrics |= validation(run, trainer, sources, me)
                report(metrics)

                skipped_in_a_row = skipped_in_a_row + 1 if stats.skipped else 0
                if skipped_in_a_row == run.train.max_skipped:
                    raise TrainingError(
                        f"step {state.step}: {skipped_in_a_row} steps in a row had a non-finite loss or gradient "
                        f"(loss {stats.loss}, gradient norm {stats.grad_norm}); the weights are unchanged since: "
                        "lower optim.lr or set optim.clip_norm, and run again to go on from the newest checkpoint"
                    )
                stopped_by = ranks.highest(signals[0] if signals else 0)
                due = run.checkpoint.every and state.step % run.checkpoint.every == 0
                if due or last or stopped_by:
                    checkpoint.write(run.run.dir / "checkpoints", state, trainer.save, me, keep=run.checkpoint.keep)
            outcome = "FINISHED" if state.step == total_steps else "KILLED"
    finally:
        if tracker:
            try:
                plot_run(run.run.dir)
            except (ValueError, OSError) as error:  # no loss yet, disk full: what ended the run is what counts
                progress.say(f"no plot: {error}")
            tracker.finish(outcome)
    trainer.close()
    if outcome == "KILLED":
        progress.say(f"stopped at step {state.step} with a checkpoint; the same command goes on from there")
        return 128 + stopped_by
    progress.say(f"done: {state.step} steps, {state.tokens:,} tokens, {state.skipped} skipped; {run.run.dir}")
    return 0


def training_stream(run: RunConfig, sources: Sources, state: State, me: Ranks) -> Stream:
    return Stream(
        sources,
        seed=run.run.seed,
        global_batch=run.train.global_batch,
        rank=me.rank,
        world_size=me.world_size,
        consumed_rows=state.consumed_rows,
    )


def start_tracking(run: RunConfig, state: State, me: Ranks) -> Tracker:
    """Write ``config.yaml`` and open metrics.jsonl and MLflow, going on where the checkpoint stands."""
    run.run.dir.mkdir(parents=True, exist_ok=True)
    (run.run.dir / "config.yaml").write_text(config.to_yaml(run))
    return Tracker.start(
        run.run.dir,
        uri=run.tracking.uri,
        experiment=run.tracking.experiment,
        run_name=run.run.name,
        run_id=state.run_id,
        params={**config.flat(run), "parameters": count_parameters(run.model), "ranks": me.world_size},
        tags={
            "git_commit": git_commit(),
            "manifest_sha256": state.manifest_sha256,
            "tokenizer_sha256": state.tokenizer_sha256,
            "config": config.to_yaml(run),
        },
        enabled=run.tracking.enabled,
        resume_step=state.step,
    )


def validation(run: RunConfig, trainer: Engine, sources: Sources, me: Ranks) -> Metrics:
    """``validation_metrics`` on ``eval.rows`` evenly spread held-out rows of each set."""
    losses = [
        trainer.eval_loss(
            validation_batches(
                source,
                rows=run.eval.rows,
                micro_batch=run.train.micro_batch,
                rank=me.rank,
                world_size=me.world_size,
            )
        )
        for source in sources
    ]
    return validation_metrics(losses, sources)


def validation_metrics(losses: Sequence[float], sources: Sources) -> Metrics:
    """Loss in nats a token, perplexity, and bits a byte of UTF-8 text, from each set's own loss.

    ``val/loss`` is the mean over the sets by the mixture's weights, which are of tokens; perplexity and bits a byte are
    of text mixed in these proportions. Of a mixture, ``val/NAME/loss`` and the like are each set's own.
    """
    bytes_a_token = [split.text_bytes / split.tokens for split in (source.manifest.splits["val"] for source in sources)]

    def mean(values: Sequence[float]) -> float:
        return math.fsum(source.weight * value for source, value in zip(sources, values, strict=True))

    def measures(prefix: str, loss: float, bytes_a_token: float) -> Metrics:
        return {
            f"{prefix}/loss": loss,
            f"{prefix}/perplexity": math.exp(min(loss, 700.0)),
            f"{prefix}/bits_per_byte": loss / math.log(2) / bytes_a_token,
        }

    metrics = measures("val", mean(losses), mean(bytes_a_token))
    for source, loss, size in zip(sources, losses, bytes_a_token, strict=True):
        if source.name:
            metrics |= measures(f"val/{source.name}", loss, size)
    return metrics


def speed(run: RunConfig, seq_len: int, seconds: float, me: Ranks) -> Metrics:
    """Tokens a second over all ranks; MFU = tokens/s x flops_per_token / (ranks x peak), left out if no peak is known;
    and on CUDA this rank's peak allocated memory in GB (1e9 bytes)."""
    tokens_per_s = run.train.global_batch * seq_len / seconds
    metrics: Metrics = {"tokens_per_s": tokens_per_s}
    if peak := peak_flops(me.device):
        metrics["mfu"] = tokens_per_s * flops_per_token(run.model, seq_len) / (me.world_size * peak)
    if me.device.type == "cuda":
        metrics["memory_gb"] = torch.cuda.max_memory_allocated(me.device) / 1e9
    return metrics


def opening_line(run: RunConfig, sources: Sources, total_steps: int, newest: Path | None, me: Ranks) -> str:
    rows = total_steps * run.train.global_batch / sum(source.share for source in sources)
    epochs = ", ".join(
        f"{rows * source.share / source.manifest.splits['train'].rows:.2f} epochs{source.name and ' of ' + source.name}"
        for source in sources
    )
    return (
        f"{run.run.name}: {run.model.name}, {count_parameters(run.model) / 1e6:.1f}M parameters, "
        f"{total_steps} steps of {run.train.global_batch * sources[0].manifest.seq_len:,} tokens ({epochs}) "
        f"on {me.world_size} x {me.device.type}, " + (f"resuming from {newest}" if newest else "from the start")
    )


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM for the loop to read; a second SIGINT interrupts at once."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
