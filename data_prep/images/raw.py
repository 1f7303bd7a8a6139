"""What readers of images give: images that are not yet decoded, each with its label."""

from collections.abc import Iterator
from typing import NamedTuple

from data_prep.read.suffixes import printable

# What names of columns and of fields in a sample's .json are taken for a label.
LABEL_FIELDS = ("label", "labels", "cls", "class", "target")
Label = str | int


class RawImage(NamedTuple):
    """An image, not yet decoded.

    place: what a person looks for: "birds/wren/1.jpg", "birds.tar, sample 17", "a.parquet, row 3".
    name: what a list of file names has: below the INPUT, or of the member of a tar; "" for a row.
    label: the name of its class or its number; None where it has none.
    data: its bytes; where None, they are those of `path`, or there are none.
    size: bytes, also where they were too many to be read.
    shape: (height, width, channels) of plain 8-bit pixels, None for an encoded image.
    """

    place: str
    name: str
    label: Label | None
    data: bytes | None
    path: str
    size: int
    shape: tuple[int, int, int] | None = None


def as_label(place: str, value: object) -> Label | None:
    """Return a value of a field or column as a label. Raises ValueError where it can be none."""
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        return printable(value)
    raise ValueError(
        f"{place}: found the label {value!r:.60}, expected a whole number or a name; name another "
        "field with --label-field"
    )


class Stream:
    """Chunks as a file that is read from its beginning."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._held = chunks, bytearray()

    def read(self, size: int) -> bytes:
        while len(self._held) < size and (chunk := next(self._chunks, b"")):
            self._held += chunk
        data = bytes(self._held[:size])
        del self._held[:size]
        return data
