"""The sections of a run's configuration as pydantic models, and ``RunConfig``, the whole of it.

Import them from :mod:`dnt_scale.config`, which makes them out of files and overrides.
"""

import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from dnt_scale import paths, typed

_LOGIN = re.compile(r"(?i)(^|&)[^=]*(user|password|token)[^=]*=")  # in a URL's query

Setting = Literal["S1", "S2", "S3", "S4", "S5"]


Beta = Annotated[float, Field(ge=0, lt=1)]


class ConfigError(ValueError):
    """A field of the run's configuration is wrong; the message says which and what to do, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in message))


class Strict(BaseModel):
    """Unknown fields are errors, true is no number, 1e3 is a whole one, and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        types = {name: typed.kinds(field.annotation) for name, field in cls.model_fields.items()}
        return {name: _as_number(value, types.get(name, ())) for name, value in raw.items()}


def _as_number(value: Any, found: typed.Kinds) -> Any:
    """A value for a field that may be a number: true and false are none, a text such as 1e3 is a whole one."""
    if isinstance(value, list | tuple) and typed.is_number(typed.items(found)):
        return [_as_number(each, typed.items(found)) for each in value]
    if not typed.is_number(found):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    return whole(value) if isinstance(value, str) and typed.is_whole(found) else value


def whole(text: str) -> int | str:
    """The whole number that a text such as 1e3 is; the text itself where it is none, or one of over 30 digits."""
    try:
        number = Decimal(text)
        if number.is_finite() and number.adjusted() <= 30 and number == number.to_integral_value():
            return int(number)
    except InvalidOperation:
        pass
    return text


Count = Annotated[int, Field(le=10**15)]  # of steps, rows and the like: their products still fit what they go into
Size = Annotated[int, Field(gt=0, le=1 << 20)]


RESERVED = {"mlartifacts", "mlflow.db", "mlruns"}


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", text):
        raise ValueError("expected up to 255 letters, digits, dots, _ and -, of which the first is a letter or digit")
    if text in RESERVED:
        raise ValueError("MLflow's records lie there, beside the run folders; take another name")
    return text


Place = Annotated[Path, BeforeValidator(paths.place)]
Text = Annotated[str, Field(min_length=1)]


class ModelConfig(Strict):
    """A DNT-GPT or its GPT baseline. Which norms stand where is ``setting`` (dnt.md, S1-S5)."""

    name: Text
    layers: int = Field(gt=0, le=10_000)
    width: Size
    heads: Size
    vocab_size: int = Field(gt=0, le=1 << 25)
    context: int = Field(gt=0, le=1 << 24, description="longest row the position table can hold, in tokens")
    setting: Setting = "S5"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = Field(1e-6, gt=0, description="added to the mean square")
    gain_init: float = 1.0
    final_norm: bool = True
    bias: bool = False
    positions: Literal["learned", "none"] = "learned"
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    ffn_multiple: int = Field(4, gt=0, le=1024)
    tied_head: bool = True
    init_std: float = Field(0.02, gt=0)
    residual_init_scaled: bool = Field(True, description="W_o and W_2 start 1/sqrt(2 layers) smaller")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}; change one of them")
        return self


class GroupConfig(Strict):
    """Parameters whose name matches ``pattern`` (re.search) get these values instead of the optimizer's."""

    pattern: str
    lr: float | None = Field(None, ge=0)
    weight_decay: float | None = Field(None, ge=0)
    update: Literal["plain", "row_normalized"] = "plain"


