"""A piece of the corpus becomes a chunk: its documents parsed, cleaned, fingerprinted and
tokenised, in one file.

A chunk is a function of the recipe and the piece alone, so it is the same on any number of workers
and any machine.
"""

import functools
import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data_prep import shards
from data_prep.arrays import Array, Ids
from data_prep.chunk_files import ChunkResult, make_missing, save_arrays
from data_prep.clean.cleaner import CleanConfig, Cleaner, CleanStats
from data_prep.files import write_whole
from data_prep.identity import held_out, library_versions, text_hash, unit_parts
from data_prep.read.documents import Document, Findings, read_documents
from data_prep.read.pieces import Piece, Unit, read_pieces
from data_prep.shards import Dedup, SplitName
from data_prep.tokenizer import Encoder, Tokenizer
from data_prep.work_folder import key

VERSION = 2  # raise it when the code makes another chunk of the same piece
CHECK_CHARS = 1 << 15
EXAMPLES = 2
EXCERPT = 500


@dataclass(frozen=True)
class Recipe:
    """What decides a chunk, beside its piece. `model` is a file, and counts by its content."""

    model: Path
    encoder: Encoder
    text_field: str
    val_fraction: float
    rules: CleanConfig | None
    dedup: Dedup
    strict: bool

    def folders(self, work: Path, units: Sequence[Unit]) -> list[Path]:
        """Return where each unit's chunks are."""
        return [work / "chunks" / key(self._content, unit_parts(unit)) for unit in units]

    @functools.cached_property
    def _content(self) -> list[Any]:
        rules = self.rules.fingerprint() if self.rules else None
        model = hashlib.sha256(self.model.read_bytes()).hexdigest()
        options = [
            self.encoder,
            self.text_field,
            self.val_fraction,
            self.dedup != "none",
            self.strict,
        ]
        return [VERSION, library_versions(), model, rules, options]


@dataclass
class _Contents:
    """What the documents of a piece become, in their order; those that stay have an entry each.

    ids: the tokens of train and of val, as they came. lengths: tokens of each document, its eos
    included. sizes: its bytes. held: whether it is in val. ranks: its hash that decided on that.
    """

    documents: list[Document] = field(default_factory=list)
    ids: tuple[list[Ids], list[Ids]] = field(default_factory=lambda: ([], []))
    lengths: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    read: int = 0
    read_bytes: int = 0
    wordless: int = 0
    findings: Findings = field(default_factory=Findings)
    stats: CleanStats = field(default_factory=CleanStats)


