"""Train a SentencePiece model, and turn text into ids and back without losing a character."""

import hashlib
import heapq
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
import xxhash

Kind = Literal["bpe", "unigram"]
Encoder = Literal["sentencepiece", "kitoken"]
Ids = np.ndarray[Any, np.dtype[np.int32]]

# The bytes of a model depend on the number of threads that trained it, so it is the same on every machine.
TRAIN_THREADS = 8
# SentencePiece drops training lines above 4192 bytes; 1024 characters are at most 4096.
LINE_CHARS = 1024
# A long document goes in parts: SentencePiece takes some 40 bytes a character, and Unigram's sums are float32.
PART_CHARS = 1 << 14
# What a text is hashed for; each its own seed, so that the choices are independent.
PURPOSES = ("split", "sample", "dropped")
# SentencePiece writes a space as this character, so a real one must go in as its bytes.
SPACE_MARK = "\u2581"


class FastPathDiffers(Exception):
    """kitoken and SentencePiece do not agree on this model and text; the message says where."""


class Tokenizer:
    """A SentencePiece model. `load` it; `encode` and `decode` are exact for the models that `train` makes.

    Attributes: `vocab_size` (ids are 0 <= id < vocab_size), `eos_id` (never produced by `encode`), and
    `sha256` of the model file.
    """

    def __init__(self, model: bytes, name: str = "tokenizer", encoder: Encoder = "sentencepiece"):
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
        self._mark_ids = np.array(pieces if all(self._sp.IsByte(piece) for piece in pieces) else [], np.int32)
        # A model that adds a space in front, say, must see every document whole.
        self._splits = self.decode(self._sp.Encode("a\n") + self._sp.Encode(" b\n")) == "a\n b\n"
        self._fast = _kitoken(model, name) if encoder == "kitoken" else None

    @classmethod
    def load(cls, path: Path, encoder: Encoder = "sentencepiece") -> "Tokenizer":
        """Read a model file, to be run by SentencePiece itself or by kitoken, which is several times as fast on BPE.

        Raises ValueError if it is missing, is no SentencePiece model or has no eos id, or if kitoken is not installed
        or cannot take it.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: cannot read the tokenizer: {error.strerror}; check the path") from error
        return cls(model, str(path), encoder)

    def encode(self, text: str) -> list[int]:
        """Ids of a text without lone surrogates; no eos is added."""
        ids: list[int] = np.concatenate(self.encode_parts(text)).tolist()
        return ids

    def encode_parts(self, text: str) -> list[Ids]:
        """The same ids as arrays (n,) of int32, one after the other; at least one."""
        return self._encode_with(self._fast or self._slow, text)

    def compare_with_sentencepiece(self, text: str, place: str) -> None:
        """Raises FastPathDiffers, naming `place`, if another encoder gives other ids for a text than SentencePiece."""
        if self._fast and self.encode(text) != np.concatenate(self._encode_with(self._slow, text)).tolist():
            raise FastPathDiffers(f"{place}: kitoken and SentencePiece give different ids")

    def _slow(self, text: str) -> Ids:
        # As an array at once: a list of Python's integers takes a quarter of Unigram's time.
        ids: Ids = self._sp.Encode(text, return_type="numpy")
        return ids

    def _encode_with(self, encode: Callable[[str], Ids], text: str) -> list[Ids]:
        if not self._splits:
            return [encode(text)]
        if not len(self._mark_ids) or SPACE_MARK not in text:
            return [encode(part) for part in _parts(text)]
        ids: list[Ids] = []
        for part in _parts(text):
            for number, piece in enumerate(part.split(SPACE_MARK)):
                ids += [self._mark_ids] * (number > 0) + [encode(piece)]
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


class Sample:
    """A choice of different texts of about `max_bytes` of UTF-8 in all, those of the smallest hash.

    So it depends on the texts alone, not on their order or on who reads them. Holds no more than the choice in memory;
    a text longer than the whole budget is cut.
    """

    def __init__(self, max_bytes: int, limit: int = 1 << 64):
        self._max_bytes, self._limit = max_bytes, limit
        self._heap: list[tuple[int, int, str]] = []  # largest hash first
        self._hashes: set[int] = set()
        self._held = 0

    @property
    def limit(self) -> int:
        """Texts of this hash or a larger one are not wanted."""
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
        """(hash, text) of what was chosen, the smallest hash first."""
        return sorted((-negative, text) for negative, _, text in self._heap)


def text_hash(utf8: bytes, purpose: Literal["split", "sample", "dropped"]) -> int:
    """A 64-bit number that depends on the text, as UTF-8, and the purpose alone: XXH3."""
    return xxhash.xxh3_64_intdigest(utf8, seed=PURPOSES.index(purpose))


def _kitoken(model: bytes, name: str) -> Callable[[str], Ids]:
    try:
        import kitoken
    except ImportError as error:
        raise ValueError(
            "--encoder kitoken: kitoken is not installed; pip install 'dnt-scale[fast]', or leave the option out"
        ) from error
    try:
        fast = kitoken.Kitoken.from_sentencepiece(model)
    except Exception as error:  # it names no error class of its own
        raise ValueError(f"{name}: kitoken cannot take this model ({error}); leave --encoder kitoken out") from error

    def encode(text: str) -> Ids:
        ids = fast.encode(text, False)
        return np.fromiter(ids, np.int32, len(ids))

    return encode


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
