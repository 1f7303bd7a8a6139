"""A tokenizer for a corpus: a sample of it, chosen by hash over all processes, and SentencePiece's
training."""

import functools
import heapq
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import sentencepiece
from rich.console import Console

from data_prep.chunks import VERSION
from data_prep.clean.cleaner import CleanConfig, Cleaner, CleanStats
from data_prep.files import write_whole
from data_prep.identity import held_out, library_versions, text_hash, unit_parts
from data_prep.process_pool import ordered_map
from data_prep.progress import stage
from data_prep.read.documents import Findings, LeftOut, place_name, read_documents
from data_prep.read.pieces import Piece, Unit, read_pieces, stored_bytes
from data_prep.tokenizer import LINE_CHARS, TRAIN_THREADS, Kind
from data_prep.work_folder import key

# Findings of which each is a text, or a file of them, that was not to be had.
LOSING = ("malformed_json", "no_text", "other_encoding", "not_text", "stand_in", "other_json")
# What each kind learns from in some 15 seconds on two cores.
SAMPLE_BYTES = {"bpe": 32_000_000, "unigram": 4_000_000}


@dataclass(frozen=True)
class TokenizerSpec:
    """What decides a tokenizer, beside the corpus."""

    kind: Kind
    vocab_size: int
    sample_bytes: int
    text_field: str
    val_fraction: float
    rules: CleanConfig | None
    strict: bool

    def key(self, units: Sequence[Unit]) -> str:
        """Return the name of the tokenizer of a corpus."""
        rules = self.rules.fingerprint() if self.rules else None
        options = [
            self.kind,
            self.vocab_size,
            self.sample_bytes,
            self.text_field,
            self.val_fraction,
            self.strict,
        ]
        return key(
            VERSION, library_versions(), rules, options, [unit_parts(unit) for unit in units]
        )


class PieceSampler:
    """Offers what a tokenizer may learn from; one a worker process. Called with (piece, limit):
    texts of a hash below `limit` are wanted."""

    def __init__(self, lesson: TokenizerSpec):
        self._lesson = lesson
        self._clean = Cleaner(lesson.rules) if lesson.rules else None

    def __call__(self, item: tuple[Piece, int]) -> "SampledPiece":
        """Return what a piece has to offer: texts hashed as they were read, and as they were
        cleaned."""
        piece, limit = item
        documents = 0
        findings = Findings()
        lesson, chosen, stats = (
            self._lesson,
            TextSample(self._lesson.sample_bytes, limit),
            CleanStats(),
        )
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
        return SampledPiece(
            piece.input_bytes, documents, first, stats.dropped(), chosen.items(), findings
        )


class SampledPiece(NamedTuple):
    """Of a piece: stored bytes read, documents, the first line or row without a text, documents
    that the rules dropped (of those that were tried), (hash, text) to choose from, and what was
    found wrong."""

    input_bytes: int
    documents: int
    without_text: str
    dropped: dict[str, int]
    texts: list[tuple[int, str]]
    findings: Findings


