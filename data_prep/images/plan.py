"""Which images stay, in which split, in which order and in which tar: functions of all of them."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_prep.arrays import Array, Counts, Flags, Hashes
from data_prep.images.shards import Dedup, sample_bytes
from data_prep.set_files import SplitName

TAR_END = 10240  # at most, of zeros


@dataclass(frozen=True)
class Images:
    """All images in reading order, an entry each (n,).

    chunk: number of the chunk file; offset, size: its place there. label: number of its class.
    pixels: hash (n, 2) of the pixels, as (low, high). source: number of its INPUT. is_val: whether
    it is named or given as one of val.
    """

    chunk: Counts
    offset: Counts
    size: Counts
    label: Counts
    width: Counts
    height: Counts
    pixels: Hashes
    source: Counts
    is_val: Flags

    def __len__(self) -> int:
        return len(self.chunk)

    def take(self, which: Array) -> "Images":
        """Return some of the images: those at these places, or where a bool (n,) is set."""
        names = [each.name for each in dataclasses.fields(self)]
        return Images(**{name: getattr(self, name)[which] for name in names})


class Copies(NamedTuple):
    """Which images have the pixels of one before them (n,), and how many of those have another
    label than that one."""

    is_copy: Flags
    conflicting: int


def find_copies(pixels: Hashes, label: Counts) -> Copies:
    """Find images with the pixels of an earlier one, given hashes (n, 2) and labels (n,) in reading
    order."""
    order = np.lexsort((pixels[:, 0], pixels[:, 1]))  # stable, so the earlier one comes first
    ordered = pixels[order]
    same = np.zeros(len(order), bool)
    same[1:] = (ordered[1:] == ordered[:-1]).all(1)
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    conflicting = label[order] != label[order[first]]
    is_copy = np.zeros(len(order), bool)
    is_copy[order] = same
    return Copies(is_copy, int(np.count_nonzero(conflicting)))


def which_stay(copies: Copies, earlier: Flags, dedup: Dedup) -> Flags:
    """Return which images stay (n,); `earlier` says which are in a set that is appended to."""
    if dedup == "none":
        return np.ones(len(earlier), bool)
    return ~(copies.is_copy | earlier)


def hold_out(images: Images, fraction: float) -> Flags:
    """Return which images are held out for validation (n,): a function of an image's pixels, so
    that its copies are on one side. A class of which all would be held out keeps all."""
    limit = int(fraction * 2**64)
    held = images.pixels[:, 0] < np.uint64(min(limit, 2**64 - 1))
    classes = int(images.label.max(initial=-1)) + 1
    left = np.bincount(images.label[~held], minlength=classes)
    return np.asarray(held & (left[images.label] > 0))


def shuffled(images: Images, seed: int) -> Counts:
    """Return an order of the images (n,), the same for the same pixels and seed, whatever order
    they came in; copies keep theirs."""
    draw = _mixed(images.pixels[:, 1] ^ _mixed(np.array([seed], np.uint64)))
    return np.lexsort((images.pixels[:, 0], draw))


def _mixed(value: Hashes) -> Hashes:
    """Return 64 bits that look random: the finalizer of splitmix64 (Steele et al. 2014)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class TarJob(NamedTuple):
    """A tar to write: the number `first` of its first sample in the split, and which images are in
    it, in order."""

    split: SplitName
    number: int
    first: int
    images: Images


def tar_jobs(
    images: Images, split: SplitName, shard_bytes: int, number: int, first: int
) -> list[TarJob]:
    """Return the tars of images in order: as many in each as fit `shard_bytes`, one at least; tars
    are numbered from `number`, samples from `first`."""
    ends = np.cumsum([sample_bytes(size) for size in images.size.tolist()], dtype=np.int64)
    jobs: list[TarJob] = []
    start = 0
    while start < len(images):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + shard_bytes - TAR_END, "right"))
        stop = max(stop, start + 1)
        chosen = images.take(np.arange(start, stop))
        jobs.append(TarJob(split, number + len(jobs), first + start, chosen))
        start = stop
    return jobs
