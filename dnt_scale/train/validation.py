"""How good the model is on held-out rows."""

import math
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from dnt_scale.config import RunConfig
from dnt_scale.data.sources import Sources
from dnt_scale.data.stream import validation_batches
from dnt_scale.distributed import device_metrics
from dnt_scale.distributed.heartbeat import moving
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.engine.base import Engine
from dnt_scale.record.speed import Metrics


def validation(run: RunConfig, trainer: Engine, sources: Sources, me: Ranks) -> Metrics:
    """``validation_metrics`` on ``eval.rows`` evenly spread held-out rows of each set."""
    shape = {"rows": run.eval.rows, "micro_batch": run.train.micro_batch, "rank": me.rank, "world_size": me.world_size}
    with device_metrics.ignored():
        losses = [trainer.eval_loss(watched(validation_batches(source, **shape))) for source in sources]
    return validation_metrics(losses, sources)


def watched(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches; each tells the watchdog that the validation, however long, gets on."""
    for batch in batches:
        moving()
        yield batch


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