class ScheduleConfig(Strict):
    """Learning-rate factor over the run: linear warmup, then cosine or warmup-stable-decay."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: Count = Field(0, ge=0)
    final: float = Field(0.1, ge=0, le=1, description="factor at the last step")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd only: share of the run that decays")


class _OptimBase(Strict):
    lr: float = Field(ge=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float | None = Field(1.0, gt=0, description="global gradient norm; null: no clipping")
    schedule: ScheduleConfig = ScheduleConfig()
    groups: dict[str, GroupConfig] = {}


class MSGDWConfig(_OptimBase):
    """Momentum SGD with decoupled weight decay."""

    algorithm: Literal["msgdw"]
    momentum: float = Field(0.9, ge=0, lt=1)
    dampening: float = Field(0.0, ge=0, lt=1)
    nesterov: bool = False
    momentum_dtype: Literal["fp32", "bf16"] = Field("fp32", description="bf16: 2 bytes, stochastically rounded")
    gradient_buffer: bool = Field(True, description="false: backward adds each gradient to the momentum and frees it")
    clip: Literal["global", "tensor", "previous"] = Field(
        "global",
        description="what clip_norm bounds: the whole gradient; each tensor's; the whole, by the last step's norm",
    )

    @model_validator(mode="after")
    def _clipping_needs_the_gradient(self) -> Self:
        if self.gradient_buffer != (self.clip == "global") and self.clip_norm is not None:
            expected = "optim.clip=global" if self.gradient_buffer else "optim.clip=tensor or previous"
            raise ValueError(
                f"clip is {self.clip}, which does not go with gradient_buffer {self.gradient_buffer}; "
                f"set {expected}, or optim.clip_norm=null"
            )
        if self.nesterov and not self.gradient_buffer:
            raise ValueError("nesterov needs the gradient after backward; set gradient_buffer: true or nesterov: false")
        return self


class AdamWConfig(_OptimBase):
    """The baseline, torch.optim.AdamW."""

    algorithm: Literal["adamw"]
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)

    @model_validator(mode="after")
    def _no_row_update(self) -> Self:
        for name, group in self.groups.items():
            if group.update != "plain":
                raise ValueError(f"groups.{name}.update is {group.update}, which only msgdw has; use plain")
        return self


OptimConfig = Annotated[MSGDWConfig | AdamWConfig, Field(discriminator="algorithm")]


SetPath = Annotated[Place, AfterValidator(Path.absolute)]


def _not_a_measure(name: str) -> str:
    if name in ("loss", "perplexity", "bits_per_byte"):
        raise ValueError(f"a set named {name} would take the place of the metric val/{name}; give it another name")
    return name


SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100), AfterValidator(_not_a_measure)]


class MixtureEntry(Strict):
    """One set of a mixture."""

    path: SetPath = Field(description="made by `dnt data prepare`")
    weight: float = Field(
        gt=0, le=1e12, description="its part of the predicted tokens (padding is none), relative to the other sets'"
    )


class DataConfig(Strict):
    """What a run reads: the set at ``path``, or the sets of ``mixture`` by name."""

    path: SetPath | None = Field(None, description="made by `dnt data prepare`")
    mixture: dict[SetName, MixtureEntry] = {}
    document_mask: bool = Field(False, description="attention stays inside documents, where positions restart")

    @model_validator(mode="after")
    def _path_or_mixture(self) -> Self:
        if (self.path is None) != bool(self.mixture):
            raise ValueError(
                "set one of path and mixture (with a mixture, path is null); "
                f"found path={self.path} and {', '.join(self.mixture) or 'no sets'} in mixture"
            )
        return self


class _EngineBase(Strict):
    activation_checkpointing: Literal["none", "full", "selective"] | Annotated[int, Field(ge=2, le=10_000)] = Field(
        "none", description="recompute in backward: every block, all but matmuls and attention, or every n-th block"
    )
    compile: bool = Field(False, description="torch.compile each block")


class TorchEngineConfig(_EngineBase):
    """FSDP2's fully_shard on a mesh of copies by shards: ddp has one shard a copy, fsdp one copy, hsdp both."""

    name: Literal["ddp", "fsdp", "hsdp"]
    replicas: Size | None = Field(None, description="hsdp: copies of the model; null: one a node")
    reshard_after_forward: bool = Field(True, description="free a block's full weights after its forward")
    prefetch: int = Field(1, ge=0, le=10_000, description="blocks gathered ahead of the one that computes")
    cpu_offload: bool = Field(False, description="weights, gradients and optimizer state live in the host's memory")

    @model_validator(mode="after")
    def _replicas_are_of_hsdp(self) -> Self:
        if self.replicas is not None and self.name != "hsdp":
            raise ValueError(f"replicas is {self.replicas}, which only engine=hsdp has; leave it null")
        return self


class DeepSpeedEngineConfig(_EngineBase):
    """DeepSpeed ZeRO: stage 1 shards the optimizer's state, 2 the gradients too, 3 the weights too."""

    name: Literal["zero0", "zero1", "zero2", "zero3"]
    offload_optimizer: bool = Field(False, description="master weights and optimizer state live in the host's memory")
    offload_parameters: bool = Field(False, description="zero3: the weights too")
    deepspeed: dict[str, Any] = Field({}, description="DeepSpeed's own JSON, merged over what these fields make")

    @property
    def stage(self) -> int:
        return int(self.name[-1])

    @model_validator(mode="after")
    def _offload_fits_the_stage(self) -> Self:
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs a sharded optimizer; use engine=zero1, zero2 or zero3")
        if self.offload_parameters and self.stage < 3:
            raise ValueError(f"offload_parameters needs sharded weights, but name is {self.name}; use engine=zero3")
        if self.compile and self.stage == 3:
            raise ValueError(
                "compile does not go with zero3, which swaps weights in under each module; use engine=fsdp"
            )
        if self.activation_checkpointing == "selective" and self.stage == 3:
            raise ValueError(
                "activation_checkpointing is selective, but zero3 gathers weights inside of what is recomputed; "
                "use full, every n-th block, or engine=fsdp"
            )
        return self


EngineConfig = Annotated[TorchEngineConfig | DeepSpeedEngineConfig, Field(discriminator="name")]


class RunSection(Strict):
    name: Annotated[str, AfterValidator(_name)]
    dir: Place
    seed: int = Field(1234, ge=0, lt=2**64)
    device: Literal["auto", "cpu", "cuda"] = "auto"


