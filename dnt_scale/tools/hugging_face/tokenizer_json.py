"""A SentencePiece model as the files of a tokenizer of transformers that gives the same ids.

BPE that takes text as it is (what `dnt data prepare` trains) becomes tokenizer.json, for the fast
tokenizers. Two things differ from the usual conversion of Llama's, so that every text gives the
same ids: spaces in pieces are spaces, not U+2581, so that U+2581 itself falls back to its bytes as
in ``data_prep.tokenizer``; and merges are made of all pairs of pieces that are a piece together, as
SentencePiece finds them. Any other model (Unigram, whose sums of fp32 scores no other library
repeats, or one that changes the text first) is run by SentencePiece itself: ``tokenization_dnt``.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.tokenizer import SPACE_MARK

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece.Type
BPE = 2  # TrainerSpec.ModelType
REMOTE = "tokenization_dnt.py"


class Piece(NamedTuple):
    text: str
    type: int


class Model(NamedTuple):
    """What decides how a SentencePiece model cuts text."""

    pieces: list[Piece]
    bpe: bool
    plain: bool  # text is taken as it is, and what is unknown falls back to bytes


def write_tokenizer(tokenizer: Path, eos: int, context: int, folder: Path) -> str:
    """Write the tokenizer's files into a folder; what it is there.

    Args:
        tokenizer: a .model file.
        eos: id of the token that stands before and after documents; the tokenizer puts one in front
            of what it encodes, as rows and `dnt generate` begin with it.
        context: of the model, in tokens.
    """
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    model = parsed(tokenizer.read_bytes())
    fast = model.bpe and model.plain
    token = model.pieces[eos].text
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast" if fast else "DNTTokenizer",
        "bos_token": token,
        "eos_token": token,
        "pad_token": token,
        "unk_token": next(piece.text for piece in model.pieces if piece.type == UNKNOWN),
        "model_max_length": context,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        # a text with "</s>" in it is text
        "split_special_tokens": True,
    }
    if fast:
        _write(folder / "tokenizer.json", fast_tokenizer(model, eos))
    else:
        settings["auto_map"] = {"AutoTokenizer": ["tokenization_dnt.DNTTokenizer", None]}
        shutil.copyfile(Path(__file__).parent / "remote_code" / REMOTE, folder / REMOTE)
    _write(folder / "tokenizer_config.json", settings)
    return "tokenizer.json" if fast else REMOTE


def fast_tokenizer(model: Model, eos: int) -> dict[str, Any]:
    """Return tokenizer.json of a plain BPE model."""
    texts = [
        piece.text.replace(SPACE_MARK, " ") if piece.type in (NORMAL, USER_DEFINED) else piece.text
        for piece in model.pieces
    ]
    ids = {text: number for number, text in enumerate(texts)}
    token = texts[eos]
    specials = [
        _added(number, texts[number], special=True)
        for number, piece in enumerate(model.pieces)
        if piece.type in (UNKNOWN, CONTROL)
    ]
    # one character is a piece that no merge touches
    symbols = [
        _added(number, texts[number], special=False)
        for number, piece in enumerate(model.pieces)
        if piece.type == USER_DEFINED and len(piece.text) > 1
    ]
    unknown = next(
        text for text, piece in zip(texts, model.pieces, strict=True) if piece.type == UNKNOWN
    )
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": specials + symbols,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                begin,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": token, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {token: {"id": token, "ids": [eos], "tokens": [token]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": list(_merges(model, texts)),
        },
    }


def _merges(model: Model, texts: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of pieces that make a piece together: earlier pieces first (BPE's scores fall
    with the id), and of one piece the pair with the longest beginning first, which is the one that
    merges from the left leave.
    """
    known = {text for text, piece in zip(texts, model.pieces, strict=True) if piece.type == NORMAL}
    for text, piece in zip(texts, model.pieces, strict=True):
        if piece.type == NORMAL:
            for cut in range(len(text) - 1, 0, -1):
                if text[:cut] in known and text[cut:] in known:
                    yield text[:cut], text[cut:]


def _added(number: int, text: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **flags, "special": special}


def _write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


# --- sentencepiece_model.proto --------------------------------------------------------------------
# SentencePiece's own class of it loads only beside the very release of protobuf that made it.


def parsed(raw: bytes) -> Model:
    """Return what decides how a model file, which SentencePiece has loaded, cuts text."""
    pieces, trainer, normalizer = [], b"", b""
    for field, value in _fields(raw):
        if field == 1:
            found = dict(_fields(_as_bytes(value)))
            pieces.append(Piece(_as_bytes(found[1]).decode(), _as_int(found.get(3, NORMAL))))
        elif field == 2:
            trainer = _as_bytes(value)
        elif field == 3:
            normalizer = _as_bytes(value)
    trained, normal = dict(_fields(trainer)), dict(_fields(normalizer))
    plain = (
        not normal.get(2)  # precompiled_charsmap
        and normal.get(3, 1) == 0  # add_dummy_prefix
        and normal.get(4, 1) == 0  # remove_extra_whitespaces
        and normal.get(5, 1) == 1  # escape_whitespaces
        and trained.get(35, 0) == 1  # byte_fallback
        and trained.get(24, 0) == 0  # treat_whitespace_as_suffix
        and not any(piece.type == UNUSED for piece in pieces)
    )
    return Model(pieces, trained.get(3) == BPE, plain)


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of the fields of a message in protobuf's wire format."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(raw):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) or varint()
        yield key >> 3, raw[at : at + size]
        at += size


def _as_bytes(value: int | bytes) -> bytes:
    assert isinstance(value, bytes)
    return value


def _as_int(value: int | bytes) -> int:
    assert isinstance(value, int)
    return value
