"""Raw images out of a unit, in pieces of some MB."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from data_prep.images.idx import read_idx
from data_prep.images.parquet import class_names, read_parquet
from data_prep.images.raw import RawImage
from data_prep.images.tars import read_tar
from data_prep.read.pieces import Unit
from data_prep.read.streams import File

PIECE_BYTES = 16 << 20
PIECE_IMAGES = 512


class ImagePiece(NamedTuple):
    """Some images of a unit. `input_bytes` are those of the unit that were read since the piece
    before; `class_names` the names of the classes where the file tells them."""

    number: int
    images: tuple[RawImage, ...]
    input_bytes: int
    class_names: tuple[str, ...] = ()


def read_pieces(unit: Unit, label_field: str | None) -> Iterator[ImagePiece]:
    """Yield the pieces of a unit, of up to PIECE_BYTES or PIECE_IMAGES; a function of the unit's
    content alone.

    Raises ValueError naming the file if it is missing, cannot be read, is damaged or changed, or
    has no image or no label where it should.
    """
    names: tuple[str, ...] = ()
    match unit.files[0].kind:
        case "image":
            images = _in_class_folders(unit.files)
        case "tar":
            images = read_tar(unit.files[0], label_field)
        case "parquet":
            images = read_parquet(unit.files[0], label_field)
            names = class_names(unit.files[0], label_field)
        case _:
            images = read_idx(*unit.files)
    before = 0
    for number, (some, position) in enumerate(_gathered(images)):
        yield ImagePiece(number, some, position - before, names)
        before = position


def _gathered(
    images: Iterable[tuple[RawImage, int]],
) -> Iterator[tuple[tuple[RawImage, ...], int]]:
    """Yield images together, out of (an image, stored bytes read)."""
    some: list[RawImage] = []
    size = position = 0
    for image, now in images:
        if some and (size + image.size > PIECE_BYTES or len(some) == PIECE_IMAGES):
            yield tuple(some), position
            some, size = [], 0
        some.append(image)
        size += image.size
        position = now
    if some:
        yield tuple(some), position


def _in_class_folders(files: Iterable[File]) -> Iterator[tuple[RawImage, int]]:
    """Name the images of files "SOURCE/CLASS/...": a worker reads them."""
    position = 0
    for file in files:
        position += file.size
        below = file.name.partition("/")[2]
        yield RawImage(file.name, below, below.split("/")[0], None, file.path, file.size), position
