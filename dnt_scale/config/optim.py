"""`optim.*`: the update rules, parameter groups and schedules."""

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from dnt_scale.config.base import Count, Strict

Beta = Annotated[float, Field(ge=0, lt=1)]


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
    groups: dict[str, GroupConfig] = Field({})


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
