"""A piece of the input becomes a chunk: its images decoded, measured and, where asked for, made
anew.

A chunk is a function of the recipe and the piece alone, so it is the same on any number of workers
and any machine. It is two files: NAME.bin has the images' bytes one after the other, NAME.npz the
arrays of `ROW`, and comes last.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data_prep.arrays import Array
from data_prep.chunk_files import ChunkResult, make_missing, save_arrays
from data_prep.files import write_whole
from data_prep.identity import unit_parts
from data_prep.images.decode import (
    MAX_IMAGE_BYTES,
    Encoding,
    Prepared,
    library_versions,
    pixels_png,
    prepare_image,
)
from data_prep.images.findings import Finding, Unusable
from data_prep.images.options import ImageOptions, read_val_list
from data_prep.images.raw import Label, RawImage
from data_prep.images.read import ImagePiece, read_pieces
from data_prep.read.pieces import Unit
from data_prep.read.streams import open_file
from data_prep.work_folder import key

VERSION = 1  # raise it when the code makes another chunk of the same piece
# What a chunk tells of each image that stays. offset, size: in NAME.bin. label: its place in the
# chunk's own list. pixels, sums, squares: see data_prep.images.pixels. held: whether a list of
# validation images names it.
ROW = np.dtype(
    [
        ("offset", np.uint64),
        ("size", np.uint32),
        ("label", np.uint32),
        ("width", np.uint32),
        ("height", np.uint32),
        ("pixels", np.uint64, (2,)),
        ("sums", np.int64, (3,)),
        ("squares", np.int64, (3,)),
        ("held", np.bool_),
    ]
)


@dataclass(frozen=True)
class ImageRecipe:
    """What decides a chunk, beside its piece; `held` are the names of validation images."""

    encoding: Encoding
    label_field: str | None
    held: frozenset[str]
    strict: bool

    def folders(self, work: Path, units: Sequence[Unit]) -> list[Path]:
        """Return where each unit's chunks are."""
        encoding = self.encoding
        asked = [encoding.resize_shorter, encoding.reencode, encoding.quality]
        rest = [self.label_field, sorted(self.held), self.strict]
        recipe = key("images", VERSION, library_versions(), asked, rest)
        return [work / "chunks" / key(recipe, unit_parts(unit)) for unit in units]


def recipe_of(options: ImageOptions) -> ImageRecipe:
    """Return what decides the chunks. Raises ValueError for a list of names that cannot be
    read."""
    held = read_val_list(options)
    return ImageRecipe(options.encoding, options.label_field, held, options.strict)


@dataclass
class _Contents:
    """What the images of a piece become."""

    rows: list[tuple[Any, ...]] = field(default_factory=list)
    labels: dict[Label, int] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)
    matched: set[str] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)
    size: int = 0


