"""The stages of a run (``train.stages``) with what each reads: where they begin, their batches.

Which rows a step takes is a function of the stages before it and of its number alone. Stages that
follow one another with the same ``data`` read one endless order. With other data a stage begins an
order of its own, in which sets that were read before go on where they were left
(:meth:`dnt_scale.data.sources.Source.after`). Of a run without stages all this is one stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, Self

from dnt_scale.config import ConfigError, RunConfig, Span, Spans, by_stage, flat, span_at
from dnt_scale.data.sources import Passed, Source, check_parts, load_source
from dnt_scale.data.stream import Stream, rows_a_rank
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.model.batch import Batch
from dnt_scale.model.task import flops_per_row

NOT_THE_MODELS = {"folder", "seq_len"}  # of a source's rows: what a model is not made by


@dataclass(frozen=True)
class Stage:
    """A stage of a run."""

    run: RunConfig  # with the stage's data and batch
    source: Source
    span: Span
    first_row: int  # of the run, that stands at position 0 of the source's order

    @cached_property
    def flops_a_row(self) -> float:
        """Return the FLOPs of training on a row, forward and backward."""
        return flops_per_row(self.run.model, self.source.unit.a_row)

    def stream(self, consumed_rows: int, ranks: Ranks) -> Stream:
        """Return this rank's batches from row ``consumed_rows`` of the run on, with states that
        count from ``first_row``.
        """
        return self.source.stream(
            seed=self.run.run.seed,
            global_batch=self.run.train.global_batch,
            consumed_rows=consumed_rows - self.first_row,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )

    def rows_behind(self, first: int, last: int) -> dict[str, object]:
        """Return where the rows [first, last) of the run lie, see ``Source.rows_behind``."""
        places = self.source.rows_behind(
            self.run.run.seed, first - self.first_row, last - self.first_row
        )
        return {**places, "positions": [first, last]}


class Stages(tuple[Stage, ...]):
    """The stages of a run in their order."""

    @property
    def source(self) -> Source:
        """Return that of the run's own data, which validation and inference read."""
        return self[0].source

    @property
    def spans(self) -> Spans:
        """Return the steps of each."""
        return tuple(stage.span for stage in self)

    @property
    def total_steps(self) -> int:
        """Return the optimizer steps of the whole run."""
        return self[-1].span.end

    @property
    def a_rows(self) -> tuple[int, dict[str, int]]:
        """Return the units a row has: in the run's own data, and in those of stages by name."""
        of_stages = {stage.span.name: stage.span.a_row for stage in self[1:]}
        return self[0].span.a_row, of_stages

    def at(self, step: int) -> Stage:
        """Return the stage of the step that comes when so many are done."""
        return self[self.spans.index(span_at(self.spans, step))]

    def units_at(self, step: int) -> int:
        """Return what the run's rows count when so many steps are done."""
        return self.at(step).span.units_at(step)

    def work_at(self, step: int) -> float:
        """Return the FLOPs of training when so many steps are done; rows, of a model that tells
        none.
        """
        rows = [
            max(0, min(step, stage.span.end) - stage.span.begin) * stage.span.global_batch
            for stage in self
        ]
        return sum(
            count * (stage.flops_a_row or 1.0) for count, stage in zip(rows, self, strict=True)
        )

    def sets(self) -> list[dict[str, str]]:
        """Return the SHA-256 of each stage's sets by name."""
        return [{part.name: part.sha256 for part in stage.source.parts()} for stage in self]


def check_batches(run: RunConfig, ranks: int) -> None:
    """Raise ConfigError where ranks cannot share the global batch of a stage equally."""
    for name, stage in by_stage(run).items():
        try:
            rows_a_rank(stage.train.global_batch, ranks)
        except ValueError as error:
            raise ConfigError(f"train.stages.{name}: {error}" if name else str(error)) from None


def check_sets(stages: Stages, wanted: Sequence[dict[str, str]]) -> None:
    """Raise ConfigError where this rank sees other sets than rank 0, ``wanted`` as of
    ``Stages.sets``.
    """
    for stage, sets in zip(stages, wanted, strict=True):
        check_parts(stage.source, sets)