def find_or_train(
    work: Path,
    lesson: TokenizerSpec,
    units: Sequence[Unit],
    workers: int,
    console: Console,
    left_out: LeftOut | None = None,
) -> Path:
    """Return the tokenizer of a corpus, a .model file in the work folder: trained, or found there.
    What is found wrong in the input on the way is added to `left_out`.

    Raises ValueError for input that cannot be read, and where there is nothing to learn from or a
    vocabulary of that size does not come of it.
    """
    model = work / f"tokenizer-{lesson.key(units)}.model"
    if model.exists():
        return model
    sample = TextSample(lesson.sample_bytes)
    documents, without_text, dropped = 0, "", Counter[str]()

    def items() -> Iterator[tuple[Piece, int]]:
        for unit in units:
            for piece in read_pieces(unit, lesson.text_field):
                yield piece, sample.limit

    with (
        stage(console, "sample", sum(map(stored_bytes, units))) as advance,
        closing(ordered_map(functools.partial(PieceSampler, lesson), items(), workers)) as offers,
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
        by_rule = "".join(
            f", {count:,} dropped by {rule}" for rule, count in dropped.items() if count
        )
        raise ValueError(
            f"none of the {documents:,} documents is left to learn from: "
            f"{documents - sum(dropped.values()):,} held out{by_rule}; use a smaller "
            "--val-fraction or other --clean rules"
        )
    with stage(console, "learn", None) as advance:
        write_whole(model, lambda beside: train(texts, lesson.vocab_size, beside, lesson.kind))
        advance(sum(len(text.encode()) for text in texts))
    return model


def train(texts: Iterable[str], vocab_size: int, out: Path, kind: Kind = "bpe") -> None:
    """Train a SentencePiece model on the texts and write it to `out`.

    Nothing is normalised and unknown characters fall back to bytes, so any text decodes to itself.
    Only `unk` (id 0) and `eos` (id 1) are special. The same texts in the same order give the same
    file on any machine.

    Raises ValueError if `vocab_size` is larger or smaller than the texts allow, naming the limit.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            num_threads=TRAIN_THREADS,
            normalization_rule_name="identity",
            byte_fallback=True,
            user_defined_symbols=["\n", "\t"],
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            # Runs of spaces as one piece: a third fewer tokens on Python source.
            allow_whitespace_only_pieces=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=4,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size)) from error
    Path(out).write_bytes(model.getvalue())


class TextSample:
    """A choice of different texts of about `max_bytes` of UTF-8 in all, those of the smallest hash.

    So it depends on the texts alone, not on their order or on who reads them. Holds no more than
    the choice in memory; a text longer than the whole budget is cut.
    """

    def __init__(self, max_bytes: int, limit: int = 1 << 64):
        self._max_bytes, self._limit = max_bytes, limit
        self._heap: list[tuple[int, int, str]] = []  # largest hash first
        self._hashes: set[int] = set()
        self._held = 0

    @property
    def limit(self) -> int:
        """Return the hash that texts must be below to be wanted."""
        return min(self._limit, -self._heap[0][0]) if self._held >= self._max_bytes else self._limit

    def wants(self, rank: int) -> bool:
        """Whether a text of this hash would be chosen, as things stand."""
        return rank < self.limit and rank not in self._hashes

    def add(self, rank: int, text: str) -> None:
        """Offer a text, whose `text_hash(..., "sample")` is `rank`."""
        if not self.wants(rank):
            return
        kept = text[: self._max_bytes]
        size = len(kept.encode())
        heapq.heappush(self._heap, (-rank, size, kept))
        self._hashes.add(rank)
        self._held += size
        while self._held - self._heap[0][1] >= self._max_bytes:
            negative, size, _ = heapq.heappop(self._heap)
            self._hashes.remove(-negative)
            self._held -= size

    def items(self) -> list[tuple[int, str]]:
        """Return (hash, text) of what was chosen, the smallest hash first."""
        return sorted((-negative, text) for negative, _, text in self._heap)


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        # Neither mark may become part of a piece: the first stands for a space, the second is
        # SentencePiece's own sign for "unknown", for which it would drop the line.
        for line in re.split("[\n\u2581\u2585]", text):
            for start in range(0, len(line), LINE_CHARS):
                yield line[start : start + LINE_CHARS]


def _explain(message: str, vocab_size: int) -> str:
    if most := re.search(r"too high .*<= (\d+)", message):
        return (
            f"vocab_size: found {vocab_size}, but the largest that this corpus supports is "
            f"{most[1]}; use --vocab-size {most[1]} or less, or more text"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size: found {vocab_size}, but the 256 bytes and the corpus's own characters "
            f"need {least[1]}; use --vocab-size {least[1]} or more"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return "the corpus has no text to train a tokenizer on; give more text, or --tokenizer FILE"
    if "vocab_size() > (0)" in message or "(trainer_spec.vocab_size()) > (0)" in message:
        return f"vocab_size: found {vocab_size}, expected at least 300; use a larger --vocab-size"
    return f"SentencePiece could not train a tokenizer of {vocab_size} pieces: {message}"
