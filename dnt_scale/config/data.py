"""`data.*`: the sets that a run reads."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from dnt_scale.config.base import Place, Strict

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
    mixture: dict[SetName, MixtureEntry] = Field({})
    document_mask: bool = Field(False, description="attention stays inside documents, where positions restart")

    @model_validator(mode="after")
    def _path_or_mixture(self) -> Self:
        if (self.path is None) != bool(self.mixture):
            raise ValueError(
                "set one of path and mixture (with a mixture, path is null); "
                f"found path={self.path} and {', '.join(self.mixture) or 'no sets'} in mixture"
            )
        return self
