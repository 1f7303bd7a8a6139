"""`data.*`: what a source of any kind has, and the kind `tokens`: the sets of text that a run
reads.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    Field,
    SerializeAsAny,
    WrapValidator,
    model_validator,
)

from dnt_scale.config.base import ConfigError, Place, Strict
from dnt_scale.config.kinds import Registry, resolved

SetPath = Annotated[Place, AfterValidator(Path.absolute)]
MANIFEST = "manifest.json"  # The file by which a folder is known to be a set.

SOURCES = Registry("data", "dnt_scale.data", default="tokens")


@dataclass(frozen=True)
class Unit:
    """What the rows of a source are counted in, for budgets and speed."""

    name: str  # plural: "tokens", "images"
    a_row: int  # how many of them a row has

    def of(self, rows: int) -> int:
        """Return how many of them so many rows have."""
        return rows * self.a_row


class NamedSet(NamedTuple):
    """A set of a source: its name (empty where it is the only one), its part of the units, its
    folder.
    """

    name: str
    weight: float
    path: Path


class DataSection(Strict):
    """What every kind of source has. A kind is a subclass, with ``kind: Literal["..."] = "..."``,
    that ``SOURCES.register`` is given, from ``dnt_scale/data/KIND.py`` or from a file of one's
    own.
    """

    registry: ClassVar[Registry] = SOURCES
    fixed: ClassVar[tuple[str, ...]] = ()  # Fields that a resume may not change.

    kind: str

    def open(self) -> Any:
        """Return the source, a ``dnt_scale.data.sources.Source``. Raises ValueError where a set is
        damaged.
        """
        raise NotImplementedError

    def at(self, path: Path) -> Self:
        """Return the section that reads the set at ``path`` instead. Raises ConfigError for a kind
        without sets.
        """
        raise ConfigError(
            f"--data {path}: data.kind is {self.kind}, which reads no sets; leave it out"
        )

    def sets(self) -> list[NamedSet]:
        """Return the sets that are read; the weights add up to 1. None of a kind that reads no
        sets.
        """
        return []

    def gone(self) -> list[Path]:
        """Return the folders that hold no set, of those that are to be read."""
        return [found.path for found in self.sets() if not (found.path / MANIFEST).is_file()]


AnyData = Annotated[SerializeAsAny[DataSection], WrapValidator(SOURCES.validate)]


@dataclass(frozen=True)
class TokenRows:
    """What rows of token ids are: what a language model has to fit."""

    folder: Path  # of one of the sets, for messages; all agree in the rest
    vocab_size: int
    seq_len: int
    document_eos: int | None  # attention stays between these tokens; None: a row is one text


def _not_a_measure(name: str) -> str:
    if name in ("loss", "perplexity", "bits_per_byte"):
        raise ValueError(
            f"a set named {name} would take the place of the metric val/{name}; give it another "
            "name"
        )
    return name


SetName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100),
    AfterValidator(_not_a_measure),
]


class MixtureEntry(Strict):
    """One set of a mixture."""

    path: SetPath = Field(description="made by `dnt data prepare`")
    weight: float = Field(
        gt=0,
        le=1e12,
        description="its part of the predicted tokens (padding is none), relative to the other "
        "sets'",
    )


@SOURCES.register
class DataConfig(DataSection):
    """Rows of token ids: the set at ``path``, or the sets of ``mixture`` by name."""

    fixed: ClassVar[tuple[str, ...]] = ("document_mask",)

    kind: Literal["tokens"] = "tokens"
    path: SetPath | None = Field(None, description="made by `dnt data prepare`")
    mixture: dict[SetName, MixtureEntry] = Field({})
    document_mask: bool = Field(
        False, description="attention stays inside documents, where positions restart"
    )

    @model_validator(mode="after")
    def _path_or_mixture(self) -> Self:
        if (self.path is None) != bool(self.mixture):
            raise ValueError(
                "set one of path and mixture (with a mixture, path is null); "
                f"found path={self.path} and {', '.join(self.mixture) or 'no sets'} in mixture"
            )
        return self

    def open(self) -> Any:
        return resolved("dnt_scale.data.tokens:open_tokens")(self)

    def at(self, path: Path) -> Self:
        return self.model_validate({"path": path, "document_mask": self.document_mask})

    def sets(self) -> list[NamedSet]:
        if self.path is not None:
            return [NamedSet("", 1.0, self.path)]
        total = math.fsum(entry.weight for entry in self.mixture.values())
        return [
            NamedSet(name, entry.weight / total, entry.path) for name, entry in self.mixture.items()
        ]
