"""The samples of a WebDataset tar."""

import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import closing
from typing import IO, cast

from data_prep.images.decode import MAX_IMAGE_BYTES
from data_prep.images.raw import LABEL_FIELDS, Label, RawImage, Stream, as_label
from data_prep.read.streams import File, Stored, unpacked
from data_prep.read.suffixes import printable

TAR_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm")


class _Header(tarfile.TarInfo):
    """A header of a tar. The library takes one that is damaged, and the lack of an end-of-archive
    mark, for the end; so half a tar would be a short one."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the mark
                raise
            raise tarfile.ReadError(f"{error or 'no end-of-archive mark'}") from error


def read_tar(file: File, label_field: str | None) -> Iterator[tuple[RawImage, int]]:
    """Yield the samples of a tar: neighbouring members of one name up to its first dot."""
    samples = 0
    with closing(Stored(file)) as stored:
        source = cast(IO[bytes], Stream(unpacked(file, stored)))
        try:
            with tarfile.open(fileobj=source, mode="r|", tarinfo=_Header) as tar:
                key, members = "", dict[str, bytes | int]()
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # or it keeps them all
                    folder, _, name = member.name.rpartition("/")
                    base, dot, suffix = name.partition(".")
                    if not (member.isreg() and base and dot):
                        continue
                    if members and f"{folder}/{base}" != key:
                        samples += 1
                        yield _sample(file, key, members, label_field), stored.position
                        members = {}
                    key = f"{folder}/{base}"
                    if (suffix := suffix.lower()) in (*TAR_IMAGES, "cls", "json"):
                        members[suffix] = _content(tar, member)
                    else:
                        members.setdefault("", 0)
                if members:
                    yield _sample(file, key, members, label_field), stored.position
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(
                f"{file.path}: damaged after {samples:,} samples: {error}; expected a whole tar "
                "file, make it again"
            ) from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | int:
    """Return a member's bytes, or how many there are where they are too many."""
    if member.size > MAX_IMAGE_BYTES:
        return member.size
    content = tar.extractfile(member)
    return content.read() if content else b""


def _sample(
    file: File, key: str, members: dict[str, bytes | int], label_field: str | None
) -> RawImage:
    """Make an image of a sample of a tar."""
    key = printable(key.lstrip("/"))
    place = f"{file.name}, sample {key}"
    label = _label_of_sample(place, members, label_field)
    suffix = next((each for each in TAR_IMAGES if each in members), "")
    data = members.get(suffix) if suffix else None
    name = f"{key}.{suffix}" if suffix else key
    if isinstance(data, bytes):
        return RawImage(place, name, label, data, "", len(data))
    return RawImage(place, name, label, None, "", data or 0)


def _label_of_sample(
    place: str, members: dict[str, bytes | int], label_field: str | None
) -> Label | None:
    """Return the label of a sample: its .cls, or a field of its .json."""
    if isinstance(text := members.get("cls"), bytes) and not label_field:
        word = text.decode(errors="replace").strip()
        return int(word) if re.fullmatch(r"-?\d{1,18}", word) else printable(word) or None
    if not isinstance(raw := members.get("json"), bytes):
        return None
    try:
        fields = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{place}: its .json is damaged ({error}); make the tar again") from error
    names = (label_field,) if label_field else LABEL_FIELDS
    found = fields if isinstance(fields, dict) else {}
    return as_label(place, next((found[name] for name in names if name in found), None))
