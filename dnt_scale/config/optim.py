"""`optim.*`: what every optimizer's section has, which ``algorithm`` chooses; groups, schedules.

An optimizer is a file of dnt_scale/optim/algorithms: its section is a subclass of
`OptimizerConfig`, which holds its own fields and its update rule. Whoever wants to know something
of an optimizer (engines, memory, checkpoints) asks the section.
"""

from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    Field,
    SerializeAsAny,
    ValidationInfo,
    WrapValidator,
    field_serializer,
    field_validator,
    model_validator,
)

from dnt_scale.config.base import Count, Size, Strict
from dnt_scale.config.kinds import Registry

Beta = Annotated[float, Field(ge=0, lt=1)]
Storage = Literal["fp32", "bf16"]
BYTES: dict[Storage, int] = {"fp32": 4, "bf16": 2}
OPTIMIZERS = Registry("optim", "dnt_scale.optim.algorithms", tag="algorithm")
SCHEDULES = Registry("optim.schedule", "dnt_scale.optim.schedules", tag="name", default="cosine")
UPDATES = Registry("optim.groups.NAME", "dnt_scale.optim.updates", tag="update", default="plain")


class Powers(NamedTuple):
    """Those of ratios by which the best learning rate grows, see `optim.scale`.

    width: of a matrix; docs/dnt.md derives it.
    batch: of tokens a step.
    """

    width: float
    batch: float


class GroupConfig(Strict):
    """Parameters whose name matches ``pattern`` (re.search), or none of the other groups', get
    these values instead of the optimizer's. ``update`` chooses the class, a file of
    dnt_scale/optim/updates, which adds the settings of its rule.

    Attributes:
        row_buffers: names of what the rule keeps of each row of a matrix, an fp32 number.
        counters: names of scalars that the rule keeps for each parameter: its number of updates.
        needs_gradient: whether a step looks at the gradient itself.
    """

    registry: ClassVar[Registry] = UPDATES
    row_buffers: ClassVar[tuple[str, ...]] = ()
    counters: ClassVar[tuple[str, ...]] = ()
    needs_gradient: ClassVar[bool] = False

    pattern: str | None = Field(
        description="a regular expression that is somewhere in a parameter's name; null: all "
        "parameters that no other group's matches",
    )
    lr: float | None = Field(None, ge=0)
    weight_decay: float | None = Field(None, ge=0)
    update: str = "plain"
    fixed_norm: bool = Field(
        False,
        description="after a step each matrix is scaled to the Frobenius norm it had before; then "
        "its weight decay is 0",
    )
    optimizer: "OptimizerConfig | None" = Field(
        None,
        description="an optimizer of the group's own: algorithm, and the keys that this one adds; "
        "lr, schedule and clipping stay where they are",
    )
    clip: Literal["none", "global", "group"] | None = Field(
        None,
        description="how the group's gradients are clipped: not at all, nor counted for others; "
        "with all others that are global; by their own norm alone. null: as optim.clip",
    )
    clip_norm: float | None = Field(None, gt=0, description="of clip: group; null: optim.clip_norm")

    @property
    def dimensions(self) -> int:
        """How many a parameter needs for the rule; 0: any number."""
        return 0

    def powers(self) -> Powers | None:
        """Return how the rule's learning rate goes with width and batch; None: it is not known."""
        return None

    @field_validator("optimizer", mode="wrap")
    @classmethod
    def _of_its_kind(cls, raw: Any, handler: Any, info: ValidationInfo) -> Any:
        """Read the section as its algorithm's, with the learning rate of the group."""
        if not isinstance(raw, dict):
            return handler(raw)
        for key in raw:
            if key in OptimizerConfig.model_fields and key != "algorithm":
                ours = key in cls.model_fields
                raise ValueError(
                    f"{key} is {'the group' if ours else 'the run'}'s: set "
                    f"optim.{'groups.NAME.' if ours else ''}{key} instead"
                )
        lr = info.data.get("lr")
        if lr is None:
            raise ValueError("a group with an optimizer of its own needs an lr of its own")
        return OPTIMIZERS.validate({**raw, "lr": lr}, handler)

    @model_validator(mode="after")
    def _a_norm_of_its_own_is_used(self) -> Self:
        if self.clip_norm is not None and self.clip != "group":
            raise ValueError(
                f"clip_norm is {self.clip_norm:g}, but clip is {self.clip or 'null'}; set "
                "clip: group, or remove clip_norm"
            )
        return self

    @field_serializer("optimizer")
    def _its_own_keys(self, optimizer: "OptimizerConfig | None") -> dict[str, Any] | None:
        theirs = set(OptimizerConfig.model_fields) - {"algorithm"}
        if optimizer is None:
            return None
        return optimizer.model_dump(mode="json", exclude=theirs)

    @model_validator(mode="after")
    def _a_fixed_norm_does_not_decay(self) -> Self:
        if self.fixed_norm and self.weight_decay:
            raise ValueError(
                f"weight_decay is {self.weight_decay:g}, but fixed_norm undoes any decay; remove "
                "one of them"
            )
        return self


