"""`optim.*`: what every optimizer's section has, which ``algorithm`` chooses; groups, schedules.

An optimizer is a file of dnt_scale/optim/algorithms: its section is a subclass of
`OptimizerConfig`, which holds its own fields and its update rule. Whoever wants to know something
of an optimizer (engines, memory, checkpoints) asks the section.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, WrapValidator, model_validator

from dnt_scale.config.base import Count, Strict
from dnt_scale.config.kinds import Registry

Beta = Annotated[float, Field(ge=0, lt=1)]
Storage = Literal["fp32", "bf16"]
BYTES: dict[Storage, int] = {"fp32": 4, "bf16": 2}
OPTIMIZERS = Registry("optim", "dnt_scale.optim.algorithms", tag="algorithm")
UPDATES = Registry("optim.groups.NAME", "dnt_scale.optim.updates", tag="update", default="plain")


class GroupConfig(Strict):
    """Parameters whose name matches ``pattern`` (re.search) get these values instead of the
    optimizer's. ``update`` chooses the class, a file of dnt_scale/optim/updates, which adds the
    settings of its rule.

    Attributes:
        dimensions: how many a parameter needs for the rule; 0: any number.
    """

    registry: ClassVar[Registry] = UPDATES
    dimensions: ClassVar[int] = 0

    pattern: str
    lr: float | None = Field(None, ge=0)
    weight_decay: float | None = Field(None, ge=0)
    update: str = "plain"


AnyGroup = Annotated[SerializeAsAny[GroupConfig], WrapValidator(UPDATES.validate)]


class ScheduleConfig(Strict):
    """Learning-rate factor over the run: linear warmup, then cosine or warmup-stable-decay."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: Count = Field(0, ge=0)
    final: float = Field(0.1, ge=0, le=1, description="factor at the last step")
    decay_fraction: float = Field(
        0.2, gt=0, le=1, description="wsd only: share of the run that decays"
    )


class OptimizerConfig(Strict):
    """The fields that every optimizer has, and the facts that others ask of it.

    Attributes:
        takes_updates: whether ``groups.NAME.update`` may be another than plain.
        counters: names of scalars that the optimizer keeps for each parameter: its number of
            updates.
        state_name: what a person calls the buffers.
    """

    registry: ClassVar[Registry] = OPTIMIZERS
    takes_updates: ClassVar[bool] = False
    counters: ClassVar[tuple[str, ...]] = ()
    state_name: ClassVar[str] = "momentum"

    lr: float = Field(ge=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float | None = Field(
        1.0, gt=0, description="global gradient norm; null: no clipping"
    )
    schedule: ScheduleConfig = ScheduleConfig()
    groups: dict[str, AnyGroup] = Field({})
    algorithm: str
    gradient_buffer: bool = Field(
        True, description="false: backward adds each gradient to the momentum and frees it"
    )
    clip: Literal["global", "tensor", "previous"] = Field(
        "global",
        description="what clip_norm bounds: the whole gradient; each tensor's; the whole, by the "
        "last step's norm",
    )

    def buffers(self) -> dict[str, Storage]:
        """Return a parameter's buffers, each of its shape: name in checkpoints, storage."""
        raise NotImplementedError

    @property
    def bytes_a_weight(self) -> int:
        """Return what the buffers of one weight take."""
        return sum(BYTES[storage] for storage in self.buffers().values())

    def describe(self) -> str:
        """Return the algorithm's own settings in words, for the run's page."""
        raise NotImplementedError

    def needs_gradient_buffer(self) -> str | None:
        """Return why ``gradient_buffer: false`` cannot be, and what to set; None where it can.

        It can where the momentum is a sum of gradients, to which backward may add one after the
        other, and where the weights then move by the momentum alone.
        """
        return f"{self.algorithm} needs the gradient after backward; set gradient_buffer: true"

    @model_validator(mode="after")
    def _gradients_are_kept_where_they_are_needed(self) -> Self:
        if not self.gradient_buffer and (reason := self.needs_gradient_buffer()):
            raise ValueError(reason)
        if self.gradient_buffer != (self.clip == "global") and self.clip_norm is not None:
            expected = (
                "optim.clip=global" if self.gradient_buffer else "optim.clip=tensor or previous"
            )
            raise ValueError(
                f"clip is {self.clip}, which does not go with gradient_buffer "
                f"{self.gradient_buffer}; set {expected}, or optim.clip_norm=null"
            )
        return self

    @model_validator(mode="after")
    def _only_momentum_has_other_updates(self) -> Self:
        for name, group in self.groups.items():
            if group.update != "plain" and not self.takes_updates:
                having = [
                    other
                    for other, section in OPTIMIZERS.every().items()
                    if issubclass(section, OptimizerConfig) and section.takes_updates
                ]
                raise ValueError(
                    f"groups.{name}.update is {group.update}, which only {' and '.join(having)} "
                    f"has, and not {self.algorithm}; use plain"
                )
        return self


OptimConfig = Annotated[SerializeAsAny[OptimizerConfig], WrapValidator(OPTIMIZERS.validate)]
