"""THE FORMAT of image sets: plain WebDataset tars of KEY.cls and KEY.jpg (or .png .webp), an index
beside each, and a manifest that can prove them whole.

Sample i of a split has the key f"{i:08d}". KEY.cls holds its label, the number of its class, in
decimal digits. Every image decodes to 8 bits a channel; PIL's `convert("RGB")` is what mean,
standard deviation and the hash of the pixels are taken of. Samples are in an order of the seed in
which classes are mixed, except that those of `--append` follow those that were there.

The index of `train-000000.tar` is `train-000000.idx.npy`, an array of `INDEX`, a sample each: with
it a sample is one read of the tar.
"""

import contextlib
import hashlib
import io
import os
import zlib
from collections.abc import Iterable
from itertools import accumulate
from math import sqrt
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, FiniteFloat, model_validator

from data_prep.set_files import MANIFEST as MANIFEST
from data_prep.set_files import (
    TAR_BLOCK,
    Count,
    HashingFile,
    Positive,
    SetModel,
    Sha256,
    SplitName,
    check_equal,
    file_problem,
    new_tar,
    padded,
    read_manifest_as,
    shard_name,
    tar_header,
)
from data_prep.set_files import manifest_sha256 as manifest_sha256
from data_prep.set_files import write_manifest as write_manifest

FORMAT = "dnt-images"
VERSION = 1
SUFFIXES = ("jpg", "png", "webp")
# A label begins so many bytes before its image: in a block of its own, then the image's header.
LABEL_BEFORE = 2 * TAR_BLOCK
NEAR = 1 << 14  # bytes between two samples that are quicker read along than passed over
# At most so many bytes are asked of the system at a time: of more, Linux reads no more than its
# readahead is long, which is 128 KiB unless somebody sets it, or a request of the disk.
ADVISED = 1 << 17
OPEN_FILES = 128  # tars at a time, of a split that may have thousands: a window of the order's

# offset, size: of the image in the tar, in bytes; its label is LABEL_BEFORE it.
# crc32: of the image's bytes. width, height: pixels. pixels: XXH3-128 of size and RGB pixels.
INDEX = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),
        ("label", "<u4"),
        ("crc32", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("pixels", "<u8", (2,)),
    ]
)
Index = np.ndarray[Any, np.dtype[np.void]]
Dedup = Literal["none", "exact"]
Reencoded = Literal["jpg", "webp"]
Channels = tuple[FiniteFloat, FiniteFloat, FiniteFloat]


class Sample(NamedTuple):
    """An image as it is stored, and its label. `pixels` is the hash in `INDEX`, as (low, high)."""

    data: bytes
    label: int
    width: int
    height: int
    pixels: tuple[int, int]


class ImageShard(SetModel):
    """One tar file of `images` samples; `index_sha256` is that of the index beside it."""

    file: Annotated[str, Field(pattern=r"^(train|val)-\d{6,}\.tar$")]
    images: Positive
    bytes: Positive
    sha256: Sha256
    index_sha256: Sha256

    @property
    def index(self) -> str:
        """Return the name of the index."""
        return index_name(self.file)


class ImageSplit(SetModel):
    """Train or val: `image_bytes` are those of the images alone."""

    images: Positive
    image_bytes: Positive
    shards: tuple[ImageShard, ...]


class ClassInfo(SetModel):
    """A class; its place in the list is the label. `images` are counted by split."""

    name: str
    images: dict[SplitName, Count]


class PixelStats(SetModel):
    """The train split's pixels: how many, and for R, G and B the sums of their values 0 to 255 and
    of the squares; `mean` and `std` are of the values divided by 255."""

    pixels: Positive
    sums: tuple[Count, Count, Count]
    squares: tuple[Count, Count, Count]
    mean: Channels
    std: Channels

    @classmethod
    def of(cls, pixels: int, sums: Iterable[int], squares: Iterable[int]) -> "PixelStats":
        """Return the statistics of these sums; whole numbers of any size."""
        r, g, b = sums
        rr, gg, bb = squares
        # Whole numbers up to the last step: no order of adding up changes a bit.
        spread = [pixels * q - s * s for s, q in ((r, rr), (g, gg), (b, bb))]
        mean = (r / (255 * pixels), g / (255 * pixels), b / (255 * pixels))
        one, two, three = (sqrt(each / (pixels * pixels)) / 255 for each in spread)
        return cls(
            pixels=pixels, sums=(r, g, b), squares=(rr, gg, bb), mean=mean, std=(one, two, three)
        )


