"""One pass over finished chunks: what each source and split holds, and what the report tells of
it."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from data_prep.arrays import Counts, Flags, Lengths
from data_prep.chunks import Chunk
from data_prep.clean.cleaner import CleanStats
from data_prep.pack import Layout, StreamSlice, predicted_tokens, slice_size, which_stay
from data_prep.read.documents import Findings, place_name
from data_prep.read.inputs import InputSource
from data_prep.read.pieces import Unit
from data_prep.shards import SplitName
from data_prep.train_tokenizer import LOSING

SPLITS: tuple[SplitName, ...] = ("train", "val")
EXAMPLES = 3
FIRST_REJECTS = 40
REJECTS_OF_A_KIND = 4


class DuplicateFiles(NamedTuple):
    """What the dedup stage left: files with an entry a document, and numbers for the report.

    `original` (int64) is -1 or the number of the document that stays instead, counted from the set
    appended to on, if any; `keep` and `near` (bool) leave that set out.
    """

    original: Path
    keep: Path
    near: Path
    facts: dict[str, Any]


@dataclass
class SplitTotals:
    """Of one split: documents that stay, their UTF-8 bytes, and the tokens that a model predicts of
    them."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0


@dataclass
class SourceStats:
    """Of one source. `read` and `read_bytes` count before cleaning, the lengths (powers of two)
    what stays; `named` has the place of the first finding of each kind."""

    files: int = 0
    read: int = 0
    read_bytes: int = 0
    findings: Counter[str] = field(default_factory=Counter)
    named: dict[str, str] = field(default_factory=dict)
    stats: CleanStats = field(default_factory=CleanStats)
    wordless: int = 0
    exact: int = 0
    near: int = 0
    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    byte_lengths: Counts = field(default_factory=lambda: np.zeros(64, np.int64))
    token_lengths: Counts = field(default_factory=lambda: np.zeros(64, np.int64))
    examples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def dropped(self) -> dict[str, int]:
        """Return how many documents were left out, by finding or rule, before duplicates."""
        counts = {kind: self.findings[kind] for kind in LOSING if self.findings[kind]}
        counts |= {rule: count for rule, count in self.stats.dropped().items() if count}
        return counts | ({"no_tokens": self.wordless} if self.wordless else {})


@dataclass
class CorpusStats:
    """Of the whole corpus. `places` are (number of the first document, chunk, lines before its
    unit)."""

    sources: dict[str, SourceStats]
    splits: dict[SplitName, SplitTotals]
    parts: dict[SplitName, list[StreamSlice]]
    places: list[tuple[int, Path, int]] = field(default_factory=list)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)

    def place(self, number: int) -> tuple[Path, int, str]:
        """Return where a document is: its chunk, its number in that, and its file and line in
        words."""
        firsts = [first for first, _, _ in self.places]
        first, path, lines = self.places[int(np.searchsorted(firsts, number, side="right")) - 1]
        chunk, inside = Chunk(path), number - first
        line = int(chunk["line"][inside])
        return (
            path,
            inside,
            place_name(chunk.meta["files"][int(chunk["origin"][inside])], line and line + lines),
        )


def count_corpus(
    sources: Sequence[InputSource],
    units: Sequence[Unit],
    chunks: Sequence[Sequence[Path]],
    layout: Layout,
    near: Flags | None,
    names: Sequence[SplitName],
    rejects: Path,
    advance: Callable[[int], object],
) -> CorpusStats:
    """Count the chunks of each unit, and write every finding.

    Args:
        near: tells of each document that does not stay whether it is a near duplicate (else an
            exact one); None where duplicates were not looked for.
        rejects: a .jsonl for the findings, those of the sources first, with lines counted from the
            file's beginning.
        advance: called with 1 after each chunk.
    """
    result = CorpusStats(
        {unit.source: SourceStats() for unit in units},
        {name: SplitTotals() for name in names},
        {name: [] for name in names},
    )
    with rejects.open("w") as file:
        for source in sources:
            passed = Findings()
            for finding in source.passed:
                passed.add(finding)
            _count_findings(result, source.name, passed.to_json(), file)
        first = lines = 0
        for unit, paths in zip(units, chunks, strict=True):
            # Units of one file, which follow each other, go on with its line numbers.
            lines = lines if unit.start else 0
            result.sources[unit.source].files += 0 if unit.start else len(unit.files)
            lines_before = lines
            for path in paths:
                result.places.append((first, path, lines_before))
                documents, new_lines = _count_chunk(result, unit.source, layout, near, file)
                first += documents
                lines += new_lines
                advance(1)
    return result


def _count_chunk(
    result: CorpusStats, name: str, layout: Layout, near: Flags | None, rejects: IO[str]
) -> tuple[int, int]:
    """Count the newest of `result.places`, a chunk of a source; return its documents and lines."""
    first, path, lines_before = result.places[-1]
    lengths, held, text_bytes, raw_meta = Chunk(path).read("lengths", "held", "text_bytes", "meta")
    keep = which_stay(layout, first, len(lengths))
    meta = json.loads(raw_meta.tobytes())
    for entry in (*meta["findings"]["records"], *meta["examples"]):
        entry["line"] += lines_before if entry["line"] else 0
    _count_meta(result, name, meta)
    _count_findings(result, name, meta["findings"], rejects)
    source = result.sources[name]
    if near is not None:
        is_near = near[first : first + len(keep)]
        source.near += int(is_near[~keep].sum())
        source.exact += int((~keep & ~is_near).sum())
    _count_kept(source, text_bytes[keep], lengths[keep])
    for split, totals in result.splits.items():
        stay = keep & (held == (split == "val"))
        given = StreamSlice(path, first, slice_size(layout, lengths[stay]))
        result.parts[split].append(given)
        totals.documents += int(stay.sum())
        totals.text_bytes += int(text_bytes[stay].sum(dtype=np.int64))
        totals.tokens += predicted_tokens(layout, lengths[stay])
    return len(lengths), int(meta["lines"])


def _count_findings(
    result: CorpusStats, name: str, findings: dict[str, Any], rejects: IO[str]
) -> None:
    """Add findings to their source's, write each record, and keep the first for the report."""
    source = result.sources[name]
    source.findings.update(findings["counts"])
    for record in findings["records"]:
        rejects.write(json.dumps(record) + "\n")
        kind = record["kind"]
        source.named.setdefault(kind, place_name(record["file"], record["line"]))
        already = sum(other["kind"] == kind for other in result.rejects)
        if len(result.rejects) < FIRST_REJECTS and already < REJECTS_OF_A_KIND:
            result.rejects.append(record)


def _count_meta(result: CorpusStats, name: str, meta: dict[str, Any]) -> None:
    """Add a chunk's own numbers to its source's."""
    source = result.sources[name]
    source.read += meta["read"]
    source.read_bytes += meta["read_bytes"]
    source.stats.merge(CleanStats.from_json(meta["clean"]))
    source.wordless += meta["wordless"]
    for example in meta["examples"][: EXAMPLES - len(source.examples)]:
        source.examples.append(
            {"place": place_name(example["file"], example["line"]), "text": example["text"]}
        )
    result.checked.update(meta["checked"])


def _count_kept(source: SourceStats, text_bytes: Lengths, lengths: Lengths) -> None:
    source.documents += len(lengths)
    source.text_bytes += int(text_bytes.sum(dtype=np.int64))
    source.tokens += int(lengths.sum(dtype=np.int64))
    for counts, values in ((source.byte_lengths, text_bytes), (source.token_lengths, lengths)):
        counts += np.bincount(np.log2(np.maximum(values, 1)).astype(np.int64), minlength=64)
