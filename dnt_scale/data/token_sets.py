"""The sets of text that a run reads: one prepared set, or several by weight (``data.mixture``)."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from data_prep.shards import Manifest, load_manifest, manifest_sha256
from dnt_scale.config import ConfigError, DataConfig

# what the weights of a mixture are scaled to add up to: products with it fit int64
SHARES = 1 << 30


@dataclass(frozen=True)
class TokenSet:
    """A prepared set. It gives the part ``weight`` of a run's tokens, which takes ``share`` of its
    rows in the sum of all sets' shares. Where a stage of a run goes on with it, its order is that
    of the stage that began it, ``order``, from position ``passed`` on."""

    name: str  # empty: the one set of data.path
    folder: Path
    manifest: Manifest
    share: int = SHARES
    weight: float = 1.0
    passed: int = 0
    order: str | None = None  # the name that it had there; None: its own

    @property
    def field(self) -> str:
        """The configuration's key for this set's folder."""
        return f"data.mixture.{self.name}.path" if self.name else "data.path"

    def shuffle_seed(self, seed: int) -> int:
        """The seed of this set's own order, below 2^64: ``seed`` for a set alone, another for
        each of a mixture.
        """
        name = self.name if self.order is None else self.order
        if not name:
            return seed
        return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


# The largest share first, equal ones by name, so that their order in a file is nothing.
TokenSets = tuple[TokenSet, ...]


def load_sets(data: DataConfig) -> TokenSets:
    """The sets that a run reads, which agree in tokenizer, row length and dtype.

    Raises:
        ValueError: a set is damaged, or does not go together with the first one; the message names
            both.
    """
    if data.path is not None:
        return (TokenSet("", data.path, load_manifest(data.path)),)
    manifests = {name: load_manifest(entry.path) for name, entry in data.mixture.items()}
    weights = weights_of(data)
    rows = {name: weight / tokens_a_place(manifests[name]) for name, weight in weights.items()}
    total = math.fsum(rows.values())
    sets = [
        TokenSet(
            name,
            entry.path,
            manifests[name],
            max(1, round(rows[name] / total * SHARES)),
            weights[name],
        )
        for name, entry in data.mixture.items()
    ]
    first, *others = sets = sorted(sets, key=lambda found: (-found.share, found.name))
    for other in others:
        for what, expected, found in zip(
            ("tokenizer (sha256)", "seq_len", "eos_id", "dtype"),
            _shape(first),
            _shape(other),
            strict=True,
        ):
            if found != expected:
                raise ConfigError(
                    f"{other.field}: {other.folder} has {what} {found}, but {first.folder} "
                    f"({first.name}) has "
                    f"{expected}; prepare both with the same --tokenizer and --seq-len"
                )
    return tuple(sets)


def any_set(data: DataConfig) -> TokenSets:
    """The first of a run's sets that loads, for what all of them share. Raises ValueError: why the
    first does not, when none does."""
    failures = []
    for one in [data.at(entry.path) for entry in data.mixture.values()] or [data]:
        try:
            return load_sets(one)
        except (ValueError, OSError) as error:
            failures.append(error)
    raise failures[0]


def weights_of(data: DataConfig) -> dict[str, float]:
    """The weights of a mixture by name, as parts of 1."""
    return {found.name: found.weight for found in data.sets() if found.name}


def tokens_a_place(manifest: Manifest) -> float:
    """The mean number of tokens that a place of a training row predicts, 1 or less: padding
    predicts none.
    """
    split = manifest.splits["train"]
    return split.tokens / (split.rows * manifest.seq_len) if manifest.packing == "best_fit" else 1.0


def _shape(found: TokenSet) -> tuple[str, int, int, str]:
    manifest = found.manifest
    return manifest.tokenizer.sha256[:12], manifest.seq_len, manifest.eos_id, manifest.dtype


def identity(sets: TokenSets) -> str:
    """Hex SHA-256 of what decides the rows and their order, but for the seed: of a set alone its
    manifest's, of a mixture that of the sets' names, shares and manifests. Raises ValueError if a
    manifest is gone."""
    hashes = manifests_of(sets)
    if not sets[0].name:
        return hashes[""]
    parts = [[found.name, found.share, hashes[found.name]] for found in sets]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def manifests_of(sets: TokenSets) -> dict[str, str]:
    """Hex SHA-256 of the sets' manifests, by name. Raises ValueError if one is gone."""
    return {found.name: manifest_sha256(found.folder) for found in sets}