class ImageChunkMaker:
    """Make chunk files; one a worker process. Called with (unit's number, piece, place)."""

    def __init__(self, recipe: ImageRecipe):
        self._recipe = recipe

    def __call__(self, item: tuple[int, ImagePiece, Path]) -> ChunkResult:
        unit, piece, path = item
        made = _Contents()
        write_whole(data_path(path), lambda beside: self._write_images(beside, piece, made))
        meta = {
            "read": len(piece.images),
            "labels": list(made.labels),
            "places": made.places,
            "class_names": piece.class_names,
            "matched": sorted(made.matched),
            "findings": made.findings,
        }
        arrays: dict[str, Array] = {
            "rows": np.array(made.rows, ROW),
            "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8),
        }
        write_whole(path, lambda beside: save_arrays(beside, arrays))
        return ChunkResult(unit, piece.input_bytes, made.size, 0)

    def _write_images(self, path: Path, piece: ImagePiece, made: _Contents) -> None:
        """Write the images that stay one after the other, and note in `made` what there is."""
        with path.open("wb") as file:
            for image in piece.images:
                file.write(self._take(image, made))

    def _take(self, image: RawImage, made: _Contents) -> bytes:
        """Prepare an image and return its bytes, or none and note why it is left out."""
        if image.label is None:
            self._note(made, Finding("no_label", image.place, "no label"))
            return b""
        if image.label not in made.labels:
            made.labels[image.label] = len(made.labels)
            made.places.append(image.place)
        names = {image.name, image.place} & self._recipe.held
        made.matched |= names
        try:
            ready = self._prepare(image)
        except Unusable as error:
            self._note(made, Finding(error.kind, image.place, error.detail))
            return b""
        for kind, detail in ready.found:
            self._note(made, Finding(kind, image.place, detail))
        pixels = ready.pixels
        place = (made.size, len(ready.data), made.labels[image.label], pixels.width, pixels.height)
        made.rows.append((*place, pixels.hash, pixels.sums, pixels.squares, bool(names)))
        made.size += len(ready.data)
        return ready.data

    def _prepare(self, image: RawImage) -> Prepared:
        """Read and decode an image. Raises Unusable; ValueError if its file cannot be read."""
        if image.size > MAX_IMAGE_BYTES:
            detail = f"{image.size:,} bytes, at most {MAX_IMAGE_BYTES:,} are read"
            raise Unusable("too_many_bytes", detail)
        data = image.data
        if data is None:
            if not image.path:
                raise Unusable("no_image", "no bytes of an image")
            data = _content(image)
        if image.shape:
            data = pixels_png(data, *image.shape)
        return prepare_image(data, image.name, self._recipe.encoding)

    def _note(self, made: _Contents, finding: Finding) -> None:
        """Note a finding. Raises ValueError for one that `strict` does not stand."""
        if self._recipe.strict and finding.action in ("dropped", "converted"):
            raise ValueError(
                f"{finding.place}: {finding.kind}: {finding.detail}; mend it, or leave out --strict"
            )
        made.findings.append(finding)


def _content(image: RawImage) -> bytes:
    """Return the bytes of an image in a file. Raises ValueError if they cannot be read."""
    try:
        with open_file(image.path) as file:
            data: bytes = file.read()
    except Exception as error:  # every remote file system has its own classes
        why = getattr(error, "strerror", None) or f"{type(error).__name__} {error}".strip()
        raise ValueError(
            f"{image.path}: cannot be read: {why}; check the file, then run again"
        ) from error
    if image.size and len(data) != image.size:
        raise ValueError(
            f"{image.path}: found {len(data):,} bytes, expected {image.size:,}: it was changed "
            "while it was read, or the connection broke; run the command again"
        )
    return data


def data_path(chunk: Path) -> Path:
    """Return where the bytes of a chunk's images are."""
    return chunk.with_suffix(".bin")


def read_chunk(chunk: Path) -> tuple[Array, dict[str, Any]]:
    """Return a chunk's rows, an array of ROW, and what it tells beside them. Raises ValueError
    naming the file if it is damaged."""
    import zipfile

    try:
        with np.load(chunk, allow_pickle=False) as arrays:
            rows, meta = arrays["rows"], json.loads(arrays["meta"].tobytes())
        size = data_path(chunk).stat().st_size
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{chunk}: damaged ({error}); remove it and run the same command again to make it anew"
        ) from error
    if size != int(rows["size"].sum(dtype=np.uint64)):
        raise ValueError(
            f"{data_path(chunk)}: {size:,} bytes do not fit {chunk.name}; remove both and run the "
            "same command again to make them anew"
        )
    meta["findings"] = [Finding(*each) for each in meta["findings"]]
    return rows, meta


def make_image_chunks(
    recipe: ImageRecipe,
    units: Sequence[Unit],
    folders: Sequence[Path],
    workers: int,
    console: Console,
) -> list[list[Path]]:
    """Return the chunk files of each unit, in order, in its folder; those that an earlier run left
    are not made again. Raises ValueError for input that cannot be read, or in `recipe.strict` kept
    as it is."""
    return make_missing(
        "decode",
        functools.partial(ImageChunkMaker, recipe),
        lambda unit: read_pieces(unit, recipe.label_field),
        units,
        folders,
        workers,
        console,
    )
