"""From a tally to the report that a person reads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.arrays import Counts
from data_prep.chunks import EXCERPT, Chunk, Recipe
from data_prep.clean.cleaner import CleanStats
from data_prep.corpus_stats import CorpusStats, DuplicateFiles, SourceStats
from data_prep.options import PrepareOptions
from data_prep.report.models import (
    DuplicateReport,
    Report,
    RuleReport,
    SampleReport,
    SourceReport,
    SplitReport,
    TokenizerReport,
)
from data_prep.shards import Manifest
from data_prep.tokenizer import Tokenizer

DUPLICATE_EXAMPLES = 6


def make_report(
    options: PrepareOptions,
    recipe: Recipe,
    manifest: Manifest,
    counted: CorpusStats,
    duplicates: DuplicateFiles | None,
    tokenizer: Tokenizer,
) -> Report:
    """Return what report.html and report.json tell of a set; of a set that was appended to, what is
    new in it."""
    stats = CleanStats()
    for source in counted.sources.values():
        stats.merge(source.stats)
    return Report(
        name=Path(options.out).name,
        options={
            "seq_len": manifest.seq_len,
            "packing": manifest.packing,
            "val_fraction": options.val_fraction,
            "clean": options.rules.name if options.rules else None,
            "dedup": options.dedup,
            "text_field": options.text_field,
            "strict": options.strict,
            "appended_to": options.append.name if options.append else None,
        },
        sources=[_source(name, source) for name, source in counted.sources.items()],
        rules={
            name: RuleReport(
                seen=rule.seen,
                changed=rule.changed,
                dropped=rule.dropped,
                samples=tuple(
                    SampleReport(text=sample.text, detail=sample.detail) for sample in rule.samples
                ),
            )
            for name, rule in stats.rules.items()
        },
        duplicates=_duplicates(counted, duplicates, tokenizer) if duplicates else None,
        tokenizer=TokenizerReport(
            kind=manifest.options.kind,
            vocab_size=tokenizer.vocab_size,
            sample_bytes=manifest.options.sample_bytes,
            encoder=recipe.encoder,
            checked_documents=counted.checked["documents"],
            checked_bytes=counted.checked["bytes"],
            round_trip=manifest.tokenizer.round_trip,
        ),
        splits={
            name: SplitReport(
                documents=split.documents,
                text_bytes=split.text_bytes,
                tokens=split.tokens,
                rows=split.rows,
                shards=len(split.shards),
                shard_bytes=sum(shard.bytes for shard in split.shards),
                padding=split.rows * manifest.seq_len - split.tokens
                if manifest.packing == "best_fit"
                else 0,
            )
            for name, split in manifest.splits.items()
        },
        rejects=counted.rejects,
    )


def _source(name: str, source: SourceStats) -> SourceReport:
    return SourceReport(
        name=name,
        files=source.files,
        read=source.read,
        read_bytes=source.read_bytes,
        findings=dict(source.findings),
        named=source.named,
        dropped=source.dropped,
        changed={
            rule: stats.changed for rule, stats in source.stats.rules.items() if stats.changed
        },
        exact=source.exact,
        near=source.near,
        documents=source.documents,
        text_bytes=source.text_bytes,
        tokens=source.tokens,
        byte_lengths=_trimmed(source.byte_lengths),
        token_lengths=_trimmed(source.token_lengths),
        examples=source.examples,
    )


def _trimmed(counts: Counts) -> list[int]:
    filled = np.flatnonzero(counts)
    return counts[: filled[-1] + 1].tolist() if len(filled) else []


def _duplicates(
    counted: CorpusStats, duplicates: DuplicateFiles, tokenizer: Tokenizer
) -> DuplicateReport:
    before = duplicates.facts["before"]

    def place(number: int) -> str:
        return counted.place(number - before)[2] if number >= before else "the set appended to"

    return DuplicateReport(
        exact=sum(source.exact for source in counted.sources.values()),
        near=sum(source.near for source in counted.sources.values()),
        clusters=duplicates.facts["clusters"],
        largest=[(size, place(number)) for size, number in duplicates.facts["largest"]],
        examples=list(_examples(counted, duplicates, tokenizer, before)),
    )


def _examples(
    counted: CorpusStats, duplicates: DuplicateFiles, tokenizer: Tokenizer, before: int
) -> Iterator[dict[str, Any]]:
    """Yield near duplicates beside what they are like, from all over the corpus; exact ones tell
    nothing."""
    from data_prep.dedup import similarity

    original = np.load(duplicates.original, mmap_mode="r")[before:]
    candidates = np.flatnonzero(np.load(duplicates.near, mmap_mode="r") & (original >= before))
    for number in candidates[:: max(1, len(candidates) // DUPLICATE_EXAMPLES)][
        :DUPLICATE_EXAMPLES
    ].tolist():
        kept = int(original[number]) - before
        one, other = _fingerprint(counted, kept), _fingerprint(counted, number)
        yield {
            "kept": counted.place(kept)[2],
            "dropped": counted.place(number)[2],
            "similarity": float(similarity(one, other)),
            "kept_text": _text(counted, kept, tokenizer),
            "dropped_text": _text(counted, number, tokenizer),
        }


def _fingerprint(counted: CorpusStats, number: int) -> Any:
    path, inside, _ = counted.place(number)
    return Chunk(path)["fingerprints"][inside]


def _text(counted: CorpusStats, number: int, tokenizer: Tokenizer) -> str:
    """Return the beginning of a document, out of its tokens."""
    path, inside, _ = counted.place(number)
    chunk = Chunk(path)
    split = chunk.split_of(inside)
    here = chunk["held"] == (split == "val")
    start = int(chunk["lengths"][:inside][here[:inside]].sum(dtype=np.int64))
    length = min(int(chunk["lengths"][inside]) - 1, EXCERPT)
    return tokenizer.decode(chunk[f"{split}_ids"][start : start + length].tolist())[:EXCERPT]
