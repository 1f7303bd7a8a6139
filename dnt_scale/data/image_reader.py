"""Rows of images out of a set: a function of the set, the recipe, the seed and the position.

What stands here needs no Hydra, for the processes that decode (:mod:`dnt_scale.data.decoders`)
start with it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple, Self, cast

import numpy as np
import numpy.typing as npt

from data_prep.images.shards import SplitReader, load_manifest, sample_key
from data_prep.shards import SplitName
from dnt_scale.data.augment import (
    IMAGE,
    KEY,
    MIX,
    Pixels,
    augmented,
    draws,
    middle,
    mixed,
)
from dnt_scale.data.order import Ints, Order

if TYPE_CHECKING:
    from dnt_scale.config import AugmentSection

Rows = npt.NDArray[np.void]  # of ``row_type``
BLOCK_IMAGES = 256  # that follow one another on disk and are moved together, see order.py


class Job(NamedTuple):
    """Rows that are asked for: of ``train`` positions of the order, of ``val`` samples' numbers."""

    split: SplitName
    places: tuple[int, ...]


class Reading(NamedTuple):
    """All that rows depend on beside their places."""

    folder: Path
    size: int  # pixels a side
    center: float  # share of the shorter side that validation sees
    augment: "AugmentSection"
    seed: int

    def to_json(self) -> str:
        """Return it as a line for another process."""
        plain = {"folder": str(self.folder), "augment": self.augment.model_dump()}
        return json.dumps(self._asdict() | plain)

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """Read it back: the recipe as plain values, for its section would bring Hydra along."""
        fields = json.loads(line)
        recipe = cast("AugmentSection", SimpleNamespace(**fields["augment"]))
        return cls(**fields | {"folder": Path(fields["folder"]), "augment": recipe})

    @property
    def mixes(self) -> bool:
        """Whether the recipe mixes images in pairs."""
        return bool(self.augment.mixup or self.augment.cutmix)

    @property
    def row_type(self) -> np.dtype[np.void]:
        """Return what a row is.

        ``other`` is the label of the image that a row's is mixed with, ``share`` the part of the
        target that ``label`` has; ``key`` a number that is drawn for the row, below 2^32.
        """
        return np.dtype(
            [
                ("image", "u1", (3, self.size, self.size)),
                ("label", "<i8"),
                ("other", "<i8"),
                ("share", "<f8"),
                ("key", "<i8"),
            ]
        )


class ImageReader:
    """Rows of both splits of a set; files stay open until ``close``.

    Raises:
        ValueError: the set is damaged.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        manifest = load_manifest(reading.folder)
        self.splits = {
            name: SplitReader(reading.folder, manifest, name) for name in manifest.splits
        }
        self.order = image_order(len(self.splits["train"]), reading.seed)

    def read(self, job: Job) -> Rows:
        """Return the rows of a job.

        Raises:
            ValueError: an image is damaged; names it.
        """
        rows = np.zeros(len(job.places), self.reading.row_type)
        if job.split == "val":
            for row, number in zip(rows, job.places, strict=True):
                row["image"] = self._pixels("val", number, self._middle)
                row["label"] = row["other"] = self.splits["val"].index["label"][number]
                row["share"] = 1.0
            return rows
        self._train(rows, job.places)
        return rows

    def close(self) -> None:
        for split in self.splits.values():
            split.close()

    def _needed(self, position: int) -> tuple[int, ...]:
        """Return the positions whose images make the row at one: where the recipe mixes, its
        partner's too, that of position p xor 1.
        """
        return (position, position ^ 1) if self.reading.mixes else (position,)

    def _train(self, rows: Rows, positions: tuple[int, ...]) -> None:
        """Fill rows with the images at positions of the training order.

        Where the recipe mixes, pairs are those of neighbours in the order, whoever reads which of
        them.
        """
        recipe, seed = self.reading.augment, self.reading.seed
        made: dict[int, tuple[Pixels, int]] = {}  # pixels and label by position
        for position in positions:
            for needed in self._needed(position):
                if needed not in made:
                    made[needed] = self._augmented(needed)
        for row, position in zip(rows, positions, strict=True):
            pixels, label = made[position]
            row["label"] = row["other"] = label
            row["share"] = 1.0
            if self.reading.mixes:
                pair = position >> 1
                both = mixed(
                    made[2 * pair][0], made[2 * pair + 1][0], recipe, draws(seed, pair, MIX)
                )
                pixels = both.second if position & 1 else both.first
                row["other"], row["share"] = made[position ^ 1][1], both.share
            row["image"] = pixels
            row["key"] = draws(seed, position, KEY).integers(1 << 32)

    def _middle(self, data: bytes) -> Pixels:
        return middle(data, self.reading.size, self.reading.center)

    def _augmented(self, position: int) -> tuple[Pixels, int]:
        number = number_at(self.order, position)
        reading = self.reading

        def augment(data: bytes) -> Pixels:
            draw = draws(reading.seed, position, IMAGE)
            return augmented(data, reading.size, reading.center, reading.augment, draw)

        pixels = self._pixels("train", number, augment)
        return pixels, int(self.splits["train"].index["label"][number])

    def _pixels(self, split: SplitName, number: int, make: Callable[[bytes], Pixels]) -> Pixels:
        """Return what is made of a sample's bytes. Raises ValueError naming it where it does not
        decode.
        """
        reader = self.splits[split]
        data = reader.read(number)
        try:
            return make(data)
        except (OSError, SyntaxError, ValueError) as error:  # of the decoders
            shard = reader.paths[int(reader.shards[number])]
            raise ValueError(
                f"{shard}: image {sample_key(number)} cannot be decoded ({error}); prepare the set "
                "again"
            ) from None


def image_order(images: int, seed: int) -> Order:
    """Return the order of training images: blocks of them are permuted, and those in a window of
    blocks.
    """
    blocks = np.full(-(-images // BLOCK_IMAGES), BLOCK_IMAGES, dtype=np.int64)
    blocks[-1] -= len(blocks) * BLOCK_IMAGES - images
    return Order(blocks, seed)


def number_at(order: Order, position: int) -> int:
    """Return the number of the sample at a position of the order."""
    block, row = order.row_at(position)
    return block * BLOCK_IMAGES + row


def numbers_at(order: Order, position: int, count: int) -> Ints:
    """Return the numbers of the samples at ``count`` positions from ``position`` on, int64
    (count,).
    """
    blocks, rows = order.rows_from(position, count)
    return blocks * BLOCK_IMAGES + rows
