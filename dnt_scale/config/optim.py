"""`optim.*`: what every optimizer's section has, which ``algorithm`` chooses; groups, schedules.

An optimizer is a file of dnt_scale/optim/algorithms: its section is a subclass of
`OptimizerConfig`, which holds its own fields and its update rule. Whoever wants to know something
of an optimizer (engines, memory, checkpoints) asks the section.
"""

import difflib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from dnt_scale.config.base import Count, Strict

Beta = Annotated[float, Field(ge=0, lt=1)]
Storage = Literal["fp32", "bf16"]
BYTES: dict[Storage, int] = {"fp32": 4, "bf16": 2}
FOLDER = "dnt_scale.optim.algorithms"


class GroupConfig(Strict):
    """Parameters whose name matches ``pattern`` (re.search) get these values instead of the optimizer's."""

    pattern: str
    lr: float | None = Field(None, ge=0)
    weight_decay: float | None = Field(None, ge=0)
    update: str = "plain"


class ScheduleConfig(Strict):
    """Learning-rate factor over the run: linear warmup, then cosine or warmup-stable-decay."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: Count = Field(0, ge=0)
    final: float = Field(0.1, ge=0, le=1, description="factor at the last step")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd only: share of the run that decays")


class OptimizerConfig(Strict):
    """The fields that every optimizer has, and the facts that others ask of it.

    Attributes:
        updates: what ``groups.NAME.update`` may be, and how many dimensions a parameter then needs;
            0: any number.
        counters: names of scalars that the optimizer keeps for each parameter: its number of
            updates.
        state_name: what a person calls the buffers.
    """

    updates: ClassVar[Mapping[str, int]] = {"plain": 0}
    counters: ClassVar[tuple[str, ...]] = ()
    state_name: ClassVar[str] = "momentum"

    lr: float = Field(ge=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float | None = Field(1.0, gt=0, description="global gradient norm; null: no clipping")
    schedule: ScheduleConfig = ScheduleConfig()
    groups: dict[str, GroupConfig] = Field({})
    algorithm: str
    gradient_buffer: bool = Field(True, description="false: backward adds each gradient to the momentum and frees it")
    clip: Literal["global", "tensor", "previous"] = Field(
        "global",
        description="what clip_norm bounds: the whole gradient; each tensor's; the whole, by the last step's norm",
    )

    @classmethod
    def variants(cls) -> list[type["OptimizerConfig"]]:
        """Return the classes that a value of this type may have."""
        return list(algorithms().values())

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
            expected = "optim.clip=global" if self.gradient_buffer else "optim.clip=tensor or previous"
            raise ValueError(
                f"clip is {self.clip}, which does not go with gradient_buffer {self.gradient_buffer}; "
                f"set {expected}, or optim.clip_norm=null"
            )
        return self

    @model_validator(mode="after")
    def _groups_have_updates_of_this_algorithm(self) -> Self:
        for name, group in self.groups.items():
            if group.update not in self.updates:
                known = algorithms().items()
                having = [other for other, section in known if group.update in section.updates]
                who = f"only {' and '.join(having)} has" if having else "no optimizer has"
                use = " or ".join(self.updates)
                raise ValueError(f"groups.{name}.update is {group.update}, which {who}; use {use}")
        return self


_registered: dict[str, type[OptimizerConfig]] = {}
Section = TypeVar("Section", bound=OptimizerConfig)


def register(section: type[Section]) -> type[Section]:
    """Let ``optim.algorithm: NAME`` choose a class; its field ``algorithm`` is Literal[NAME]."""
    [name] = get_args(section.model_fields["algorithm"].annotation)
    _registered[name] = section
    return section


def algorithms() -> dict[str, type[OptimizerConfig]]:
    """Return all sections by name: those of the folder, and what others have registered."""
    _import_folder()
    return dict(sorted(_registered.items()))


@cache
def _import_folder() -> None:
    """Import each file of the folder, which registers it.

    They are found by name and only when they are asked for, because they themselves import this
    file. None of them imports torch before it is used.
    """
    for module in pkgutil.iter_modules(pkgutil.resolve_name(f"{FOLDER}:").__path__):
        pkgutil.resolve_name(f"{FOLDER}.{module.name}:")  # the colon: it is a module


def _of_its_algorithm(raw: Any) -> Any:
    """Validate a raw section as the class that its ``algorithm`` names."""
    if not isinstance(raw, dict):
        return raw
    known, name = algorithms(), raw.get("algorithm")
    if isinstance(name, str) and name in known:
        return known[name].model_validate(raw)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    details = InitErrorDetails(
        type=PydanticCustomError(
            "no_such_algorithm",
            "no such optimizer{nearest} There are: {known}",
            {"nearest": f"; did you mean {close[0]}?" if close else ".", "known": ", ".join(known)},
        ),
        loc=("algorithm",),
        input=name,
    )
    if "algorithm" not in raw:
        details = InitErrorDetails(type="missing", loc=("algorithm",), input=raw)
    raise ValidationError.from_exception_data("optim", [details])


OptimConfig = Annotated[SerializeAsAny[OptimizerConfig], BeforeValidator(_of_its_algorithm)]
