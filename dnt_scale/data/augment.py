"""What is done to an image before a model sees it: JPEGs are decoded by simplejpeg, all else by
Pillow, random crops resized by torch; choices are made by a generator that is given.

Every random choice comes out of a generator of (seed, position), so pixels are a function of these
and of the image, in whatever process they are made.
"""

import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image, ImageEnhance, ImageOps

if TYPE_CHECKING:
    from dnt_scale.config import AugmentSection

Pixels = npt.NDArray[np.uint8]  # (3, size, size)
Box = tuple[float, float, float, float]  # left, top, right, bottom

# What a position's draws are for; each has a stream of its own.
IMAGE, MIX, KEY = 1, 2, 3


def draws(seed: int, position: int, purpose: int) -> np.random.Generator:
    """Return the generator of a position. The order of rows counts up from 0 in the same cipher,
    these begin beyond what it reaches.
    """
    key = np.array([seed, position], dtype=np.uint64)
    counter = np.array([0, 0, 0, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class Part(NamedTuple):
    """Pixels of an image around a box, uint8 (height, width, 3), and where in them the box lies."""

    pixels: npt.NDArray[np.uint8]
    box: Box


def part_of(data: bytes, size: int, box_of: Callable[[int, int], Box]) -> Part:
    """Return what of an encoded image takes part in ``size`` x ``size`` pixels of a box of it.

    Of a JPEG that is several times larger than it has to be, the decoder makes a half, a quarter or
    an eighth of the pixels (``reduction``).

    Args:
        box_of: gives the box in an image of this width and height.

    Raises:
        OSError, SyntaxError, ValueError: it does not decode.
    """
    if data[:2] == b"\xff\xd8":
        # What a JPEG warns of, such as bytes that are too many, Pillow does not mind either.
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        if colours in ("YCbCr", "Gray", "RGB"):
            box = box_of(width, height)
            less = reduction(box, size)
            pixels = simplejpeg.decode_jpeg(
                data,
                "RGB",
                min_height=-(-height // less),
                min_width=-(-width // less),
                min_factor=less,
                strict=False,
            )
            left, top, right, bottom = (edge / less for edge in box)
            return _around(pixels, size, (left, top, right, bottom))
    image = Image.open(io.BytesIO(data))
    box = box_of(*image.size)
    return Part(np.array(image.convert("RGB")), box)


def _around(pixels: npt.NDArray[np.uint8], size: int, box: Box) -> Part:
    """Return the pixels of a box, and those around it as far as the filter reaches."""
    left, top, right, bottom = box
    reach = 1 + math.ceil(max(right - left, bottom - top) / size)
    x, y = max(0, math.floor(left) - reach), max(0, math.floor(top) - reach)
    near = pixels[y : math.ceil(bottom) + reach, x : math.ceil(right) + reach]
    return Part(near, (left - x, top - y, right - x, bottom - y))


def reduction(box: Box, size: int) -> int:
    """Return the largest of 8, 4, 2 and 1 by which a box can be shrunk that still has ``size``
    pixels a side.
    """
    left, top, right, bottom = box
    shorter = min(right - left, bottom - top)
    return next((less for less in (8, 4, 2) if shorter >= less * size), 1)


def resized(image: Image.Image, size: int, box: Box) -> Image.Image:
    """Return a box of an image as ``size`` x ``size`` pixels: bilinear, over all source pixels."""
    return image.resize((size, size), Image.Resampling.BILINEAR, box)


def as_array(image: Image.Image) -> Pixels:
    """Return the pixels of an RGB image, channels first, to be read only."""
    channels = b"".join(image.tobytes("raw", channel) for channel in "RGB")
    return np.frombuffer(channels, np.uint8).reshape(3, image.height, image.width)


def middle_box(width: int, height: int, share: float) -> Box:
    """Return the square in the middle that takes ``share`` of the shorter side."""
    side = share * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def middle(data: bytes, size: int, share: float) -> Pixels:
    """Return the middle of an image, as ``middle_box``, without any choice."""
    return resized_by_pillow(
        part_of(data, size, lambda width, height: middle_box(width, height, share)), size
    )


def resized_by_pillow(part: Part, size: int) -> Pixels:
    """Return a box as ``size`` x ``size`` pixels, wherever in a pixel it begins and ends."""
    height, width, _ = part.pixels.shape
    image = Image.new("RGB", (width, height), None)  # None: not filled first
    image.frombytes(part.pixels.tobytes())
    return as_array(resized(image, size, part.box))


def resized_by_torch(part: Part, size: int) -> Pixels:
    """Return a box, its edges rounded to whole pixels, as ``size`` x ``size`` pixels: a random crop
    of a JPEG that was decoded at a part of its size moves by half a pixel of the result at most.

    Bilinear and over all source pixels as ``resized``, in a third of its time; pixels differ from
    its by 1 at most, but at the box's edges, for nothing beyond them is looked at.
    """
    left, top, right, bottom = map(round, part.box)
    near = part.pixels[top : max(bottom, top + 1), left : max(right, left + 1)]
    inside = torch.from_numpy(near).permute(2, 0, 1)[None]
    out = torch.nn.functional.interpolate(inside, (size, size), mode="bilinear", antialias=True)
    return out[0].numpy()


def augmented(
    data: bytes, size: int, share: float, recipe: "AugmentSection", draw: np.random.Generator
) -> Pixels:
    """Return a training image's pixels: the crop, the flip, RandAugment, the erased rectangle.

    Args:
        share: as of ``middle_box``, for a recipe without a random crop.
    """

    if limits := recipe.crop:
        part = part_of(data, size, lambda width, height: random_box(width, height, *limits, draw))
        pixels = resized_by_torch(part, size)
    else:
        pixels = middle(data, size, share)
    if draw.random() < recipe.flip:
        pixels = pixels[:, :, ::-1]
    if recipe.randaugment:
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        for _ in range(recipe.randaugment):
            image = one_operation(image, recipe, draw)
        pixels = as_array(image)
    if draw.random() < recipe.erase:
        pixels = erased(pixels, draw)
    return pixels


def random_box(
    width: int, height: int, least: float, most: float, draw: np.random.Generator
) -> Box:
    """Return a rectangle of a random share of the area and a side ratio of 3/4 to 4/3; the largest
    one of such a ratio in the middle where ten tries do not fit (arXiv 1409.4842, as torchvision).
    """
    for _ in range(10):
        area = draw.uniform(least, most) * width * height
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(draw.integers(0, width - w + 1)), int(draw.integers(0, height - h + 1))
            return x, y, x + w, y + h
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


# --- RandAugment ----------------------------------------------------------------------------------


def _moved(image: Image.Image, *matrix: float) -> Image.Image:
    """Return the image under an affine map of places, grey where it has none."""
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        Image.Resampling.BILINEAR,
        fillcolor=(128, 128, 128),
    )


def _solarize_add(image: Image.Image, add: int) -> Image.Image:
    """Return the image with its darker half made lighter."""
    table = [min(255, value + add) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


def _enhanced(kind: type) -> Callable[[Image.Image, float, int], Image.Image]:
    """Return an operation that moves away from an image without some property, or towards it."""

    def change(image: Image.Image, level: float, sign: int) -> Image.Image:
        found: Image.Image = kind(image).enhance(1 + sign * 0.9 * level)
        return found

    return change


# Each is called with an image, a level from 0 to 1, and a sign, 1 or -1. These are timm's
# "increasing" operations, the ones that DeiT was trained with.
OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "auto contrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
    "posterize": lambda image, level, sign: ImageOps.posterize(image, max(1, 4 - int(4 * level))),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - int(256 * level)),
    "solarize add": lambda image, level, sign: _solarize_add(image, int(110 * level)),
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "rotate": lambda image, level, sign: image.rotate(
        sign * 30 * level, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
    ),
    "shear x": lambda image, level, sign: _moved(image, 1, sign * 0.3 * level, 0, 0, 1, 0),
    "shear y": lambda image, level, sign: _moved(image, 1, 0, 0, sign * 0.3 * level, 1, 0),
    "move x": lambda image, level, sign: _moved(
        image, 1, 0, sign * 0.45 * level * image.width, 0, 1, 0
    ),
    "move y": lambda image, level, sign: _moved(
        image, 1, 0, 0, 0, 1, sign * 0.45 * level * image.height
    ),
}


def one_operation(
    image: Image.Image, recipe: "AugmentSection", draw: np.random.Generator
) -> Image.Image:
    """Return the image after one operation of RandAugment (arXiv 1909.13719), or as it is in half
    of the cases, as timm does.
    """
    change = list(OPERATIONS.values())[draw.integers(len(OPERATIONS))]
    level = min(max(draw.normal(recipe.magnitude, recipe.magnitude_std), 0.0), 10.0) / 10
    sign = 1 if draw.random() < 0.5 else -1
    return change(image, level, sign) if draw.random() < 0.5 else image


def erased(pixels: Pixels, draw: np.random.Generator) -> Pixels:
    """Return the pixels with noise in a rectangle of 2 % to a third of the area (arXiv 1708.04896,
    DeiT's settings); as they are where ten tries do not fit.
    """
    _, height, width = pixels.shape
    for _ in range(10):
        area = draw.uniform(0.02, 1 / 3) * width * height
        ratio = math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w < width and 0 < h < height:
            top, left = draw.integers(0, height - h + 1), draw.integers(0, width - w + 1)
            pixels = pixels.copy()
            pixels[:, top : top + h, left : left + w] = draw.integers(0, 256, (3, h, w), np.uint8)
            break
    return pixels


# --- two images together --------------------------------------------------------------------------


class Mixed(NamedTuple):
    """Two images of a pair together, and the share of the target that is each one's own."""

    first: Pixels
    second: Pixels
    share: float


def mixed(
    first: Pixels, second: Pixels, recipe: "AugmentSection", draw: np.random.Generator
) -> Mixed:
    """Mix the images of a pair into each other, by mixup (arXiv 1710.09412) or cutmix (arXiv
    1905.04899).
    """
    cut = recipe.cutmix > 0 and (recipe.mixup == 0 or draw.random() < 0.5)
    alpha = recipe.cutmix if cut else recipe.mixup
    share = draw.beta(alpha, alpha)
    if not cut:
        means = share * first + (1 - share) * second, share * second + (1 - share) * first
        one, other = (np.rint(mean).astype(np.uint8) for mean in means)
        return Mixed(one, other, share)
    _, height, width = first.shape
    h, w = round(height * math.sqrt(1 - share)), round(width * math.sqrt(1 - share))
    y, x = int(draw.integers(height)) - h // 2, int(draw.integers(width)) - w // 2
    rows, columns = slice(max(0, y), max(0, y + h)), slice(max(0, x), max(0, x + w))
    one, other = first.copy(), second.copy()
    one[:, rows, columns], other[:, rows, columns] = (
        second[:, rows, columns],
        first[:, rows, columns],
    )
    covered = first[0, rows, columns].size
    return Mixed(one, other, 1 - covered / (height * width))
