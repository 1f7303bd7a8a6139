"""The source of text, ``data.kind: tokens``: shards in, rows of token ids out, in an order that is
a pure function.

1. An epoch visits every row of a split once. Its blocks (tar members of up to 512 rows) are
   permuted.
2. ``WINDOW_BLOCKS`` consecutive blocks of that permutation form a window, whose rows are permuted.
3. Position p of the endless sequence is row p mod rows of epoch p div rows: ``row_at``.
4. Of several sets, position p is the next row of the one that ``deal`` names; each has its own
   epochs and seed. In a later stage of a run a set goes on at its own position
   (``TokenSet.passed``).
5. Ranks slice it as :mod:`dnt_scale.data.stream` says; a thread reads rows by offset ahead of the
   training step.

Both permutations are argsorts of Philox output keyed by (seed, epoch, window): numpy keeps a bit
generator's raw stream fixed across versions, and no global generator is touched.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnt_scale.config import DataConfig, DataSection, RunConfig, TokenRows, Unit
from dnt_scale.data.order import Order, block_rows, dealt, rows_from
from dnt_scale.data.rows import OpenFiles, RowReader, files_for, token_ids
from dnt_scale.data.sources import DataPart, Missing, Passed, Source
from dnt_scale.data.stream import Stream
from dnt_scale.data.token_sets import (
    TokenSet,
    TokenSets,
    identity,
    load_sets,
    manifests_of,
    weights_of,
)
from dnt_scale.model.batch import IGNORED, Batch


def open_tokens(data: DataConfig) -> "TokenSource":
    """Return the source of a configuration. Raises ValueError as ``load_sets`` does."""
    return TokenSource(data, load_sets(data))


class TokenSource(Source):
    """Rows of token ids out of prepared sets.

    A batch is int64 (rows, seq_len + 1), ``IGNORED`` where a row holds padding.

    Args:
        sets: of the same tokenizer, row length and dtype, as ``load_sets`` gives them.
    """

    def __init__(self, data: DataConfig, sets: TokenSets) -> None:
        manifest = sets[0].manifest
        self.data = data
        self.sets = sets
        self.unit = Unit("tokens", manifest.seq_len)
        self.rows = TokenRows(
            folder=sets[0].folder,
            vocab_size=manifest.tokenizer.vocab_size,
            seq_len=manifest.seq_len,
            document_eos=manifest.eos_id if data.document_mask else None,
        )

    def parts(self) -> list[DataPart]:
        hashes = manifests_of(self.sets)
        return [
            DataPart(found.name, found.field, found.folder, hashes[found.name])
            for found in self.sets
        ]

    def identity(self) -> str:
        return identity(self.sets)

    def facts(self) -> dict[str, str]:
        return {"tokenizer_sha256": self.sets[0].manifest.tokenizer.sha256}

    def foreign(self, facts: Mapping[str, Any], newest: Path | str) -> str | None:
        found = super().foreign(facts, newest)
        return found and f"{found}; prepare it with --tokenizer"

    def difference(self, trained: DataSection, parts: Mapping[str, str], newest: Path | str) -> str:
        assert isinstance(trained, DataConfig)
        before, now = weights_of(trained), weights_of(self.data)
        if before.keys() != now.keys() or not all(
            math.isclose(before[name], now[name], rel_tol=1e-6) for name in now
        ):
            return (
                f"data.mixture: {newest} was trained on {in_words(trained)}, this run asks for "
                f"{in_words(self.data)}"
            )
        return super().difference(trained, parts, newest)

    def stream(
        self, *, seed: int, global_batch: int, rank: int, world_size: int, consumed_rows: int = 0
    ) -> Stream:
        return token_stream(
            self.sets,
            seed=seed,
            global_batch=global_batch,
            rank=rank,
            world_size=world_size,
            consumed_rows=consumed_rows,
        )

    def passed(self, rows: int) -> dict[str, Passed]:
        hashes = manifests_of(self.sets)
        counts = dealt([found.share for found in self.sets], rows)
        return {
            hashes[found.name]: Passed(
                found.name if found.order is None else found.order, found.passed + count
            )
            for found, count in zip(self.sets, counts, strict=True)
        }

    def after(self, passed: Mapping[str, Passed]) -> "TokenSource":
        hashes = manifests_of(self.sets)
        sets = [
            replace(found, order=before.order, passed=before.rows)
            if (before := passed.get(hashes[found.name]))
            else found
            for found in self.sets
        ]
        return TokenSource(self.data, tuple(sets))

    def validation(
        self, *, rows: int | None, micro_batch: int, rank: int, world_size: int
    ) -> dict[str, Iterator[Batch]]:
        return {
            found.name: validation_batches(
                found,
                rows=rows or found.manifest.splits["val"].rows,
                micro_batch=micro_batch,
                rank=rank,
                world_size=world_size,
            )
            for found in self.sets
        }

    def no_validation(self) -> Missing | None:
        for found in self.sets:
            if "val" not in found.manifest.splits:
                what = f"{found.folder} has no validation split"
                return Missing(found.field, what, "prepare with --val-fraction above 0")
        return None

    def validation_metrics(self, means: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return loss in nats a token, perplexity, and bits a byte of UTF-8 text, from each set's
        own loss.

        ``val/loss`` is the mean over the sets by the mixture's weights, which are of tokens;
        perplexity and bits a byte are of text mixed in these proportions. Of a mixture,
        ``val/NAME/loss`` and the like are each set's own.
        """
        splits = [found.manifest.splits["val"] for found in self.sets]
        bytes_a_token = [split.text_bytes / split.tokens for split in splits]
        own = [means[found.name] for found in self.sets]

        def mean(values: list[float]) -> float:
            return math.fsum(
                found.weight * value for found, value in zip(self.sets, values, strict=True)
            )

        mixed = {measure: mean([each[measure] for each in own]) for measure in own[0]}
        metrics = text_measures("val", mixed, mean(bytes_a_token))
        for found, measures, size in zip(self.sets, own, bytes_a_token, strict=True):
            if found.name:
                metrics |= text_measures(f"val/{found.name}", measures, size)
        return metrics

    def validation_line(self, metrics: Mapping[str, float | None]) -> str:
        loss, perplexity, bits = (
            metrics[f"val/{name}"] for name in ("loss", "perplexity", "bits_per_byte")
        )
        own = [
            (name.split("/"), value) for name, value in metrics.items() if name.startswith("val/")
        ]
        sets = [f"{names[1]} {value:.4f}" for names, value in own if names[2:] == ["loss"]]
        line = f"loss {loss:.4f}, perplexity {perplexity:.2f}, {bits:.4f} bits per byte"
        return f"{line} ({', '.join(sets)})" if sets else line

    def epochs(self, rows: int) -> str:
        a_share = rows / sum(found.share for found in self.sets)
        passes = [
            (found.name, a_share * found.share / found.manifest.splits["train"].rows)
            for found in self.sets
        ]
        return ", ".join(f"{count:.2f} epochs{name and ' of '}{name}" for name, count in passes)

    def describe(self) -> list[str]:
        lines = []
        for found in self.sets:
            share = f"{found.name} ({found.weight:.1%} of the tokens) " if found.name else ""
            tokens = found.manifest.splits["train"].tokens
            lines.append(f"{share}{found.folder}: {tokens:,} tokens")
        return lines

    def notes(self, run: RunConfig) -> list[str]:
        used = self.rows.vocab_size
        if (unused := getattr(run.model, "vocab_size", 0) - used) <= used:
            return []
        return [
            f"model.vocab_size: {unused:,} rows are never used, for the tokenizer has {used:,} "
            "pieces only"
        ]

    def rows_behind(self, seed: int, first: int, last: int) -> dict[str, object]:
        """Return where the rows at positions [first, last) lie, so that a person can look at their
        text.

        Returns:
            ``positions``: [first, last]; ``rows``: for each member of a shard that has some of
            them, in the order of sets, shards and members, its set's folder, shard, member, and
            rows in it, ascending.
        """
        orders = [
            Order(block_rows(found.manifest.splits["train"]), found.shuffle_seed(seed))
            for found in self.sets
        ]
        source, blocks, rows = rows_from(
            [found.share for found in self.sets],
            orders,
            first,
            last - first,
            [found.passed for found in self.sets],
        )
        places = []
        for index, found in enumerate(self.sets):
            shards = found.manifest.splits["train"].shards
            members = [(shard.file, part.name) for shard in shards for part in shard.members]
            for block in np.unique(blocks[source == index]).tolist():
                shard_file, member = members[block]
                here = np.sort(rows[(source == index) & (blocks == block)]).tolist()
                places.append(
                    {"set": str(found.folder), "shard": shard_file, "member": member, "rows": here}
                )
        return {"positions": [first, last], "rows": places}