class TrainSection(Strict):
    steps: Count | None = Field(None, gt=0)
    tokens: int | None = Field(None, gt=0, le=10**18, description="instead of steps: places in rows, padding too")
    global_batch: int = Field(gt=0, le=1 << 31, description="rows a step, over all ranks and micro-batches")
    micro_batch: int = Field(gt=0, le=1 << 31, description="rows a rank a forward")
    dtype: Literal["auto", "bf16", "fp32"] = Field("auto", description="see compute_dtype.py")
    max_skipped: Count = Field(10, gt=0, description="skipped or undone steps in a row that end the run")

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(f"set one of steps and tokens; found steps={self.steps}, tokens={self.tokens}")
        return self


class EvalSection(Strict):
    every: Count = Field(100, ge=0, description="steps between validations; 0: never")
    rows: Count = Field(512, gt=0, description="validation rows used, at most")


class CheckpointSection(Strict):
    every: Count = Field(500, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: Count = Field(2, gt=0, description="newest checkpoints kept")
    keep_every: Count | None = Field(None, gt=0, description="checkpoints at multiples of this step are kept for good")
    dir: Annotated[Text, AfterValidator(paths.expanded)] | None = Field(
        None, description="a folder or an fsspec URL; null: RUN/checkpoints"
    )
    background: bool = Field(True, description="write while training goes on, from a copy in the host's memory")

    @model_validator(mode="after")
    def _no_password(self) -> Self:
        parts = urlsplit(self.dir or "")
        if parts.password or _LOGIN.search(parts.query):
            raise ValueError(
                "dir holds a login, which would be stored with the run; put it into the environment or into fsspec's "
                "configuration (~/.config/fsspec) instead"
            )
        return self


class HealthSection(Strict):
    """What a run does about bad steps and bad ranks."""

    spike: Literal["off", "skip", "clip", "rollback"] = Field(
        "off",
        description="a loss or gradient norm far above the last ones: skip the step, clip its gradient to their "
        "mean, or go back to the last snapshot in memory, also from a step that is not finite",
    )
    spike_window: int = Field(
        128, ge=8, le=1_000_000, description="steps whose loss and gradient norm tell what is usual"
    )
    spike_sigmas: float = Field(6.0, gt=0, description="standard deviations above the window's mean that are a spike")
    snapshot_every: Count = Field(50, gt=0, description="rollback only: steps between snapshots")
    check_every: Count = Field(100, ge=0, description="steps between comparisons of what ranks share; 0: at start only")
    hang_s: float = Field(600.0, gt=0, le=1e9, description="seconds without a step, after which all ranks end")


class TrackingSection(Strict):
    enabled: bool = True
    uri: str | None = Field(None, description="null: sqlite:///mlflow.db beside the run folder")
    experiment: Text = "dnt-scale"
    system_every_s: float = Field(
        10.0, ge=0, le=1e6, description="between samples of each node's CPU, memory, GPUs; 0: none"
    )

    @model_validator(mode="after")
    def _no_login(self) -> Self:
        parts = urlsplit(self.uri or "")
        if "@" in parts.netloc or _LOGIN.search(parts.query):
            server = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            instead = server if parts.scheme.startswith("http") else "PGUSER, and PGPASSWORD or a PGPASSFILE,"
            raise ValueError(f"uri holds a login, which would be stored with the run; set {instead} instead")
        return self


class RunConfig(Strict):
    """Everything that defines a run; ``config.yaml`` in the run folder is this, resolved."""

    model: ModelConfig
    optim: OptimConfig
    engine: EngineConfig
    data: DataConfig
    tracking: TrackingSection
    run: RunSection
    train: TrainSection
    eval: EvalSection
    checkpoint: CheckpointSection
    health: HealthSection = HealthSection()

    @model_validator(mode="after")
    def _a_spike_in_the_momentum_is_only_undone(self) -> Self:
        unbuffered = isinstance(self.optim, MSGDWConfig) and not self.optim.gradient_buffer
        if unbuffered and self.health.spike in ("skip", "clip"):
            raise ValueError(
                f"health.spike is {self.health.spike}, but with optim.gradient_buffer false the momentum has taken the "
                "gradient before the step can be judged; use rollback"
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_does_what_is_asked(self) -> Self:
        if not isinstance(self.engine, DeepSpeedEngineConfig):
            return self
        if isinstance(self.optim, MSGDWConfig) and not self.optim.gradient_buffer:
            raise ValueError(
                f"optim.gradient_buffer is false, but engine={self.engine.name} sums gradients in buffers of its own; "
                "use engine=fsdp, ddp or hsdp, or optim.gradient_buffer=true"
            )
        if self.engine.deepspeed:
            from dnt_scale.engine import deepspeed_json

            deepspeed_json.check(self)
        return self

    @property
    def checkpoints(self) -> Path | str:
        """The folder or URL that holds the run's checkpoints."""
        chosen = self.checkpoint.dir
        if chosen is None:
            return self.run.dir / "checkpoints"
        return chosen if "://" in chosen else Path(chosen)

    def total_steps(self, seq_len: int) -> int:
        """Optimizer steps of the whole run; rows have ``seq_len`` predicted tokens."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return -(-self.train.tokens // (self.train.global_batch * seq_len))
