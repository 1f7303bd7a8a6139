"""The source of images, ``data.kind: images``: tars in, decoded and augmented rows out, in an order
that is a pure function.

1. An epoch visits every image of the training split once, in the order of
   :mod:`dnt_scale.data.order`, with ``BLOCK_IMAGES`` images that follow one another for a block.
2. What is done to the image at a position is drawn from (seed, position), see
   :mod:`dnt_scale.data.augment`. Mixing puts the images of positions p and p xor 1 together.
3. So a row is a function of (set, recipe, seed, position), on any number of ranks, processes and
   rows of a micro-batch.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.images.shards import load_manifest, manifest_sha256, sample_key
from data_prep.shards import SplitName
from dnt_scale.config import AugmentSection, ImageRows, ImagesConfig, Unit
from dnt_scale.data.ahead import Ahead, training_pieces, validation_pieces
from dnt_scale.data.decoders import Decoders
from dnt_scale.data.image_reader import Job, Reading, Rows, image_order, number_at
from dnt_scale.data.sources import DataPart, Missing, Passed, Source
from dnt_scale.data.stream import Stream
from dnt_scale.distributed.host import cpus_of_a_rank
from dnt_scale.model.batch import IGNORED, Batch

JOB_ROWS = 4  # whole pairs, and few enough that processes end a batch at about the same time
SMALL_PIXELS = 64 * 64  # of an image: one process makes thousands a second, see docs/lab-log.md
MOST_PROCESSES = 16  # unless more are asked for


def open_images(data: ImagesConfig) -> "ImageSource":
    """Return the source of a configuration. Raises ValueError where the set is damaged."""
    return ImageSource(data)


class ImageSource(Source):
    """Images with labels out of a prepared set; its batches are those of ``ImageRows``.

    Args:
        passed: rows of the order that earlier stages of the run have read.

    Raises:
        ValueError: the set is damaged.
    """

    unit = Unit("images", 1)

    def __init__(self, data: ImagesConfig, passed: int = 0) -> None:
        self.data = data
        self.first = passed  # position of the order at which the run's stage begins
        self.manifest = load_manifest(data.path)
        self.rows = ImageRows(data.path, data.size, tuple(self.manifest.class_names))
        self.decoders: Decoders | None = None  # of the newest stream, for validation too

    def parts(self) -> list[DataPart]:
        return [DataPart("", "data.path", self.data.path, manifest_sha256(self.data.path))]

    def facts(self) -> dict[str, str]:
        names = json.dumps(self.rows.class_names, ensure_ascii=False).encode()
        return {"classes_sha256": hashlib.sha256(names).hexdigest()}

    def foreign(self, facts: Mapping[str, Any], newest: Path | str) -> str | None:
        if not super().foreign(facts, newest):
            return None
        return f"made of other classes than {newest} was trained on; give a set of the same ones"

    @property
    def processes(self) -> int:
        """Return how many processes decode for a rank: as ``data.workers`` says, else one a CPU
        beside the rank's own, and one where images are so small that one is quicker than any model.
        """
        if self.data.workers is not None:
            return self.data.workers
        pixels = self.manifest.statistics.pixels / self.manifest.splits["train"].images
        most = 1 if pixels <= SMALL_PIXELS else MOST_PROCESSES
        return min(cpus_of_a_rank() - 1, most)

    def reading(self, seed: int) -> Reading:
        """Return what rows depend on, beside their places."""
        data = self.data
        return Reading(
            folder=data.path, size=data.size, center=data.center, augment=data.augment, seed=seed
        )

    def stream(
        self, *, seed: int, global_batch: int, rank: int, world_size: int, consumed_rows: int = 0
    ) -> Stream:
        read = _TrainingRows(self, seed, global_batch)
        self.decoders = read.decoders
        return Stream(
            read,
            global_batch=global_batch,
            rank=rank,
            world_size=world_size,
            consumed_rows=consumed_rows,
            close=read.close,
        )

    def ahead(self, reading: Reading, first: int, count: int, global_batch: int) -> Ahead:
        """Return what has the disk read ahead for ``count`` rows of each global batch, from the one
        at position ``first`` on.
        """
        images = self.manifest.splits["train"].images
        pieces = training_pieces(reading, images, first, count, global_batch)
        return Ahead(self.data.path, self.manifest, "train", pieces)

    def passed(self, rows: int) -> dict[str, Passed]:
        [part] = self.parts()
        return {part.sha256: Passed(part.name, self.first + rows)}

    def after(self, passed: Mapping[str, Passed]) -> "ImageSource":
        [part] = self.parts()
        found = passed.get(part.sha256)
        return ImageSource(self.data, found.rows) if found else self

    def validation(
        self, *, rows: int | None, micro_batch: int, rank: int, world_size: int
    ) -> dict[str, Iterator[Batch]]:
        total = self.manifest.splits["val"].images
        count = min(rows or total, total)
        chosen = [place * total // count for place in range(count)]
        starts = range(0, count, micro_batch * world_size)
        mine = [chosen[start + rank * micro_batch :][:micro_batch] for start in starts]
        return {"": self._validation(mine, micro_batch)}

    def _validation(self, batches: Sequence[Sequence[int]], size: int) -> Iterator[Batch]:
        """Yield samples by their numbers in batches of ``size`` rows; what fills one up has no
        label.
        """
        jobs = [_jobs("val", numbers) for numbers in batches]
        pieces = validation_pieces([number for numbers in batches for number in numbers])
        with (
            closing(Ahead(self.data.path, self.manifest, "val", pieces)) as on_their_way,
            self._lent(sum(map(len, jobs))) as decoders,
        ):
            for ahead in jobs[:1]:
                _ask(decoders, ahead)
            for number, mine in enumerate(jobs):
                for ahead in jobs[number + 1 :][:1]:
                    _ask(decoders, ahead)
                empty = np.zeros(size - len(batches[number]), decoders.reading.row_type)
                empty["label"] = IGNORED
                rows = np.concatenate([*(decoders.get(job) for job in mine), empty])
                on_their_way.use(len(batches[number]))
                yield {"image": _tensor(rows["image"]), "label": _tensor(rows["label"])}

    @contextmanager
    def _lent(self, jobs: int) -> Iterator[Decoders]:
        """Lend decoders for so many jobs of validation: those of training, else some of its own.

        What validation sees depends on no seed, so training's make the very same rows.
        """
        if self.decoders and not self.decoders.closed:
            yield self.decoders
            return
        with closing(Decoders(self.reading(0), min(self.processes, jobs))) as own:
            yield own

    def no_validation(self) -> Missing | None:
        if "val" in self.manifest.splits:
            return None
        what = f"{self.data.path} has no validation split"
        return Missing("data.path", what, "prepare with --val")

    def epochs(self, rows: int) -> str:
        return f"{rows / self.manifest.splits['train'].images:.2f} epochs"

    def describe(self) -> list[str]:
        images = self.manifest.splits["train"].images
        return [f"{self.data.path}: {images:,} images of {len(self.rows.class_names):,} classes"]

    def rows_behind(self, seed: int, first: int, last: int) -> dict[str, object]:
        """Return the tars and keys of the images at positions [first, last), in their order."""
        split = self.manifest.splits["train"]
        order = image_order(split.images, seed)
        ends = np.cumsum([shard.images for shard in split.shards])
        found = []
        for position in range(first, last):
            number = number_at(order, self.first + position)
            shard = split.shards[int(np.searchsorted(ends, number, side="right"))]
            found.append({"shard": shard.file, "key": sample_key(number)})
        return {"positions": [first, last], "rows": found}


class _TrainingRows:
    """Training rows by position, read one global batch ahead, so that no process waits."""

    def __init__(self, source: ImageSource, seed: int, global_batch: int) -> None:
        self.source = source
        self.decoders = Decoders(source.reading(seed), source.processes)
        self.ahead: Ahead | None = None
        self.classes = len(source.rows.class_names)
        self.augment = source.data.augment
        self.global_batch = global_batch
        self.passed = source.first
        self.asked: set[int] = set()  # first positions

    def __call__(self, first: int, count: int) -> Batch:
        """Return the rows at ``count`` positions of the stage from ``first`` on."""
        first += self.passed
        if self.ahead is None:
            self.ahead = self.source.ahead(self.decoders.reading, first, count, self.global_batch)
        for start in (first, first + self.global_batch):
            if start not in self.asked:
                self.asked.add(start)
                _ask(self.decoders, _jobs("train", range(start, start + count)))
        self.asked.remove(first)
        made = []
        for job in _jobs("train", range(first, first + count)):
            made.append(self.decoders.get(job))
            self.ahead.use(len(job.places))
        return training_batch(np.concatenate(made), self.classes, self.augment)

    def close(self) -> None:
        if self.ahead is not None:
            self.ahead.close()
        self.decoders.close()


def _jobs(split: SplitName, places: Sequence[int]) -> list[Job]:
    """Return the jobs that so many places are: of positions, no pair is in two."""
    cuts = [place for place in range(len(places)) if place and places[place] % JOB_ROWS == 0]
    if split == "val":
        cuts = list(range(JOB_ROWS, len(places), JOB_ROWS))
    ends = [*cuts, len(places)]
    return [
        Job(split, tuple(places[start:end])) for start, end in zip([0, *cuts], ends, strict=True)
    ]


def _ask(decoders: Decoders, jobs: Sequence[Job]) -> None:
    for job in jobs:
        decoders.ask(job)


def training_batch(rows: Rows, classes: int, augment: AugmentSection) -> dict[str, Tensor]:
    """Return rows as a batch, with a soft target where the recipe mixes images or smooths."""
    label, share = _tensor(rows["label"]), _tensor(rows["share"]).float()
    batch = {"image": _tensor(rows["image"]), "label": label, "key": _tensor(rows["key"])}
    if augment.mixup or augment.cutmix or augment.smoothing:
        hard = torch.zeros(len(rows), classes)
        hard.scatter_add_(1, label[:, None], share[:, None])
        hard.scatter_add_(1, _tensor(rows["other"])[:, None], 1 - share[:, None])
        batch["target"] = hard * (1 - augment.smoothing) + augment.smoothing / classes
    return batch


def _tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
