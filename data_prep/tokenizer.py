"""Train a SentencePiece model, and turn text into ids and back without losing a character."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece

from data_prep.arrays import Ids

Kind = Literal["bpe", "unigram"]
Encoder = Literal["sentencepiece", "kitoken"]

# The bytes of a model depend on the number of threads that trained it, so it is the same on every
# machine.
TRAIN_THREADS = 8
# SentencePiece drops training lines above 4192 bytes; 1024 characters are at most 4096.
LINE_CHARS = 1024
# A long document goes in parts: SentencePiece takes some 40 bytes a character, and Unigram's sums
# are float32.
PART_CHARS = 1 << 14
# SentencePiece writes a space as this character, so a real one must go in as its bytes.
SPACE_MARK = "\u2581"


class FastPathDiffers(Exception):
    """kitoken and SentencePiece do not agree on this model and text; the message says where."""


class Tokenizer:
    """A SentencePiece model. `load` it; `encode` and `decode` are exact for the models that `train`
    makes.

    Attributes: `vocab_size` (ids are 0 <= id < vocab_size), `eos_id` (never produced by `encode`),
    and `sha256` of the model file.
    """

    def __init__(self, model: bytes, name: str = "tokenizer", encoder: Encoder = "sentencepiece"):
        """Take the bytes of a model file; `name` stands in the errors. Raises ValueError as `load`
        does."""
        wanted = "expected a SentencePiece model (.model file)"
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            if not model:
                raise RuntimeError("empty")
            self._sp.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(
                f"{name}: not readable as a tokenizer, {wanted}; check the file"
            ) from error
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._sp.vocab_size()
        self.eos_id: int = self._sp.eos_id()
        if self.eos_id < 0 or not self._sp.IsControl(self.eos_id):
            raise ValueError(
                f"{name}: this SentencePiece model has no end-of-sequence control symbol, which "
                "separates documents; train one with an eos_id, or leave --tokenizer out"
            )
        pieces = [self._sp.PieceToId(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark_ids = np.array(
            pieces if all(self._sp.IsByte(piece) for piece in pieces) else [], np.int32
        )
        # A model that adds a space in front, say, must see every document whole.
        self._splits = self.decode(self._sp.Encode("a\n") + self._sp.Encode(" b\n")) == "a\n b\n"
        self._fast = _kitoken(model, name) if encoder == "kitoken" else None

    @classmethod
    def load(cls, path: Path, encoder: Encoder = "sentencepiece") -> "Tokenizer":
        """Read a model file, to be run by SentencePiece itself or by kitoken, which is several
        times as fast on BPE.

        Raises ValueError if it is missing, is no SentencePiece model or has no eos id, or if
        kitoken is not installed or cannot take it.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(
                f"{path}: cannot read the tokenizer: {error.strerror}; check the path"
            ) from error
        return cls(model, str(path), encoder)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text without lone surrogates; no eos is added."""
        ids: list[int] = np.concatenate(self.encode_parts(text)).tolist()
        return ids

    def encode_parts(self, text: str) -> list[Ids]:
        """Return the same ids as arrays (n,) of int32, one after the other; at least one."""
        return self._encode_with(self._fast or self._slow, text)

    def compare_with_sentencepiece(self, text: str, place: str) -> None:
        """Raise FastPathDiffers, naming `place`, if another encoder gives other ids for a text than
        SentencePiece."""
        if (
            self._fast
            and self.encode(text) != np.concatenate(self._encode_with(self._slow, text)).tolist()
        ):
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
        """Return the text of ids; eos and other control symbols give nothing. Raises ValueError for
        an id out of range."""
        listed = [int(i) for i in ids]
        if listed and not 0 <= min(listed) <= max(listed) < self.vocab_size:
            raise ValueError(
                f"token ids {min(listed)}..{max(listed)}, expected 0 <= id < {self.vocab_size}"
            )
        text: str = self._sp.Decode(listed)
        return text


def _kitoken(model: bytes, name: str) -> Callable[[str], Ids]:
    try:
        import kitoken
    except ImportError as error:
        raise ValueError(
            "--encoder kitoken: kitoken is not installed; pip install 'dnt-scale[fast]', or leave "
            "the option out"
        ) from error
    try:
        fast = kitoken.Kitoken.from_sentencepiece(model)
    except Exception as error:  # it names no error class of its own
        raise ValueError(
            f"{name}: kitoken cannot take this model ({error}); leave --encoder kitoken out"
        ) from error

    def encode(text: str) -> Ids:
        ids = fast.encode(text, False)
        return np.fromiter(ids, np.int32, len(ids))

    return encode


def _parts(text: str) -> Iterator[str]:
    """Yield the text in parts of at most PART_CHARS characters, cut after a line where that is
    possible."""
    start = 0
    while len(text) - start > PART_CHARS:
        # No piece of our own models crosses a line end, so BPE's ids are those of the whole text.
        end = text.rfind("\n", start, start + PART_CHARS) + 1 or start + PART_CHARS
        yield text[start:end]
        start = end
    yield text[start:]
