"""How good the model is on held-out rows."""

from collections.abc import Iterable, Iterator

from dnt_scale.config import RunConfig
from dnt_scale.data.sources import Source
from dnt_scale.distributed import device_metrics
from dnt_scale.distributed.heartbeat import moving
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.engine.base import Engine
from dnt_scale.model.batch import Batch
from dnt_scale.record.speed import Metrics


def validation(run: RunConfig, engine: Engine, source: Source, ranks: Ranks) -> Metrics:
    """Measure the model on ``eval.rows`` evenly spread held-out rows of each set of the source."""
    sets = source.validation(
        rows=run.eval.rows,
        micro_batch=run.train.rows_a_forward,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    with device_metrics.ignored():
        means = {name: engine.evaluate(watched(sets[name])) for name in sets}
    return {**source.validation_metrics(means)}


def watched(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches; each tells the watchdog that the validation, however long, gets on."""
    for batch in batches:
        moving()
        yield batch