class ImageSource(SetModel):
    """One INPUT: the images that stayed, their bytes, the findings by kind
    (data_prep.images.findings), and how many were `duplicates`."""

    name: str
    images: Count
    image_bytes: Count
    findings: dict[str, Positive] = Field(default_factory=dict)
    duplicates: Count = 0


class ImageSetOptions(SetModel):
    """The options that decide the bytes. `val_fraction` is null where the images of val were
    named."""

    resize_shorter: Positive | None
    reencode: Reencoded | None
    quality: Annotated[int, Field(ge=1, le=100)]
    val_fraction: Annotated[float, Field(ge=0, lt=1)] | None
    dedup: Dedup
    shard_bytes: Positive
    seed: Count


class ImageManifest(SetModel):
    """manifest.json of an image set; its numbers are checked against one another."""

    format: Literal["dnt-images"]
    version: Literal[1]
    options: ImageSetOptions
    statistics: PixelStats
    sources: tuple[ImageSource, ...]
    classes: tuple[ClassInfo, ...]
    splits: dict[SplitName, ImageSplit]

    @property
    def class_names(self) -> list[str]:
        """Return the names of the classes, by label."""
        return [each.name for each in self.classes]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "train" not in self.splits:
            raise ValueError('splits has no "train"')
        if len(set(self.class_names)) < len(self.classes):
            raise ValueError("classes has one name twice")
        for name, split in self.splits.items():
            for number, shard in enumerate(split.shards):
                check_equal(
                    f"splits.{name}.shards.{number}.file", shard.file, shard_name(name, number)
                )
            total = sum(shard.images for shard in split.shards)
            check_equal(f"splits.{name}.images", split.images, total)
            total = sum(each.images.get(name, 0) for each in self.classes)
            check_equal(f"splits.{name}.images", split.images, total)
        for field in ("images", "image_bytes"):
            check_equal(
                f"{field} in splits",
                sum(getattr(split, field) for split in self.splits.values()),
                sum(getattr(source, field) for source in self.sources),
            )
        stats = self.statistics
        check_equal("statistics", stats, PixelStats.of(stats.pixels, stats.sums, stats.squares))
        return self


def index_name(shard: str) -> str:
    """Return the name of the index of a tar."""
    return shard.removesuffix(".tar") + ".idx.npy"


def sample_key(number: int) -> str:
    """Return the key of a split's sample of this number."""
    return f"{number:08d}"


