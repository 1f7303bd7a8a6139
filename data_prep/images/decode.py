"""One image: decoded as a whole, so that what cannot be is found, and converted where it must be.

Nothing large is decoded: MAX_PIXELS are up to 4 bytes each in memory, twice while a mode changes.
"""

import functools
import io
import warnings
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from data_prep.images.findings import Unusable
from data_prep.images.pixels import PixelSums, measure
from data_prep.images.shards import Reencoded, suffix_of

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 1 << 26
MAX_IMAGE_BYTES = 128 << 20
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
SUFFIXES = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class Encoding:
    """How images are stored: as they came, unless one of the first two is asked for; `quality` (1
    to 100) is of JPEG and WebP."""

    resize_shorter: int | None
    reencode: Reencoded | None
    quality: int


class Prepared(NamedTuple):
    """An image as it goes into the set, and the kinds of what was odd about it, with details."""

    data: bytes
    pixels: PixelSums
    found: list[tuple[str, str]]


@functools.cache
def library_versions() -> list[str]:
    """Return the versions of what decodes and encodes: another one may give other bytes."""
    from PIL import features

    codecs = [(name, features.version(name)) for name in ("jpg", "libjpeg_turbo", "zlib", "webp")]
    return [f"pillow {metadata.version('pillow')}", *(f"{name} {found}" for name, found in codecs)]


def prepare_image(data: bytes, name: str, encoding: Encoding) -> Prepared:
    """Decode an image and make of it what the set holds: the same bytes, unless they must or should
    be others. `name` is what its suffix is compared with.

    Raises Unusable.
    """
    if not data:
        raise Unusable("empty", "0 bytes")
    # What decoders think of broken EXIF tags does not matter where the pixels are good.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image, is_animated = _decoded(data)
        suffix = KEPT.get(_format(image), "")
        found = _findings(image, data, suffix, name)
        if is_animated:
            found.append(("animated", "the first frame"))
        upright = _upright(image, found)
        change = any(kind in CONVERTED for kind, _ in found)
        shorter = encoding.resize_shorter
        shrink = bool(shorter and min(upright.size) > shorter)
        if not (change or shrink or encoding.reencode):
            return Prepared(data, measure(_mode(upright, "RGB")), found)
        colours = _colours(upright)
        del image, upright
        if shrink and shorter:
            colours = _shrunk(colours, shorter)
        target = encoding.reencode or ("jpg" if suffix == "jpg" else "png")
        stored = encoded(colours, target, encoding.quality)
        if target != "png":  # its pixels are not quite those that went in
            colours = _opened(stored)
        return Prepared(stored, measure(_mode(colours, "RGB")), found)


CONVERTED = ("cmyk", "sixteen_bit", "animated", "exif_rotated", "other_format")


def encoded(image: "Image", suffix: str, quality: int) -> bytes:
    """Encode an image of mode L or RGB; the same bytes for the same pixels and library."""
    file = io.BytesIO()
    if suffix == "png":
        image.save(file, "PNG")
    elif suffix == "jpg":
        image.save(file, "JPEG", quality=quality)
    else:
        image.save(file, "WEBP", quality=quality)
    return file.getvalue()


def pixels_png(pixels: bytes, width: int, height: int, channels: int) -> bytes:
    """Encode 8-bit pixels (height, width, channels), of 1 or 3 channels, as PNG."""
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    return encoded(Image.frombytes(mode, (width, height), pixels), "png", 0)


def _decoded(data: bytes) -> tuple["Image", bool]:
    """Return the first frame, and whether there are more."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and b"\0\0\0\0" in (data[16:20], data[20:24]):
        raise Unusable("zero_sized", "a PNG of width or height 0")
    image = _opened(data, load=False)
    width, height = image.size
    if not width or not height:
        raise Unusable("zero_sized", f"{width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise Unusable(
            "too_many_pixels", f"{width:,} x {height:,} pixels, at most {MAX_PIXELS:,} are decoded"
        )
    try:
        is_animated = _format(image) != "JPEG" and getattr(image, "is_animated", False)
        image.load()
    except Exception as error:  # every decoder has its own classes
        raise Unusable(_how_broken(data, error), _in_words(error)) from error
    return image, is_animated


def _opened(data: bytes, *, load: bool = True) -> "Image":
    """Read the header of an image, and of one that is known to be good all of it."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if load:
            image.load()
    except Image.DecompressionBombError as error:
        raise Unusable("too_many_pixels", _in_words(error)) from error
    except Exception as error:  # every decoder has its own classes
        raise Unusable(_how_broken(data, error), _in_words(error)) from error
    return image


def _format(image: "Image") -> str:
    # A JPEG with further pictures behind the first, as cameras and phones write.
    return "JPEG" if image.format == "MPO" else image.format or ""


def _how_broken(data: bytes, error: Exception) -> str:
    """Return the kind of finding that an error of a decoder is."""
    from PIL import UnidentifiedImageError

    try:
        suffix = suffix_of(data)
    except ValueError:
        suffix = ""
    short = suffix == "webp" and len(data) < 8 + int.from_bytes(data[4:8], "little")
    if short or "truncated" in str(error).lower() or isinstance(error, EOFError):
        return "truncated"
    return "damaged" if suffix or not isinstance(error, UnidentifiedImageError) else "not_image"


def _in_words(error: Exception) -> str:
    # The address of a buffer is another one each time.
    text = str(error).partition(" <_io.")[0] or type(error).__name__
    return " ".join(text.split())[:200]


def _findings(image: "Image", data: bytes, suffix: str, name: str) -> list[tuple[str, str]]:
    """Return what is odd about an image that was decoded."""
    found = []
    format_name = _format(image)
    if not suffix:
        found.append(("other_format", format_name))
    if image.mode == "CMYK":
        found.append(("cmyk", "mode CMYK"))
    elif image.mode.startswith("I") or (suffix == "png" and data[24] == 16):
        found.append(("sixteen_bit", f"mode {image.mode}"))
    elif image.mode == "F":
        raise Unusable("other_mode", "mode F")
    elif image.mode == "P" and suffix:
        found.append(("palette", "mode P"))
    if image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in image.info:
        found.append(("alpha", f"mode {image.mode}"))
    ending = name[name.rfind(".") :].lower() if "." in name else ""
    if suffix and SUFFIXES.get(ending, suffix) != suffix:
        found.append(("wrong_suffix", f"{format_name} in a name that ends in {ending}"))
    return found


def _upright(image: "Image", found: list[tuple[str, str]]) -> "Image":
    """Return the image turned as its EXIF tag says, and note that in `found`."""
    from PIL import ImageOps

    try:
        turned = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a broken tag turns nothing
        return image
    if turned not in range(2, 9):
        return image
    found.append(("exif_rotated", f"orientation {turned}"))
    return ImageOps.exif_transpose(image)


def _colours(image: "Image") -> "Image":
    """Return the image in mode L or RGB, 8 bits a channel."""
    if image.mode.startswith("I"):
        if image.mode == "I":
            return image.point(lambda value: value * (1 / 256)).convert("L")
        import numpy as np
        from PIL import Image

        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return _mode(image, "L" if image.mode in ("L", "1", "LA") else "RGB")


def _mode(image: "Image", mode: str) -> "Image":
    return image if image.mode == mode else image.convert(mode)


def _shrunk(image: "Image", shorter: int) -> "Image":
    """Return the image with a shorter side of this many pixels: bicubic, over all source pixels."""
    from PIL import Image

    width, height = image.size
    scale = shorter / min(width, height)
    size = (max(shorter, round(width * scale)), max(shorter, round(height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)
