"""Train a SentencePiece model, and turn text into ids and back without losing a character."""

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

Kind = Literal["bpe", "unigram"]

# The bytes of a model depend on the number of threads that trained it, so it is the same on every machine.
TRAIN_THREADS = 8
# SentencePiece drops training lines above 4192 bytes; 1024 characters are at most 4096.
LINE_CHARS = 1024
# A long document goes in parts: SentencePiece takes some 40 bytes a character, and Unigram's sums are float32.
PART_CHARS = 1 << 14
# SentencePiece writes a space as this character, so a real one must go in as its bytes.
SPACE_MARK = "\u2581"


class Tokenizer:
    """A SentencePiece model. `load` it; `encode` and `decode` are exact for the models that `train` makes.

    Attributes: `vocab_size` (ids are 0 <= id < vocab_size), `eos_id` (never produced by `encode`), and
    `sha256` of the model file.
    """

    def __init__(self, model: bytes, name: str = "tokenizer"):
        """From the bytes of a model file; `name` stands in the errors. Raises ValueError as `load` does."""
        wanted = "expected a SentencePiece model (.model file)"
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            if not model:
                raise RuntimeError("empty")
            self._sp.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"{name}: not readable as a tokenizer, {wanted}; check the file") from error
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._sp.vocab_size()
        self.eos_id: int = self._sp.eos_id()
        if self.eos_id < 0 or not self._sp.IsControl(self.eos_id):
            raise ValueError(
                f"{name}: this SentencePiece model has no end-of-sequence control symbol, which separates documents; "
                "train one with an eos_id, or leave --tokenizer out"
            )
        pieces = [self._sp.PieceToId(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark_ids = pieces if all(self._sp.IsByte(piece) for piece in pieces) else []
        # A model that adds a space in front, say, must see every document whole.
        self._splits = self.decode(self._sp.Encode("a\n") + self._sp.Encode(" b\n")) == "a\n b\n"

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a model file. Raises ValueError if it is missing, is no SentencePiece model or has no eos id."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: cannot read the tokenizer: {error.strerror}; check the path") from error
        return cls(model, str(path))

    def encode(self, text: str) -> list[int]:
        """Ids of a text without lone surrogates; no eos is added."""
        if not self._splits:
            ids: list[int] = self._sp.Encode(text)
            return ids
        ids = []
        for part in _parts(text):
            for number, piece in enumerate(part.split(SPACE_MARK) if self._mark_ids else [part]):
                if number:
                    ids += self._mark_ids
                ids += self._sp.Encode(piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; eos and other control symbols give nothing. Raises ValueError for an id out of range."""
        listed = [int(i) for i in ids]
        if listed and not 0 <= min(listed) <= max(listed) < self.vocab_size:
            raise ValueError(f"token ids {min(listed)}..{max(listed)}, expected 0 <= id < {self.vocab_size}")
        text: str = self._sp.Decode(listed)
        return text


def train(texts: Iterable[str], vocab_size: int, out: Path, kind: Kind = "bpe") -> None:
    """Train a SentencePiece model on the texts and write it to `out`.

    Nothing is normalised and unknown characters fall back to bytes, so any text decodes to itself. Only `unk`
    (id 0) and `eos` (id 1) are special. The same texts in the same order give the same file on any machine.

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
        raise ValueError(_why(str(error), vocab_size)) from error
    Path(out).write_bytes(model.getvalue())


def sample(texts: Iterable[str], max_bytes: int) -> list[str]:
    """A choice of texts of about `max_bytes` of UTF-8 in all, by their hash: the order they come in plays no part.

    Holds no more than the choice and one text in memory. A text longer than the whole budget is cut.
    """
    heap: list[tuple[int, int, int, str]] = []  # largest hash first
    held = 0
    for number, text in enumerate(texts):
        rank = text_hash(text, "sample")
        if held >= max_bytes and -heap[0][0] <= rank:
            continue
        kept = text[:max_bytes]
        size = len(kept.encode())
        heapq.heappush(heap, (-rank, -number, size, kept))
        held += size
        while held - heap[0][2] >= max_bytes:
            held -= heapq.heappop(heap)[2]
    return [text for *_, text in sorted(heap, reverse=True)]


def text_hash(text: str, purpose: str) -> int:
    """A 64-bit number that depends on the text and the purpose (up to 16 ASCII letters) alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "big")


def _parts(text: str) -> Iterator[str]:
    """The text in parts of at most PART_CHARS characters, cut after a line where that is possible."""
    start = 0
    while len(text) - start > PART_CHARS:
        # No piece of our own models crosses a line end, so BPE's ids are those of the whole text.
        end = text.rfind("\n", start, start + PART_CHARS) + 1 or start + PART_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        # Neither mark may become part of a piece: the first stands for a space, the second is SentencePiece's own
        # sign for "unknown", for which it would drop the line.
        for line in re.split("[\n\u2581\u2585]", text):
            for start in range(0, len(line), LINE_CHARS):
                yield line[start : start + LINE_CHARS]


def _why(message: str, vocab_size: int) -> str:
    if most := re.search(r"too high .*<= (\d+)", message):
        return (
            f"vocab_size: found {vocab_size}, but the largest that this corpus supports is {most[1]}; "
            f"use --vocab-size {most[1]} or less, or more text"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size: found {vocab_size}, but the 256 bytes and the corpus's own characters need {least[1]}; "
            f"use --vocab-size {least[1]} or more"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return "the corpus has no text to train a tokenizer on; give more text, or --tokenizer FILE"
    if "vocab_size() > (0)" in message or "(trainer_spec.vocab_size()) > (0)" in message:
        return f"vocab_size: found {vocab_size}, expected at least 300; use a larger --vocab-size"
    return f"SentencePiece could not train a tokenizer of {vocab_size} pieces: {message}"