def suffix_of(data: bytes) -> str:
    """Return the suffix of an image by its first bytes. Raises ValueError if it is of none of
    SUFFIXES."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise ValueError(f"found an image that begins with {data[:12]!r}, expected JPEG, PNG or WebP")


def write_shard(path: Path, name: str, samples: Iterable[Sample], first: int) -> ImageShard:
    """Write the tar `name`, for now at `path`, of samples that are numbered from `first`, and its
    index at `index_name(path)`; both fsynced.

    The bytes are those that `webdataset.TarWriter` writes (a test compares them), and depend on the
    arguments alone. Raises OSError if writing fails, FileExistsError if a file is there.
    """
    rows: list[tuple[Any, ...]] = []
    with contextlib.closing(HashingFile(path)) as file:
        tar = new_tar(file)
        for number, sample in enumerate(samples, first):
            key, size = sample_key(number), len(sample.data)
            digits = str(sample.label).encode()
            tar.addfile(tar_header(f"{key}.cls", len(digits)), io.BytesIO(digits))
            header = tar_header(f"{key}.{suffix_of(sample.data)}", size)
            tar.addfile(header, io.BytesIO(sample.data))
            offset = tar.offset - padded(size)
            crc32 = zlib.crc32(sample.data)
            place = (offset, size, sample.label, crc32, sample.width, sample.height)
            rows.append((*place, sample.pixels))
        tar.close()
        file.sync()
    with contextlib.closing(HashingFile(path.with_name(index_name(path.name)))) as index:
        np.lib.format.write_array(index, np.array(rows, INDEX), version=(1, 0))
        index.sync()
    return ImageShard(
        file=name,
        images=len(rows),
        bytes=file.size,
        sha256=file.digest.hexdigest(),
        index_sha256=index.digest.hexdigest(),
    )


def sample_bytes(image_size: int) -> int:
    """Return how many bytes of a tar a sample takes."""
    return LABEL_BEFORE + TAR_BLOCK + padded(image_size)


def read_manifest(folder: Path) -> ImageManifest:
    """Read the manifest by itself, without a look at the files beside it. Raises ValueError."""
    return read_manifest_as(ImageManifest, folder, FORMAT, VERSION)


def load_manifest(folder: Path) -> ImageManifest:
    """Read the manifest of an image set, and check that every shard is there and of the right size,
    and that the indexes are.

    Raises ValueError naming the file and what is wrong: no such folder, no manifest, a truncated or
    altered one, another format or version, a missing or truncated file.
    """
    manifest = read_manifest(Path(folder))
    header = len(_index_bytes(np.empty(0, INDEX)))
    for split in manifest.splits.values():
        for shard in split.shards:
            index_size = header + shard.images * INDEX.itemsize
            for file, size in ((shard.file, shard.bytes), (shard.index, index_size)):
                if problem := file_problem(Path(folder, file), size):
                    raise ValueError(problem)
    return manifest


def read_index(folder: Path, shard: ImageShard) -> Index:
    """Read the index of a shard: an array (images,) of INDEX. Raises ValueError naming the file if
    it is not what was written."""
    path = Path(folder, shard.index)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; copy or prepare the set again") from error
    if hashlib.sha256(raw).hexdigest() != shard.index_sha256:
        raise ValueError(f"{path}: altered (SHA-256 differs); copy or prepare the set again")
    index: Index = np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
    return index


class SplitReader:
    """Samples of a split by their number, with one read each, for one thread; files stay open until
    `close`, OPEN_FILES of them.

    `index` is an array (images,) of INDEX, `shards` (images,) has the number of each sample's tar,
    `paths` the tars. Raises ValueError for a split that the set does not have, and as `read_index`.
    """

    def __init__(self, folder: Path, manifest: ImageManifest, split: SplitName):
        if split not in manifest.splits:
            raise ValueError(
                f"split: found {split!r}, expected one of {', '.join(manifest.splits)}"
            )
        shards = manifest.splits[split].shards
        self.paths = [Path(folder, shard.file) for shard in shards]
        self.index: Index = np.concatenate([read_index(folder, shard) for shard in shards])
        counts = [shard.images for shard in shards]
        self.shards: npt.NDArray[np.int64] = np.repeat(np.arange(len(shards)), counts)
        self.firsts = [0, *accumulate(counts)]
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Return the labels (images,)."""
        labels: npt.NDArray[np.int64] = self.index["label"].astype(np.int64)
        return labels

    def read(self, number: int) -> bytes:
        """Return the image of this number, as it is stored.

        Raises ValueError naming tar and member if the bytes are not those that were written,
        IndexError if there is no such sample.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        row, shard = self.index[number], int(self.shards[number])
        data = os.pread(self._descriptor(shard), int(row["size"]), int(row["offset"]))
        if zlib.crc32(data) != int(row["crc32"]):
            raise ValueError(
                f"{self.paths[shard]}: image {sample_key(number)} is damaged (CRC-32 differs); "
                "check with `dnt data verify`, then copy or prepare the set again"
            )
        return data

    def expect(self, numbers: Iterable[int]) -> None:
        """Have the system read these samples from the disk, all at a time and in the order in which
        they lie there, while others are used.

        What cannot be read is told by `read`.
        """
        wanted = np.unique(np.fromiter(numbers, np.int64))  # a later number lies further on
        if not (hasattr(os, "posix_fadvise") and len(wanted)):
            return
        shards = self.shards[wanted]
        starts = self.index["offset"][wanted].astype(np.int64)
        ends = starts + self.index["size"][wanted]
        apart = (shards[1:] != shards[:-1]) | (starts[1:] - ends[:-1] > NEAR)
        first, last = np.append(True, apart), np.append(apart, True)
        runs = zip(shards[first].tolist(), starts[first].tolist(), ends[last].tolist(), strict=True)
        for shard, start, end in runs:
            for place in range(start, end, ADVISED):
                size = min(ADVISED, end - place)
                with contextlib.suppress(OSError):
                    descriptor = self._descriptor(shard)
                    os.posix_fadvise(descriptor, place, size, os.POSIX_FADV_WILLNEED)

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = os.open(self.paths[shard], os.O_RDONLY)
        return self._open[shard]

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def read_sample(folder: Path, manifest: ImageManifest, split: SplitName, number: int) -> Sample:
    """Read one sample. Raises ValueError and IndexError as `SplitReader` does."""
    with contextlib.closing(SplitReader(folder, manifest, split)) as reader:
        data, row = reader.read(number), reader.index[number]
    low, high = row["pixels"].tolist()
    return Sample(data, int(row["label"]), int(row["width"]), int(row["height"]), (low, high))


def _index_bytes(index: Index) -> bytes:
    npy = io.BytesIO()
    np.lib.format.write_array(npy, index, version=(1, 0))
    return npy.getvalue()