def in_words(data: DataConfig) -> str:
    """Return the names and weights of a mixture."""
    weights = weights_of(data)
    return (
        ", ".join(f"{name} {weights[name]:.6g}" for name in sorted(weights)) or "data.path, one set"
    )


def text_measures(
    prefix: str, means: Mapping[str, float], bytes_a_token: float
) -> dict[str, float]:
    """Return the measures of some text with what follows from its loss, named
    ``PREFIX/MEASURE``.
    """
    loss = means["loss"]
    more = {
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) / bytes_a_token,
    }
    return {f"{prefix}/{measure}": value for measure, value in {**means, **more}.items()}


def token_stream(
    sets: TokenSets,
    *,
    seed: int,
    global_batch: int,
    rank: int,
    world_size: int,
    consumed_rows: int = 0,
) -> Stream:
    """Return the stream of some sets, see ``Source.stream``; its batches are int64 (rows, seq_len +
    1).
    """
    reader = _Reader(sets, seed)
    return Stream(
        reader.read,
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        consumed_rows=consumed_rows,
        close=reader.files.close,
    )


class _Reader:
    """The training rows of some sets by their positions in the order of a seed."""

    def __init__(self, sets: TokenSets, seed: int) -> None:
        self.manifest = sets[0].manifest
        self.padded = np.array([found.manifest.packing == "best_fit" for found in sets])
        self.shares = [found.share for found in sets]
        self.orders = [
            Order(block_rows(found.manifest.splits["train"]), found.shuffle_seed(seed))
            for found in sets
        ]
        self.passed = [found.passed for found in sets]
        self.files = OpenFiles(files_for(len(sets)))
        self.readers = [RowReader(found, "train", self.files) for found in sets]

    def read(self, first: int, count: int) -> Tensor:
        """Return the rows at ``count`` positions from ``first`` on: int64 (count, seq_len + 1)."""
        source, blocks, rows = rows_from(self.shares, self.orders, first, count, self.passed)
        raw = np.empty((count, self.manifest.row_bytes), dtype=np.uint8)
        row_places = [row.data for row in raw]
        for index, reader in enumerate(self.readers):
            here = np.flatnonzero(source == index)
            reader.read(blocks[here], rows[here], [row_places[place] for place in here.tolist()])
        return torch.from_numpy(token_ids(raw, self.manifest, self.padded[source]))


