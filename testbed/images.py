"""Small images drawn from a seed, as files in class folders and as a set."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from data_prep.files import sha256_of
from data_prep.images.options import ImageOptions
from data_prep.images.pipeline import prepare_images
from data_prep.images.pixels import measure
from data_prep.images.shards import (
    ClassInfo,
    ImageManifest,
    ImageSetOptions,
    ImageSource,
    ImageSplit,
    PixelStats,
    Sample,
    SplitReader,
    index_name,
    write_manifest,
    write_shard,
)
from data_prep.set_files import SplitName, shard_name

CLASSES = ("bar", "cross", "disc")


def drawn(label: int, number: int, side: int = 32, seed: int = 0) -> Image.Image:
    """Draw an image (side, side) of one of CLASSES, of its own colours, place and noise: a bar, a
    cross or a disc on a ground."""
    draw = np.random.default_rng([seed, label, number])
    ground, colour = draw.integers(0, 256, (2, 3))
    x, y = draw.integers(side // 4, 3 * side // 4, 2)
    rows, columns = np.mgrid[:side, :side]
    near = [abs(columns - x) < side // 8, abs(rows - y) < side // 8]
    shape = [near[0], near[0] | near[1], (rows - y) ** 2 + (columns - x) ** 2 < (side // 4) ** 2]
    pixels = np.where(shape[label % 3][..., None], colour, ground)
    noisy = pixels + draw.integers(-20, 21, (side, side, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, suffix: str = "png") -> bytes:
    """Encode an image as png, jpg or webp."""
    file = io.BytesIO()
    image.save(file, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    return file.getvalue()


def class_folders(folder: Path, images: int = 30, side: int = 32, seed: int = 0) -> Path:
    """Write `images` drawn images as FOLDER/CLASS/NUMBER.png or .jpg, by turns; classes by turns
    too."""
    for number in range(images):
        label, suffix = number % len(CLASSES), ("png", "jpg")[number // len(CLASSES) % 2]
        path = folder / CLASSES[label] / f"{number:05}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(drawn(label, number, side, seed), suffix))
    return folder


def prepared(inputs: list[Path | str], out: Path, **options: Any) -> tuple[ImageManifest, str]:
    """Prepare an image set with one worker; its manifest, and what was said on the way."""
    console = Console(file=io.StringIO(), width=200)
    asked = ImageOptions(**{"inputs": inputs, "out": out, "workers": 1, **options})
    manifest = prepare_images(asked, console)
    assert manifest
    return manifest, console.file.getvalue()


def stored(out: Path, manifest: ImageManifest, split: SplitName) -> dict[bytes, str]:
    """The images of a split, each with the name of its class."""
    with contextlib.closing(SplitReader(out, manifest, split)) as reader:
        labels = reader.labels.tolist()
        return {reader.read(n): manifest.classes[labels[n]].name for n in range(len(reader))}


def small_image_set(
    out: Path,
    train: int = 96,
    val: int = 24,
    side: int = 32,
    images_per_shard: int = 40,
    seed: int = 0,
) -> ImageManifest:
    """Write a set of drawn images of CLASSES, PNG and JPEG by turns, in `out`; in well under a
    second for the default size. It is what `dnt data images` makes, but for its report."""
    out.mkdir(parents=True)
    totals = np.zeros((2, 3), np.int64)
    pixels = image_bytes = 0
    splits: dict[SplitName, ImageSplit] = {}

    def samples(name: SplitName, numbers: range) -> Iterator[Sample]:
        nonlocal pixels, totals
        for number in numbers:
            label, suffix = number % len(CLASSES), ("png", "jpg")[number // len(CLASSES) % 2]
            data = encoded(drawn(label, number + (name == "val") * train, side, seed), suffix)
            found = measure(Image.open(io.BytesIO(data)).convert("RGB"))
            if name == "train":
                pixels += side * side
                totals += np.array([found.sums, found.squares])
            yield Sample(data, label, side, side, found.hash)

    counts: dict[SplitName, int] = {"train": train, "val": val}
    for name, count in counts.items():
        shards, size = [], 0
        for number, first in enumerate(range(0, count, images_per_shard)):
            file = shard_name(name, number)
            chosen = list(samples(name, range(first, min(count, first + images_per_shard))))
            size += sum(len(sample.data) for sample in chosen)
            shards.append(write_shard(out / file, file, chosen, first))
            assert sha256_of(out / index_name(file)) == shards[-1].index_sha256
        if count:
            splits[name] = ImageSplit(images=count, image_bytes=size, shards=tuple(shards))
            image_bytes += size
    manifest = ImageManifest(
        format="dnt-images",
        version=1,
        options=ImageSetOptions(
            resize_shorter=None,
            reencode=None,
            quality=95,
            val_fraction=None,
            dedup="none",
            shard_bytes=1 << 20,
            seed=seed,
        ),
        statistics=PixelStats.of(pixels, totals[0].tolist(), totals[1].tolist()),
        sources=(ImageSource(name="drawn", images=train + val, image_bytes=image_bytes),),
        classes=tuple(
            ClassInfo(
                name=name,
                images={split: len(range(label, counts[split], 3)) for split in splits},
            )
            for label, name in enumerate(CLASSES)
        ),
        splits=splits,
    )
    write_manifest(out, manifest)
    return manifest
