"""The sections of a run's configuration as pydantic models, and ``RunConfig``, the whole of it.

Import them from :mod:`dnt_scale.config`, which makes them out of files and overrides.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from dnt_scale.config import paths
from dnt_scale.config.base import Count, Place, Strict, Text
from dnt_scale.config.data import AnyData
from dnt_scale.config.engine import DeepSpeedEngineConfig, EngineConfig
from dnt_scale.config.hooks import (
    DiagnoseSection,
    GarbageSection,
    MeasureSection,
    ProfileSection,
    TasksSection,
)
from dnt_scale.config.model import AnyModel, ModelConfig
from dnt_scale.config.optim import OptimConfig
from dnt_scale.config.stages import Spans, StageName, StageSection, check_order, spans_of

_LOGIN = re.compile(r"(?i)(^|&)[^=]*(user|password|token)[^=]*=")  # In a URL's query.
MOST_ROWS = 1 << 31
ASSUMED_ROWS = 8  # that fit most devices, see `TrainSection.rows_a_forward`
RESERVED = {"mlartifacts", "mlflow.db", "mlruns"}


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", text):
        raise ValueError(
            "expected up to 255 letters, digits, dots, _ and -, of which the first is a letter or "
            "digit"
        )
    if text in RESERVED:
        raise ValueError("MLflow's records lie there, beside the run folders; take another name")
    return text


def _rows_or_auto(raw: Any) -> int | str:
    """Refuse in one line what is neither; pydantic has one for each that it might have been."""
    if raw == "auto":
        return "auto"
    number = isinstance(raw, int | float) and not isinstance(raw, bool)
    if number and 1 <= raw <= MOST_ROWS and raw == int(raw):
        return int(raw)
    raise ValueError(f"expected a whole number of rows from 1 to {MOST_ROWS:,}, or auto")


RowsOrAuto = Annotated[
    Annotated[int, Field(gt=0, le=MOST_ROWS)] | Literal["auto"], BeforeValidator(_rows_or_auto)
]


class RunSection(Strict):
    name: Annotated[str, AfterValidator(_name)]
    dir: Place
    seed: int = Field(1234, ge=0, lt=2**64)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    stop_at: Count | None = Field(
        None,
        gt=0,
        description="step after which a start ends, with a checkpoint; schedule and budget stay "
        "the run's",
    )


class TrainSection(Strict):
    steps: Count | None = Field(None, gt=0)
    tokens: int | None = Field(
        None, gt=0, le=10**18, description="instead of steps: places in rows, padding too"
    )
    global_batch: int = Field(
        gt=0, le=1 << 31, description="rows a step, over all ranks and micro-batches"
    )
    micro_batch: RowsOrAuto = Field(description="rows a rank a forward")
    dtype: Literal["auto", "bf16", "fp32", "fp8"] = Field("auto", description="compute dtype")
    max_skipped: Count = Field(
        10, gt=0, description="skipped or undone steps in a row that end the run"
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay a step of a moving average of the weights, fp32, which validation and "
        "inference use; null: none",
    )
    stages: dict[StageName, StageSection] = Field({})

    @property
    def in_bf16(self) -> bool:
        """Return whether activations and gathered weights are bf16: with fp8 too, whose products
        take and give that.
        """
        return self.dtype in ("bf16", "fp8")

    @property
    def rows_a_forward(self) -> int:
        """Return ``micro_batch``; what is assumed of auto where no start has measured it."""
        return ASSUMED_ROWS if self.micro_batch == "auto" else self.micro_batch

    @model_validator(mode="after")
    def _stages_follow_one_another(self) -> Self:
        check_order(self.stages)
        return self

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(
                f"set one of steps and tokens; found steps={self.steps}, tokens={self.tokens}"
            )
        return self


class EvalSection(Strict):
    every: Count = Field(100, ge=0, description="steps between validations; 0: never")
    rows: Count | None = Field(
        512, gt=0, description="validation rows used, at most; null: all there are"
    )
    tasks: TasksSection = TasksSection()


class CheckpointSection(Strict):
    every: Count = Field(500, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: Count = Field(2, gt=0, description="newest checkpoints kept")
    keep_every: Count | None = Field(
        None, gt=0, description="checkpoints at multiples of this step are kept for good"
    )
    dir: Annotated[Text, AfterValidator(paths.expanded)] | None = Field(
        None, description="a folder or an fsspec URL; null: RUN/checkpoints"
    )
    background: bool = Field(
        True, description="write while training goes on, from a copy in the host's memory"
    )

    @model_validator(mode="after")
    def _no_password(self) -> Self:
        parts = urlsplit(self.dir or "")
        if parts.password or _LOGIN.search(parts.query):
            raise ValueError(
                "dir holds a login, which would be stored with the run; put it into the "
                "environment or into fsspec's configuration (~/.config/fsspec) instead"
            )
        return self


class HealthSection(Strict):
    """What a run does about bad steps and bad ranks."""

    spike: Literal["off", "skip", "clip", "rollback"] = Field(
        "off",
        description="a loss or gradient norm far above the last ones: skip the step, clip its "
        "gradient to their mean, or go back to the last snapshot in memory, also from a step that "
        "is not finite",
    )
    spike_window: int = Field(
        128, ge=8, le=1_000_000, description="steps whose loss and gradient norm tell what is usual"
    )
    spike_sigmas: float = Field(
        6.0, gt=0, description="standard deviations above the window's mean that are a spike"
    )
    snapshot_every: Count = Field(50, gt=0, description="rollback only: steps between snapshots")
    check_every: Count = Field(
        100, ge=0, description="steps between comparisons of what ranks share; 0: at start only"
    )
    hang_s: float = Field(
        600.0, gt=0, le=1e9, description="seconds without a step, after which all ranks end"
    )


class TrackingSection(Strict):
    enabled: bool = True
    backends: list[Text] = Field(
        ["mlflow"], description="choices of configs/tracking, one or several"
    )
    uri: str | None = Field(
        None, description="MLflow's; null: sqlite:///mlflow.db beside the run folder"
    )
    experiment: Text = Field("dnt-scale", description="MLflow's")
    system_every_s: float = Field(
        10.0, ge=0, le=1e6, description="between samples of each node's CPU, memory, GPUs; 0: none"
    )

    @field_validator("backends")
    @classmethod
    def _each_once(cls, names: list[str]) -> list[str]:
        if not names:
            raise ValueError("expected at least one; tracking.enabled=false sends nothing")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]} is there twice; expected each once")
        return names

    @model_validator(mode="after")
    def _no_login(self) -> Self:
        parts = urlsplit(self.uri or "")
        if "@" in parts.netloc or _LOGIN.search(parts.query):
            server = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            instead = (
                server
                if parts.scheme.startswith("http")
                else "PGUSER, and PGPASSWORD or a PGPASSFILE,"
            )
            raise ValueError(
                f"uri holds a login, which would be stored with the run; set {instead} instead"
            )
        return self


class RunConfig(Strict):
    """Everything that defines a run; ``config.yaml`` in the run folder is this, resolved."""

    model: AnyModel
    optim: OptimConfig
    engine: EngineConfig
    data: AnyData
    tracking: TrackingSection
    run: RunSection
    train: TrainSection
    eval: EvalSection
    checkpoint: CheckpointSection
    health: HealthSection = HealthSection()
    profile: ProfileSection = ProfileSection()
    garbage: GarbageSection = GarbageSection()
    measure: MeasureSection = MeasureSection()
    diagnose: DiagnoseSection = DiagnoseSection()

    @model_validator(mode="after")
    def _a_spike_in_the_momentum_is_only_undone(self) -> Self:
        if not self.optim.gradient_buffer and self.health.spike in ("skip", "clip"):
            raise ValueError(
                f"health.spike is {self.health.spike}, but with optim.gradient_buffer false the "
                "momentum has taken the gradient before the step can be judged; use rollback"
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_does_what_is_asked(self) -> Self:
        if not isinstance(self.engine, DeepSpeedEngineConfig):
            return self
        if not self.optim.gradient_buffer:
            raise ValueError(
                f"optim.gradient_buffer is false, but engine={self.engine.name} sums gradients in "
                "buffers of its own; use engine=fsdp, ddp or hsdp, or optim.gradient_buffer=true"
            )
        if self.train.dtype == "fp8":
            raise ValueError(
                f"train.dtype is fp8, which engine={self.engine.name} does not have; use "
                "engine=fsdp, ddp or hsdp, or train.dtype=bf16"
            )
        if self.engine.deepspeed:
            from dnt_scale.config import deepspeed_json

            deepspeed_json.check(self)
        return self

    @model_validator(mode="after")
    def _tasks_have_a_checkpoint_of_a_language_model(self) -> Self:
        tasks, saves = self.eval.tasks, self.checkpoint.every
        if not tasks.every:
            return self
        if not tasks.names:
            raise ValueError(
                f"eval.tasks.every is {tasks.every}, but eval.tasks.names is empty; name tasks, or "
                "set eval.tasks.every=0"
            )
        if not saves or tasks.every % saves:
            raise ValueError(
                f"eval.tasks.every is {tasks.every}, but it is checkpoints that are measured, and "
                f"checkpoint.every is {saves}; expected a multiple of that"
            )
        if type(self.model) is not ModelConfig:
            raise ValueError(
                f"eval.tasks.every is {tasks.every}, but model.kind is {self.model.kind}, which is "
                "no language model; set eval.tasks.every=0"
            )
        return self

    @property
    def checkpoints(self) -> Path | str:
        """The folder or URL that holds the run's checkpoints."""
        chosen = self.checkpoint.dir
        if chosen is None:
            return self.run.dir / "checkpoints"
        return chosen if "://" in chosen else Path(chosen)

    def with_micro_batch(self, rows: int | Literal["auto"]) -> Self:
        """Return the run with another ``train.micro_batch``, which no other setting depends on."""
        return self.model_copy(
            update={"train": self.train.model_copy(update={"micro_batch": rows})}
        )

    def total_steps(self, units_a_row: int, of_stages: Mapping[str, int] = {}) -> int:
        """Return the optimizer steps of the whole run; arguments and errors as of ``spans``."""
        return self.spans(units_a_row, of_stages)[-1].end

    def spans(self, units_a_row: int, of_stages: Mapping[str, int] = {}) -> Spans:
        """Return the steps of each stage (of a run without stages, one), as ``spans_of`` does.

        Args:
            units_a_row: of text, the tokens of a row.
            of_stages: the same of stages, by name, whose rows are others.
        """
        return spans_of(self, units_a_row, of_stages)