def validation_batches(
    found: TokenSet, *, rows: int, micro_batch: int, rank: int, world_size: int
) -> Iterator[Tensor]:
    """``rows`` validation rows, evenly spread over the split, dealt to the ranks micro-batch by
    micro-batch.

    Every rank gets the same number of batches of shape (micro_batch, seq_len + 1), int64, as the
    engines' collectives need; padding and places past the end hold ``IGNORED`` and do not count in
    the loss.
    """
    manifest = found.manifest
    block_ends = np.cumsum(block_rows(manifest.splits["val"]))
    chosen = np.arange(min(rows, block_ends[-1])) * block_ends[-1] // min(rows, block_ends[-1])
    blocks = np.searchsorted(block_ends, chosen, side="right")
    rows_in = chosen - np.concatenate(([0], block_ends))[blocks]
    with closing(OpenFiles(1)) as files:  # a rank reads the shards one after another
        reader = RowReader(found, "val", files)
        for start in range(0, len(chosen), micro_batch * world_size):
            mine = slice(start + rank * micro_batch, start + (rank + 1) * micro_batch)
            raw = np.empty((len(chosen[mine]), manifest.row_bytes), dtype=np.uint8)
            reader.read(blocks[mine], rows_in[mine], [row.data for row in raw])
            batch = torch.full((micro_batch, manifest.seq_len + 1), IGNORED, dtype=torch.int64)
            batch[: len(raw)] = torch.from_numpy(
                token_ids(raw, manifest, np.full(len(raw), manifest.packing == "best_fit"))
            )
            yield batch