def load_stages(run: RunConfig) -> Stages:
    """Return the stages of a run with their sources.

    Raises:
        ValueError: a set is damaged, does not fit the model or was made with another tokenizer; or
            stages do not follow one another inside of the run.
    """
    runs = by_stage(run)
    sources = {"": load_source(run)}
    unit = sources[""].unit.name
    for name, stage in run.train.stages.items():
        if stage.after_tokens is not None and unit != "tokens":
            raise ConfigError(
                f"train.stages.{name}.after_tokens is {stage.after_tokens}, but data.kind="
                f"{run.data.kind} has {unit}; set after_step instead"
            )
        before = [*sources.values()][-1]
        sources[name] = before if stage.data is None else _source_of(runs[name], name, sources[""])
    a_row, *others = (source.unit.a_row for source in sources.values())
    spans = run.spans(a_row, dict(zip(run.train.stages, others, strict=True)))
    found: list[Stage] = []
    passed: dict[str, Passed] = {}
    for span, own, source in zip(spans, runs.values(), sources.values(), strict=True):
        if not found:
            found.append(Stage(own, source, span, 0))
        elif _same_order(own, source, found[-1]):
            found.append(Stage(own, found[-1].source, span, found[-1].first_row))
        else:
            last = found[-1]
            passed |= last.source.passed(span.rows - last.first_row)
            found.append(Stage(own, source.after(passed), span, span.rows))
    return Stages(found)


def _same_order(run: RunConfig, source: Source, before: Stage) -> bool:
    """Whether a stage reads what the one before it does, wherever the sets lie: a set is known by
    its manifest, and may be moved in the course of a run.
    """
    own, theirs = (
        {
            key: value
            for key, value in flat(each).items()
            if key.startswith("data.") and not key.endswith(".path")
        }
        for each in (run, before.run)
    )
    return own == theirs and source.identity() == before.source.identity()


def _source_of(run: RunConfig, name: str, first: Source) -> Source:
    """Return the source of a stage's own data, which is of the model that the run's own data
    is for.
    """
    unseen = run.eval.model_copy(update={"every": 0})  # validation reads the run's own data
    try:
        source = load_source(run.model_copy(update={"eval": unseen}))
    except ConfigError as error:
        raise ConfigError(f"train.stages.{name}: {error}") from None
    place = source.parts()[0].place
    if problem := source.foreign(first.facts(), first.parts()[0].place):
        raise ConfigError(f"train.stages.{name}.data: {place} was {problem}")
    own, theirs = _facts_of(source.rows), _facts_of(first.rows)
    for key in sorted(theirs):
        if own.get(key) != theirs[key]:
            raise ConfigError(
                f"train.stages.{name}.data: its rows have {key} {own.get(key)}, those of the run's "
                f"own data {theirs[key]}, which the model is made for; give both sections the same "
                "settings"
            )
    return source


def _facts_of(rows: Any) -> dict[str, Any]:
    """Return what a model may be made by, of what rows are."""
    known = fields(rows) if is_dataclass(rows) else ()
    return {each.name: getattr(rows, each.name) for each in known} | dict.fromkeys(NOT_THE_MODELS)


class Batches:
    """This rank's batches of all stages, one after the other, as a ``Stream`` gives them: with the
    rows of the run that are consumed then. Use it as a context manager.

    Args:
        step: the steps that are done.
    """

    def __init__(self, stages: Stages, step: int, consumed_rows: int, ranks: Ranks) -> None:
        self.stages = stages
        self.step = step
        self.consumed_rows = consumed_rows
        self.ranks = ranks
        self.stage = stages.at(step)
        self.stream = self.stage.stream(consumed_rows, ranks)

    def __enter__(self) -> Self:
        self.stream.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stream.__exit__(kind, error, trace)

    def __next__(self) -> tuple[Batch, int]:
        stage = self.stages.at(self.step)
        if stage is not self.stage:
            self._go_over_to(stage)
        batch, consumed = next(self.stream)
        self.step += 1
        self.consumed_rows = stage.first_row + consumed
        return batch, self.consumed_rows

    def _go_over_to(self, stage: Stage) -> None:
        """Read a stage that has come, unless what is read ahead is its too."""
        before, self.stage = self.stage, stage
        same_rows = stage.source is before.source
        if same_rows and stage.span.global_batch == before.span.global_batch:
            return
        self.stream.__exit__(None, None, None)
        self.stream = stage.stream(self.consumed_rows, self.ranks)
        self.stream.__enter__()
