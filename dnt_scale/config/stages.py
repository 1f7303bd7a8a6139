"""`train.stages`: what changes in the course of a run, and at which of its steps.

The settings of the run itself are its first stage. A stage that is listed begins once so many steps
or units are done, and has from the stage before whatever it leaves out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, SerializeAsAny, WrapValidator, model_validator

from dnt_scale.config.base import ConfigError, Count, Strict
from dnt_scale.config.data import SOURCES, DataSection

if TYPE_CHECKING:
    from dnt_scale.config.run import RunConfig

StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=100)]
BEGINNINGS = ("after_step", "after_tokens")


def _data(raw: Any, handler: Any) -> Any:
    return None if raw is None else SOURCES.validate(raw, handler)


class StageSection(Strict):
    """A stage of a run. What is null is as in the stage before."""

    after_step: Count | None = Field(
        None, gt=0, description="steps that are done when the stage begins"
    )
    after_tokens: int | None = Field(
        None,
        gt=0,
        le=10**18,
        description="instead of after_step: it begins with the first step that has so many behind "
        "it",
    )
    data: Annotated[SerializeAsAny[DataSection] | None, WrapValidator(_data)] = Field(
        None, description="what is read, a whole section `data`; rows may have another length"
    )
    global_batch: int | None = Field(None, gt=0, le=1 << 31, description="rows a step")
    micro_batch: int | None = Field(None, gt=0, le=1 << 31, description="rows a rank a forward")
    lr_factor: float | None = Field(
        None,
        ge=0,
        le=1e6,
        description="what the learning rates of `optim` are multiplied by, where the stage begins",
    )
    decay_to: float | None = Field(
        None,
        ge=0,
        le=1e6,
        description="the factor at the stage's last step, by a straight line; null: lr_factor",
    )

    @property
    def beginning(self) -> int:
        """Return after how many steps or units it begins."""
        found = self.after_step if self.after_tokens is None else self.after_tokens
        assert found is not None
        return found

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if (self.after_step is None) == (self.after_tokens is None):
            raise ValueError(
                "set one of after_step and after_tokens; found "
                f"after_step={self.after_step}, after_tokens={self.after_tokens}"
            )
        return self


def check_order(stages: Mapping[str, StageSection]) -> None:
    """Raise ValueError where stages do not follow one another in the order they are written in."""
    for (name, stage), (other, after) in zip(
        stages.items(), list(stages.items())[1:], strict=False
    ):
        if (stage.after_step is None) != (after.after_step is None):
            raise ValueError(
                f"stages.{name} and stages.{other} begin, one after_step and one after_tokens; "
                "give all stages of a run the same"
            )
        if after.beginning <= stage.beginning:
            what = BEGINNINGS[after.after_step is None]
            raise ValueError(
                f"stages.{other}.{what} is {after.beginning}, not above {stage.beginning} of "
                f"stages.{name}, which stands before it; write stages in the order they begin in"
            )


@dataclass(frozen=True)
class Span:
    """The steps of a stage, counted from 0: those from ``begin`` on and below ``end``."""

    name: str  # empty: the run's own settings
    begin: int
    end: int
    global_batch: int  # rows a step
    a_row: int  # units a row
    rows: int  # of the stages before
    units: int  # of those
    lr_factor: float
    decay_to: float

    def factor(self, step: int) -> float:
        """Return what the learning rates are multiplied by in a step, beside the schedule.

        A stage that decays leaves ``lr_factor`` with its first step, to have ``decay_to`` in its
        last one.
        """
        if self.decay_to == self.lr_factor:
            return self.lr_factor
        progress = min(1.0, (step + 1 - self.begin) / (self.end - self.begin))
        return self.lr_factor + (self.decay_to - self.lr_factor) * progress

    def rows_at(self, step: int) -> int:
        """Return the rows of the run when so many steps are done."""
        return self.rows + (step - self.begin) * self.global_batch

    def units_at(self, step: int) -> int:
        """Return the units of the run when so many steps are done."""
        return self.units + (step - self.begin) * self.global_batch * self.a_row

    def step_of(self, units: int) -> int:
        """Return after how many steps the run has so many units, were the stage to go on."""
        return self.begin + -(-(units - self.units) // (self.global_batch * self.a_row))


Spans = tuple[Span, ...]


def span_at(spans: Sequence[Span], step: int) -> Span:
    """Return the span of the step that comes when so many are done; beyond the end, the last."""
    return next((span for span in spans if step < span.end), spans[-1])


def spans_of(run: "RunConfig", units_a_row: int, of_stages: Mapping[str, int]) -> Spans:
    """Return the spans of a run's stages.

    Args:
        units_a_row: of the run's own data.
        of_stages: the same of stages, by name; without a stage: as of the one before.

    Raises:
        ConfigError: a stage begins before the one before it, or not before the run's end.
    """
    train = run.train
    unending = 1 << 62
    spans = [Span("", 0, unending, train.global_batch, units_a_row, 0, 0, 1.0, 1.0)]
    for name, stage in train.stages.items():
        last = spans[-1]
        begin = last.step_of(stage.beginning) if stage.after_step is None else stage.beginning
        if begin <= last.begin:
            raise ConfigError(
                f"train.stages.{name}.after_tokens is {stage.beginning:,}, which leaves "
                f"{f'stages.{last.name}' if last.name else 'the steps before it'} no step; give "
                "more of them"
            )
        spans[-1] = last = replace(last, end=begin)
        factor = last.decay_to if stage.lr_factor is None else stage.lr_factor
        spans.append(
            Span(
                name,
                begin,
                unending,
                stage.global_batch or last.global_batch,
                of_stages.get(name, last.a_row),
                last.rows_at(begin),
                last.units_at(begin),
                factor,
                factor if stage.decay_to is None else stage.decay_to,
            )
        )
    last = spans[-1]
    end = last.step_of(train.tokens or 0) if train.steps is None else train.steps
    if train.stages and end <= last.begin:
        asked = f"steps is {train.steps:,}" if train.steps else f"tokens is {train.tokens:,}"
        raise ConfigError(
            f"train.stages.{last.name} begins after step {last.begin:,}, but train.{asked}, so the "
            f"run ends after step {max(end, 0):,}; let it begin earlier, or train for longer"
        )
    return (*spans[:-1], replace(last, end=end))


def by_stage(run: "RunConfig") -> dict[str, "RunConfig"]:
    """Return the run as each of its stages trains it, by the stages' names; "" is itself."""
    found = {"": run}
    for name, stage in run.train.stages.items():
        before = [*found.values()][-1]
        batches = {
            key: value
            for key in ("global_batch", "micro_batch")
            if (value := getattr(stage, key)) is not None
        }
        found[name] = before.model_copy(
            update={
                "data": stage.data or before.data,
                "train": before.train.model_copy(update=batches),
            }
        )
    return found
