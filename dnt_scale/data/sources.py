"""What a run reads: one prepared set, or several by weight (``data.mixture``)."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from data_prep.shards import Manifest, load_manifest, manifest_sha256
from dnt_scale.config import ConfigError, DataConfig, RunConfig

SHARES = 1 << 30  # what the weights of a mixture are scaled to add up to: products with it fit int64


@dataclass(frozen=True)
class Source:
    """A prepared set. It gives the part ``weight`` of a run's tokens, which takes ``share`` of its rows in the sum of
    all sources' shares."""

    name: str  # empty: the one set of data.path
    folder: Path
    manifest: Manifest
    share: int = SHARES
    weight: float = 1.0

    @property
    def field(self) -> str:
        """The configuration's key for this set's folder."""
        return f"data.mixture.{self.name}.path" if self.name else "data.path"

    def shuffle_seed(self, seed: int) -> int:
        """The seed of this set's own order, below 2^64: ``seed`` for a set alone, another for each of a mixture."""
        if not self.name:
            return seed
        return int.from_bytes(hashlib.sha256(f"{seed}/{self.name}".encode()).digest()[:8], "little")


Sources = tuple[Source, ...]  # the largest share first, equal ones by name, so that their order in a file is nothing


def load_sources(data: DataConfig) -> Sources:
    """The sets that a run reads, which agree in tokenizer, row length and dtype.

    Raises:
        ValueError: a set is damaged, or does not go together with the first one; the message names both.
    """
    if data.path is not None:
        return (Source("", data.path, load_manifest(data.path)),)
    manifests = {name: load_manifest(entry.path) for name, entry in data.mixture.items()}
    weights = weights_of(data)
    rows = {name: weight / tokens_a_place(manifests[name]) for name, weight in weights.items()}
    total = math.fsum(rows.values())
    sources = [
        Source(name, entry.path, manifests[name], max(1, round(rows[name] / total * SHARES)), weights[name])
        for name, entry in data.mixture.items()
    ]
    first, *others = sources = sorted(sources, key=lambda source: (-source.share, source.name))
    for source in others:
        for what, expected, found in zip(
            ("tokenizer (sha256)", "seq_len", "eos_id", "dtype"), _shape(first), _shape(source), strict=True
        ):
            if found != expected:
                raise ConfigError(
                    f"{source.field}: {source.folder} has {what} {found}, but {first.folder} ({first.name}) has "
                    f"{expected}; prepare both with the same --tokenizer and --seq-len"
                )
    return tuple(sources)


def any_source(data: DataConfig) -> Sources:
    """The first of a run's sets that loads, for what all of them share. Raises ValueError: why the first does not, when
    none does."""
    failures = []
    for one in [DataConfig(path=entry.path) for entry in data.mixture.values()] or [data]:
        try:
            return load_sources(one)
        except (ValueError, OSError) as error:
            failures.append(error)
    raise failures[0]


def weights_of(data: DataConfig) -> dict[str, float]:
    """The weights of a mixture by name, as parts of 1."""
    total = math.fsum(entry.weight for entry in data.mixture.values())
    return {name: entry.weight / total for name, entry in data.mixture.items()}


def tokens_a_place(manifest: Manifest) -> float:
    """The mean number of tokens that a place of a training row predicts, 1 or less: padding predicts none."""
    split = manifest.splits["train"]
    return split.tokens / (split.rows * manifest.seq_len) if manifest.packing == "best_fit" else 1.0


def _shape(source: Source) -> tuple[str, int, int, str]:
    manifest = source.manifest
    return manifest.tokenizer.sha256[:12], manifest.seq_len, manifest.eos_id, manifest.dtype


def fitting_sources(run: RunConfig) -> Sources:
    """The run's sets. Raises ValueError when one is damaged, or naming the field that does not fit it."""
    sources = load_sources(run.data)
    manifest, path = sources[0].manifest, sources[0].folder
    if manifest.tokenizer.vocab_size > run.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {run.model.vocab_size}, but the shards in {path} have "
            f"{manifest.tokenizer.vocab_size} token ids; set model.vocab_size={manifest.tokenizer.vocab_size} or more"
        )
    if manifest.seq_len > run.model.context:
        raise ConfigError(
            f"model.context is {run.model.context}, but the rows in {path} have {manifest.seq_len} tokens; "
            f"set model.context={manifest.seq_len} or prepare with --seq-len {run.model.context}"
        )
    for source in sources:
        if run.eval.every and "val" not in source.manifest.splits:
            raise ConfigError(
                f"{source.field}: eval.every is {run.eval.every}, but {source.folder} has no validation split; "
                "set eval.every=0 or prepare with --val-fraction above 0"
            )
    return sources


def identity(sources: Sources) -> str:
    """Hex SHA-256 of what decides the rows and their order, but for the seed: of a set alone its manifest's, of a
    mixture that of the sets' names, shares and manifests. Raises ValueError if a manifest is gone."""
    hashes = manifests_of(sources)
    if not sources[0].name:
        return hashes[""]
    parts = [[source.name, source.share, hashes[source.name]] for source in sources]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def manifests_of(sources: Sources) -> dict[str, str]:
    """Hex SHA-256 of the sets' manifests, by name. Raises ValueError if one is gone."""
    return {source.name: manifest_sha256(source.folder) for source in sources}
