"""What a run reads, as the loop, resume, validation and inference ask for it, whatever its rows
hold.

A row is what the order of data, batches and budgets count: some token ids, an image with its label.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dnt_scale.config import ConfigError, DataSection, RunConfig, Unit
from dnt_scale.data.stream import Stream
from dnt_scale.model.batch import Batch


class DataPart(NamedTuple):
    """One of the sets behind a source."""

    name: str  # empty where it is the only one
    field: str  # the configuration's key that names it
    place: Path | str
    sha256: str  # of all that decides its rows


class Passed(NamedTuple):
    """How far the stages of a run have come in a set."""

    order: str  # the name that the set had where the run began it: its order may depend on it
    rows: int


class Missing(NamedTuple):
    """What a source lacks, for a message."""

    field: str
    what: str
    remedy: str


class Source(Protocol):
    """Rows in an endless order for training, and held-out rows for validation.

    Inherit from it to have the methods that are written here; a source adds ``unit``, ``rows``,
    ``parts``, ``stream`` and ``validation``.
    """

    unit: Unit  # what rows count towards train.tokens, and speed
    rows: Any  # what a row is, of a class that models name as ``reads``

    def parts(self) -> list[DataPart]:
        """Return the sets, as they are now. Raises ValueError if one is gone."""
        ...

    def stream(
        self, *, seed: int, global_batch: int, rank: int, world_size: int, consumed_rows: int = 0
    ) -> Stream:
        """Return this rank's slices of the global batches from row ``consumed_rows`` of the order
        on.

        The row at a position of the order is a function of (source, seed, position) alone, whoever
        asks: so the same rows are seen on any number of ranks, and across resumes.

        Raises:
            ValueError: the ranks cannot share the global batch equally.
        """
        ...

    def passed(self, rows: int) -> dict[str, Passed]:
        """Return how far each set is after so many rows of the order, by the SHA-256 of
        ``parts``; rows that were passed before count.
        """
        return {}

    def after(self, passed: Mapping[str, Passed]) -> "Source":
        """Return the source of a run's later stage: sets that an earlier one has read, by their
        SHA-256, go on where they were left. One that cannot begins at the beginning.
        """
        return self

    def validation(
        self, *, rows: int | None, micro_batch: int, rank: int, world_size: int
    ) -> dict[str, Iterator[Batch]]:
        """Return held-out batches of each set by name, at most ``rows`` rows of it (None: all), for
        this rank.

        Every rank gets as many batches as the others, for the engines' collectives; over all ranks
        each row comes once. What fills a batch up must not count in the model's loss.
        """
        ...

    def validation_metrics(self, means: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return what is told of a validation, ``val/...``, from the means of each set's measures;
        ``loss`` is one.
        """
        [(_, only)] = means.items()
        return {f"val/{measure}": mean for measure, mean in only.items()}

    def validation_line(self, metrics: Mapping[str, float | None]) -> str:
        """Return what a person sees of ``validation_metrics``: the loss, and what else there is."""
        found = [
            (name.removeprefix("val/").replace("_", " "), value)
            for name, value in metrics.items()
            if name.startswith("val/") and name.count("/") == 1 and value is not None
        ]
        return ", ".join(f"{name} {value:.4f}" for name, value in found)

    def identity(self) -> str:
        """Return the hex SHA-256 of what decides the rows and their order, but for the seed. Raises
        as ``parts``.
        """
        parts = self.parts()
        if len(parts) == 1 and not parts[0].name:
            return parts[0].sha256
        return hashlib.sha256(
            json.dumps([[part.name, part.sha256] for part in parts]).encode()
        ).hexdigest()

    def facts(self) -> dict[str, str]:
        """Return SHA-256 hashes, as NAME_sha256, of what the model's weights depend on for their
        meaning.
        """
        return {}

    def foreign(self, facts: Mapping[str, Any], newest: Path | str) -> str | None:
        """Say how this is not data for the checkpoint ``newest`` that has these ``facts``; None
        where it is.
        """
        for name, found in self.facts().items():
            if found != (wanted := str(facts.get(name, found))):
                what = name.removesuffix("_sha256").replace("_", " ")
                return (
                    f"made with another {what} (sha256 {found[:12]}) than {newest} (sha256 "
                    f"{wanted[:12]})"
                )
        return None

    def difference(self, trained: DataSection, parts: Mapping[str, str], newest: Path | str) -> str:
        """Say what is not as the checkpoint ``newest`` has it, whose sets had these SHA-256 by
        name.
        """
        found = self.parts()
        changed = [
            part for part in found if parts.get(part.name, part.sha256) != part.sha256
        ] or found
        return " or ".join(
            f"{part.field}: the manifest of {part.place} is not the one that {newest} was trained "
            "on"
            for part in changed
        )

    def no_validation(self) -> Missing | None:
        """Return what has no held-out rows, if anything has none."""
        return None

    def epochs(self, rows: int) -> str:
        """Say how often so many rows of a run pass the data."""
        return f"{rows:,} rows"

    def describe(self) -> list[str]:
        """Return a line for each set."""
        return [f"{part.name} {part.place}".strip() for part in self.parts()]

    def notes(self, run: RunConfig) -> list[str]:
        """Return what a person should know who trains ``run`` on this, a line each."""
        return []

    def rows_behind(self, seed: int, first: int, last: int) -> dict[str, object]:
        """Return where the rows at positions [first, last) of the order lie, so that a person can
        look at them.
        """
        return {"positions": [first, last]}


def load_source(run: RunConfig) -> Source:
    """Return the source of a run, which fits its model.

    Raises:
        ValueError: a set is damaged, or a field of the configuration does not fit it; the message
            names both.
    """
    source: Source = run.data.open()
    if not isinstance(source.rows, run.model.reads):
        raise ConfigError(
            f"model.kind is {run.model.kind}, which does not read the rows of "
            f"data.kind={run.data.kind}; choose a model= and a data= that go together"
        )
    run.model.check(source.rows)
    if run.train.tokens is not None and source.unit.name != "tokens":
        raise ConfigError(
            f"train.tokens is {run.train.tokens}, but data.kind={run.data.kind} has "
            f"{source.unit.name}; set train.steps instead"
        )
    if run.eval.every and (missing := source.no_validation()):
        raise ConfigError(
            f"{missing.field}: eval.every is {run.eval.every}, but {missing.what}; set "
            f"eval.every=0 or {missing.remedy}"
        )
    return source


def check_parts(source: Source, wanted: Mapping[str, str]) -> None:
    """For every rank: that the sets it sees are those that rank 0 decided on, wherever they lie.

    Raises:
        ConfigError: another manifest than on rank 0.
    """
    for part in source.parts():
        if part.sha256 != (first := wanted.get(part.name, part.sha256)):
            raise ConfigError(
                f"{part.field}: {part.place} has another manifest here (sha256 {part.sha256[:12]}) "
                f"than on rank 0 (sha256 {first[:12]}); copy the set to every node again"
            )