class ChunkMaker:
    """Make chunk files; one a worker process. Called with (unit's number, piece, place)."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._tokenizer = Tokenizer.load(recipe.model, recipe.encoder)
        self._clean = Cleaner(recipe.rules) if recipe.rules else None
        self._eos = np.array([self._tokenizer.eos_id], np.int32)

    def __call__(self, item: tuple[int, Piece, Path]) -> ChunkResult:
        unit, piece, path = item
        contents = self._tokenise(piece)
        arrays = self._arrays(contents, self._meta(contents, piece.line_count))
        write_whole(path, lambda beside: save_arrays(beside, arrays))
        tokens = int(arrays["lengths"].sum())
        return ChunkResult(unit, piece.input_bytes, contents.read_bytes, tokens)

    def _tokenise(self, piece: Piece) -> _Contents:
        """Parse, clean and tokenise the documents of a piece."""
        recipe, made = self._recipe, _Contents()
        for document in read_documents(piece, recipe.text_field, made.findings, recipe.strict):
            raw = document.text.encode()
            made.read += 1
            made.read_bytes += len(raw)
            if self._clean:
                verdict = self._clean(document.text, made.stats)
                if not verdict.text:
                    continue
                if verdict.text != document.text:
                    document = document._replace(text=verdict.text)
                    raw = verdict.text.encode()
            encoded = self._tokenizer.encode_parts(document.text)
            if not any(map(len, encoded)):  # a tokenizer that drops spaces, say
                made.wordless += 1
                continue
            rank = text_hash(raw, "split")
            is_held = held_out(rank, recipe.val_fraction)
            made.ids[is_held].extend((*encoded, self._eos))
            made.lengths.append(sum(map(len, encoded)) + 1)
            made.sizes.append(len(raw))
            made.held.append(is_held)
            made.ranks.append(rank)
            made.documents.append(document)
        return made

    def _meta(self, made: _Contents, line_count: int) -> dict[str, Any]:
        """Return what a chunk tells of itself beside its arrays, as plain values."""
        order = np.argsort(np.array(made.ranks, np.uint64), kind="stable")
        by_rank = [made.documents[place] for place in order]
        return {
            "read": made.read,
            "read_bytes": made.read_bytes,
            "lines": line_count,
            "findings": made.findings.to_json(),
            "clean": made.stats.to_json(),
            "wordless": made.wordless,
            "checked": _check(self._tokenizer, by_rank),
            "examples": [_example(document) for document in by_rank[:EXAMPLES]],
            "files": list(dict.fromkeys(document.file for document in made.documents)),
        }

    def _arrays(self, made: _Contents, meta: dict[str, Any]) -> dict[str, Array]:
        """Return the arrays of a chunk, by name."""
        dtype = np.dtype(shards.dtype_for(self._tokenizer.vocab_size))
        train, val = (
            np.concatenate([self._eos[:0], *ids], dtype=dtype, casting="unsafe") for ids in made.ids
        )
        number_of = {name: number for number, name in enumerate(meta["files"])}
        arrays: dict[str, Array] = {
            "train_ids": train,
            "val_ids": val,
            "lengths": np.array(made.lengths, np.uint32),
            "text_bytes": np.array(made.sizes, np.uint32),
            "held": np.array(made.held, bool),
            "origin": np.array([number_of[each.file] for each in made.documents], np.uint32),
            "line": np.array([each.line for each in made.documents], np.uint64),
            "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8),
        }
        if self._recipe.dedup != "none":
            from data_prep.dedup import fingerprints

            arrays["fingerprints"] = fingerprints([each.text for each in made.documents])
        return arrays


class Chunk:
    """A chunk file, read a part at a time. Raises ValueError naming the file if it is damaged."""

    def __init__(self, path: Path):
        self.path = path

    def __getitem__(self, name: str) -> Array:
        [array] = self.read(name)
        return array

    def read(self, *names: str) -> list[Array]:
        """Read several arrays at once, for opening the file takes longer than reading a small
        one."""
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                return [arrays[name] for name in names]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{self.path}: damaged ({error}); remove it and run the same command again to make "
                "it anew"
            ) from error

    @property
    def meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = json.loads(self["meta"].tobytes())
        return meta

    def split_of(self, document: int) -> SplitName:
        """Return the split of the document of this number in the chunk."""
        return "val" if self["held"][document] else "train"


def make_chunks(
    recipe: Recipe, units: Sequence[Unit], folders: Sequence[Path], workers: int, console: Console
) -> list[list[Path]]:
    """Return the chunk files of each unit, in order, in its folder; those that an earlier run left
    are not made again.

    Raises ValueError for input that cannot be read or, in `recipe.strict`, has findings;
    FastPathDiffers.
    """
    return make_missing(
        "tokenise",
        functools.partial(ChunkMaker, recipe),
        lambda unit: read_pieces(unit, recipe.text_field),
        units,
        folders,
        workers,
        console,
    )


def _check(tokenizer: Tokenizer, documents: list[Document]) -> dict[str, int]:
    """Try the tokenizer on CHECK_CHARS of the documents: does the text come back, and does a fast
    encoder agree?

    Raises FastPathDiffers at the first difference from SentencePiece.
    """
    result = {"documents": 0, "bytes": 0, "inexact": 0}
    left = CHECK_CHARS
    for document in documents:
        text = document.text[:left]
        tokenizer.compare_with_sentencepiece(text, f"{document.file}, line {document.line}")
        result["inexact"] += tokenizer.decode(tokenizer.encode(text)) != text
        result["documents"] += 1
        result["bytes"] += len(text.encode())
        left -= len(text)
        if left <= 0:
            break
    return result


def _example(document: Document) -> dict[str, Any]:
    return {"file": document.file, "line": document.line, "text": document.text[:EXCERPT]}
