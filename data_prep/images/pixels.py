"""What is measured of an image's pixels: sums for mean and standard deviation, and a hash."""

from typing import TYPE_CHECKING, NamedTuple

import xxhash

if TYPE_CHECKING:
    from PIL.Image import Image

STRIP_PIXELS = 1 << 20  # are copied at once


class PixelSums(NamedTuple):
    """An image's RGB pixels: `hash` is XXH3-128 of size and pixels as (low, high); `sums` and
    `squares` are those of the values 0 to 255 of R, G and B, whole numbers."""

    width: int
    height: int
    hash: tuple[int, int]
    sums: tuple[int, int, int]
    squares: tuple[int, int, int]


def measure(image: "Image") -> PixelSums:
    """Measure an image of mode RGB; in strips, so that no second copy of a large one is made."""
    width, height = image.size
    digest = xxhash.xxh3_128(f"{width}x{height}".encode())
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(height, top + rows)))
        digest.update(strip.tobytes())
    high, low = divmod(digest.intdigest(), 1 << 64)
    counts = image.histogram()
    bands = [counts[256 * band : 256 * (band + 1)] for band in range(3)]
    sums = [sum(value * count for value, count in enumerate(band)) for band in bands]
    squares = [sum(value * value * count for value, count in enumerate(band)) for band in bands]
    return PixelSums(
        width,
        height,
        (low, high),
        (sums[0], sums[1], sums[2]),
        (squares[0], squares[1], squares[2]),
    )
