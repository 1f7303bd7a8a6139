"""A tokenizer for a corpus: a sample of it, chosen by hash over all processes, and SentencePiece's training."""

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from data_prep.chunks import VERSION, held_out, library_versions, unit_parts
from data_prep.clean.cleaner import CleanConfig, Cleaner, CleanStats
from data_prep.pool import spread
from data_prep.progress import stage
from data_prep.read.documents import Findings, LeftOut, place_name, read_documents
from data_prep.read.pieces import Piece, Unit, read_pieces, stored_bytes
from data_prep.tokenizer import Kind, Sample, text_hash, train
from data_prep.work import key, write_whole

# Findings of which each is a text, or a file of them, that was not to be had.
LOSING = ("malformed_json", "no_text", "other_encoding", "not_text", "stand_in", "other_json")
# What each kind learns from in some 15 seconds on two cores.
SAMPLE_BYTES = {"bpe": 32_000_000, "unigram": 4_000_000}


@dataclass(frozen=True)
class Lesson:
    """What decides a tokenizer, beside the corpus."""

    kind: Kind
    vocab_size: int
    sample_bytes: int
    text_field: str
    val_fraction: float
    rules: CleanConfig | None
    strict: bool

    def key(self, units: Sequence[Unit]) -> str:
        """The name of the tokenizer of a corpus."""
        rules = self.rules.fingerprint() if self.rules else None
        options = [self.kind, self.vocab_size, self.sample_bytes, self.text_field, self.val_fraction, self.strict]
        return key(VERSION, library_versions(), rules, options, [unit_parts(unit) for unit in units])


class Sampler:
    """Offers what a tokenizer may learn from; one a worker process. Called with (piece, limit): texts of a hash below
    `limit` are wanted."""

    def __init__(self, lesson: Lesson):
        self._lesson = lesson
        self._clean = Cleaner(lesson.rules) if lesson.rules else None

    def __call__(self, item: tuple[Piece, int]) -> "Offer":
        """What a piece has to offer: texts hashed as they were read, and as they were cleaned."""
        piece, limit = item
        documents = 0
        findings = Findings()
        lesson, chosen, stats = self._lesson, Sample(self._lesson.sample_bytes, limit), CleanStats()
        for document in read_documents(piece, lesson.text_field, findings, lesson.strict):
            documents += 1
            rank = text_hash(document.text.encode(), "sample")
            if not chosen.wants(rank):
                continue
            text = self._clean(document.text, stats).text if self._clean else document.text
            if text and not held_out(text_hash(text.encode(), "split"), lesson.val_fraction):
                chosen.add(rank, text)
        lost = next((record for record in findings.records if record["kind"] in LOSING), None)
        first = place_name(lost["file"], lost["line"]) + f": {lost['detail']}" if lost else ""
        return Offer(piece.input_bytes, documents, first, stats.dropped(), chosen.items(), findings)


class Offer(NamedTuple):
    """Of a piece: stored bytes read, documents, the first line or row without a text, documents that the rules dropped
    (of those that were tried), (hash, text) to choose from, and what was found wrong."""

    input_bytes: int
    documents: int
    without_text: str
    dropped: dict[str, int]
    texts: list[tuple[int, str]]
    findings: Findings


def learn(
    work: Path,
    lesson: Lesson,
    units: Sequence[Unit],
    workers: int,
    console: Console,
    left_out: LeftOut | None = None,
) -> Path:
    """The tokenizer of a corpus, a .model file in the work folder: trained, or found there. What is found wrong in the
    input on the way is added to `left_out`.

    Raises ValueError for input that cannot be read, and where there is nothing to learn from or a vocabulary of that
    size does not come of it.
    """
    model = work / f"tokenizer-{lesson.key(units)}.model"
    if model.exists():
        return model
    sample = Sample(lesson.sample_bytes)
    documents, without_text, dropped = 0, "", Counter[str]()

    def items() -> Iterator[tuple[Piece, int]]:
        for unit in units:
            for piece in read_pieces(unit, lesson.text_field):
                yield piece, sample.limit

    with (
        stage(console, "sample", sum(map(stored_bytes, units))) as advance,
        closing(spread(functools.partial(Sampler, lesson), items(), workers)) as offers,
    ):
        for offer in offers:
            documents += offer.documents
            without_text = without_text or offer.without_text
            dropped.update(offer.dropped)
            if left_out:
                left_out.add(offer.findings)
            for rank, text in offer.texts:
                sample.add(rank, text)
            advance(offer.input_bytes)
    texts = [text for _, text in sample.items()]
    if not documents:
        found = f" ({without_text}); name another --text-field, or" if without_text else ";"
        raise ValueError(f"the corpus is empty: no text in the input{found} give some text")
    if not texts:
        by_rule = "".join(f", {count:,} dropped by {rule}" for rule, count in dropped.items() if count)
        raise ValueError(
            f"none of the {documents:,} documents is left to learn from: {documents - sum(dropped.values()):,} held out"
            f"{by_rule}; use a smaller --val-fraction or other --clean rules"
        )
    with stage(console, "learn", None) as advance:
        write_whole(model, lambda beside: train(texts, lesson.vocab_size, beside, lesson.kind))
        advance(sum(len(text.encode()) for text in texts))
    return model
