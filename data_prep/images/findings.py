"""What may be odd about an image, kind by kind, and what becomes of it."""

from typing import Literal, NamedTuple

from data_prep.words import closest

Action = Literal["dropped", "converted", "kept", "passed over"]

# An image that is converted becomes 8 bits a channel, upright and one frame: a JPEG a JPEG again,
# anything else PNG.
KINDS: dict[str, tuple[Action, str]] = {
    "empty": ("dropped", "files of no bytes"),
    "not_image": ("dropped", "no image in a format that is read"),
    "truncated": ("dropped", "the file ends before the image does"),
    "damaged": ("dropped", "the image does not decode"),
    "zero_sized": ("dropped", "a width or height of 0"),
    "too_many_pixels": ("dropped", "more pixels than are decoded: a decompression bomb, perhaps"),
    "too_many_bytes": ("dropped", "a file larger than is read"),
    "other_mode": ("dropped", "pixels that are no colours, such as floating point numbers"),
    "no_image": ("dropped", "rows and samples without an image"),
    "no_label": ("dropped", "rows and samples without a label"),
    "cmyk": ("converted", "printing colours (CMYK), now RGB"),
    "sixteen_bit": ("converted", "16 bits a channel, now 8"),
    "animated": ("converted", "several frames, of which the first is kept"),
    "exif_rotated": ("converted", "turned or mirrored as its EXIF tag says"),
    "other_format": ("converted", "GIF, BMP, TIFF or PPM, now PNG"),
    "palette": ("kept", "colours from a palette, as they are"),
    "alpha": ("kept", "transparency, which decoding to RGB ignores"),
    "wrong_suffix": ("kept", "another format than the name says; the set's name is the right one"),
    "no_class": ("passed over", "images in no class folder"),
    "other_suffix": ("passed over", "files that are no images by their names"),
    "hidden": ("passed over", "files and folders whose name begins with a dot"),
    "prepared_set": ("passed over", "folders that hold a prepared set, not entered"),
    "dead_link": ("passed over", "links to what is not there"),
    "not_a_file": ("passed over", "pipes, sockets and devices"),
}


class Finding(NamedTuple):
    """Something odd: its kind in KINDS, where it is, and what was found."""

    kind: str
    place: str
    detail: str

    @property
    def action(self) -> Action:
        """Return what becomes of what it was found in."""
        return KINDS[self.kind][0]

    def to_json(self) -> dict[str, str]:
        """Return it as a line of rejects.jsonl has it."""
        return {
            "kind": self.kind,
            "file": self.place,
            "action": self.action,
            "detail": self.detail,
        }


class Unusable(Exception):
    """An image cannot be kept; `kind` says why, in KINDS."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind, self.detail = kind, detail


def refuse_unknown_class(label: str | int, place: str, names: list[str]) -> None:
    """Raise ValueError for a label that no class has."""
    likely = closest(str(label), names)
    meant = f"; did you mean {likely!r}?" if likely else ""
    raise ValueError(
        f"{place}: label {label!r} has no class, expected one of the {len(names):,} from "
        f"{names[0]!r} to {names[-1]!r}{meant}; correct the label, or leave the image out"
    )