AnyGroup = Annotated[SerializeAsAny[GroupConfig], WrapValidator(UPDATES.validate)]


class ScheduleConfig(Strict):
    """The learning rate's factor over the run: a linear warmup to 1, and then what a file of
    dnt_scale/optim/schedules makes of it, which ``name`` chooses.
    """

    registry: ClassVar[Registry] = SCHEDULES

    name: str = "cosine"
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the run that warms up")
    warmup_steps: Count | None = Field(
        None, ge=0, description="steps of warmup in its place; fewer than the run has"
    )
    final: float = Field(0.1, ge=0, le=1, description="factor at the last step")
    # Not in wsd.py, which alone reads it: runs on other schedules have it on record.
    decay_fraction: float = Field(
        0.2, gt=0, le=1, description="wsd only: share of the run that decays"
    )

    def after_warmup(self, step: int, first: int, last: int) -> float:
        """Return the factor of a step after warmup.

        Args:
            step: counted from 0; it may lie beyond ``last``, and has its factor then.
            first: the first step after warmup.
            last: the run's last one.
        """
        raise NotImplementedError

    def steps_before_decay(self, total_steps: int) -> int | None:
        """Return how many steps come before those that depend on where the run ends; None: all
        do.
        """
        return None

    def steps_of_warmup(self, total_steps: int) -> int:
        """Return how many of the run's steps warm up; a share leaves one step after them."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return max(0, min(round(self.warmup * total_steps), total_steps - 1))


class ScaleConfig(Strict):
    """Where the learning rates were tuned: they are scaled from there to this run. By default they
    are used as they are.
    """

    width: Size | None = Field(
        None,
        description="model.width at which the learning rates were tuned; null: not scaled by it",
    )
    batch: Count | None = Field(None, gt=0, description="tokens a step there; null: as width")
    tokens: int | None = Field(
        None, gt=0, le=10**18, description="tokens of the whole run there; null: as width"
    )

    @property
    def given(self) -> bool:
        """Whether there is anything to scale by."""
        return (self.width, self.batch, self.tokens) != (None, None, None)

    @model_validator(mode="after")
    def _a_run_it_can_be(self) -> Self:
        if self.batch and self.tokens and self.batch > self.tokens:
            raise ValueError(
                f"batch is {self.batch:,} tokens a step, but tokens, those of all steps, is "
                f"{self.tokens:,}; give tokens of at least a step"
            )
        return self


AnySchedule = Annotated[SerializeAsAny[ScheduleConfig], WrapValidator(SCHEDULES.validate)]


def _cosine() -> ScheduleConfig:
    found = SCHEDULES.validate({}, None)
    assert isinstance(found, ScheduleConfig)
    return found


class OptimizerConfig(Strict):
    """The fields that every optimizer has, and the facts that others ask of it.

    Attributes:
        takes_updates: whether ``groups.NAME.update`` may be another than plain.
        elementwise: whether an element's step looks at nothing of other elements, so that it is
            the same wherever a tensor is cut.
        counters: names of scalars that the optimizer keeps for each parameter: its number of
            updates.
        state_name: what a person calls the buffers.
    """

    registry: ClassVar[Registry] = OPTIMIZERS
    takes_updates: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True
    counters: ClassVar[tuple[str, ...]] = ()
    state_name: ClassVar[str] = "momentum"

    lr: float = Field(ge=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float | None = Field(
        1.0, gt=0, description="global gradient norm; null: no clipping"
    )
    schedule: AnySchedule = Field(default_factory=_cosine)
    groups: dict[str, AnyGroup] = Field({})
    scale: ScaleConfig = ScaleConfig()
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

    def powers(self, rule: GroupConfig) -> Powers | None:
        """Return how the learning rate goes with width and batch where ``rule`` moves the weights;
        None: it is not known.
        """
        return rule.powers() if self.takes_updates else None

    @property
    def clips_by_group(self) -> bool:
        """Whether the engine clips, group by group, rather than the judge of the whole gradient."""
        return any(group.clip in ("none", "group") for group in self.groups.values())

    @property
    def judged_clip_norm(self) -> float | None:
        """What the judge of a step clips the whole gradient to; None: it does not."""
        return None if self.clips_by_group else self.clip_norm

    @property
    def bytes_a_weight(self) -> int:
        """Return what the buffers of one weight take."""
        return sum(BYTES[storage] for storage in self.buffers().values())

    @property
    def title(self) -> str:
        """Return the algorithm and what else moves groups of parameters, for pages about a run."""
        others = {
            group.optimizer.algorithm if group.optimizer else group.update
            for group in self.groups.values()
        }
        found = sorted(others - {"plain"})
        return f"{self.algorithm} ({', '.join(found)})" if found else self.algorithm

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
        for name, group in self.groups.items():
            reason = group.optimizer.needs_gradient_buffer() if group.optimizer else None
            if group.needs_gradient:
                reason = (
                    f"{group.update} needs the gradient after backward; set gradient_buffer: true"
                )
            if not self.gradient_buffer and reason:
                raise ValueError(f"groups.{name}: {reason}")
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
    def _one_group_takes_the_rest(self) -> Self:
        rest = [name for name, group in self.groups.items() if group.pattern is None]
        if len(rest) > 1:
            raise ValueError(
                f"groups {' and '.join(rest)} have no pattern, so each would take all that no "
                "other matches; give all but one a pattern"
            )
        return self

    @model_validator(mode="after")
    def _groups_are_clipped_where_the_gradient_is_kept(self) -> Self:
        for name, group in self.groups.items():
            if group.clip is None:
                continue
            if not self.gradient_buffer or self.clip != "global":
                how = "" if self.gradient_buffer else " and gradient_buffer is false"
                raise ValueError(
                    f"groups.{name}.clip is {group.clip}, which needs the norm of gradients that "
                    f"are kept, but optim.clip is {self.clip}{how}; remove groups.{name}.clip, or "
                    "set optim.gradient_buffer=true optim.clip=global"
                )
            if group.clip != "none" and group.clip_norm is None and self.clip_norm is None:
                raise ValueError(
                    f"groups.{name}.clip is {group.clip}, but optim.clip_norm is null; set "
                    f"{f'groups.{name}.clip_norm or ' if group.clip == 'group' else ''}"
                    f"optim.clip_norm, or groups.{name}.clip: none"
                )
        return self

    @model_validator(mode="after")
    def _rates_are_scaled_by_known_powers(self) -> Self:
        if not self.scale.given:
            return self
        groups = dict(self.groups)
        if not self.takes_updates:
            groups["default"] = GroupConfig(pattern=None)
        for name, group in groups.items():
            algorithm = group.optimizer or self
            if algorithm.powers(group) is None:
                of = group.update if algorithm.takes_updates else algorithm.algorithm
                raise ValueError(
                    f"scale: how the learning rate of {of} (group {name}) goes with width and "
                    "batch is not known; remove optim.scale, or use another rule there"
                )
        return self

    @model_validator(mode="after")
    def _only_momentum_has_other_updates(self) -> Self:
        for name, group in self.groups.items():
            algorithm = group.optimizer or self
            if group.update != "plain" and not algorithm.takes_updates:
                having = [
                    other
                    for other, section in OPTIMIZERS.every().items()
                    if issubclass(section, OptimizerConfig) and section.takes_updates
                ]
                raise ValueError(
                    f"groups.{name}.update is {group.update}, which only {' and '.join(having)} "
                    f"has, and not {algorithm.algorithm}; use plain"
                )
        return self


GroupConfig.model_rebuild()
OptimConfig = Annotated[SerializeAsAny[OptimizerConfig], WrapValidator(OPTIMIZERS.validate)]
