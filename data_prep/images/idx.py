"""IDX files, the format of MNIST and its family: images in one, their labels in another."""

import re
from collections.abc import Iterator
from contextlib import closing

from data_prep.images.raw import RawImage, Stream
from data_prep.read.streams import File, Stored, packing, unpacked
from data_prep.read.suffixes import bare_name


def labels_path(path: str) -> str:
    """Return where the labels of an IDX file of images are: train-images-idx3-ubyte has
    train-labels-idx1-ubyte beside it."""
    head, _, name = path.rpartition("/")
    name = re.sub(r"idx[34]", "idx1", name.replace("images", "labels"))
    return f"{head}/{name}" if head else name


def is_idx_images(name: str) -> bool:
    """Whether a file is one of IDX images, by its name."""
    return bool(re.search(r"images?[-.]idx[34]-ubyte$", bare_name(name))) and packing(name) in (
        "",
        ".gz",
    )


def read_idx(images: File, labels: File) -> Iterator[tuple[RawImage, int]]:
    """Yield the images of an IDX file with the labels of another, both of unsigned bytes."""
    with closing(Stored(images)) as stored, closing(Stored(labels)) as stored_labels:
        pixels = Stream(unpacked(images, stored))
        classes = Stream(unpacked(labels, stored_labels))
        count, *shape = _idx_header(images, pixels, (3, 4))
        [total] = _idx_header(labels, classes, (1,))
        height, width, channels = (*shape, 1)[:3]
        if total != count or channels not in (1, 3) or not height or not width:
            raise ValueError(
                f"{images.path}: found {count:,} images of {height} x {width} x {channels} and "
                f"{total:,} labels in {labels.path}, expected as many labels as images of 1 or 3 "
                "channels"
            )
        for number in range(count):
            data, label = pixels.read(height * width * channels), classes.read(1)
            if len(data) < height * width * channels or not label:
                short = images if len(data) < height * width * channels else labels
                raise ValueError(
                    f"{short.path}: ends after {number:,} of {count:,} images; expected a whole "
                    "file, fetch it again"
                )
            place = f"{images.name}, image {number}"
            shape3 = (height, width, channels)
            yield RawImage(place, "", label[0], data, "", len(data), shape3), stored.position
        for file, rest in ((images, pixels), (labels, classes)):
            if rest.read(1):
                raise ValueError(f"{file.path}: goes on after its {count:,} items; fetch it again")


def _idx_header(file: File, stream: Stream, dimensions: tuple[int, ...]) -> list[int]:
    """Return the sizes that the header of an IDX file of unsigned bytes tells. Raises
    ValueError."""
    magic = stream.read(4)
    if magic[:3] != b"\0\0\x08" or magic[3] not in dimensions:
        several = " or ".join(map(str, dimensions))
        raise ValueError(
            f"{file.path}: begins with {magic!r}, expected an IDX file of unsigned bytes in "
            f"{several} dimensions"
        )
    raw = stream.read(4 * magic[3])
    if len(raw) < 4 * magic[3]:
        raise ValueError(f"{file.path}: ends inside its header; fetch it again")
    return [int.from_bytes(raw[at : at + 4], "big") for at in range(0, len(raw), 4)]
