"""Chunks become tars: each is a function of its images, so any process can write it, and one that
is there need not be written again."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from rich.console import Console

from data_prep.arrays import Flags
from data_prep.files import write_whole
from data_prep.images.chunks import data_path
from data_prep.images.options import ImageOptions
from data_prep.images.plan import Images, TarJob, shuffled, tar_jobs
from data_prep.images.shards import (
    ImageManifest,
    ImageShard,
    ImageSplit,
    Sample,
    index_name,
    write_shard,
)
from data_prep.process_pool import ordered_map
from data_prep.progress import stage
from data_prep.set_files import SplitName, link_file, shard_name

OPEN_FILES = 128
PROCESS_BYTES = 64 << 20  # a process takes longer to start than less to write


def write_tars(
    folder: Path,
    options: ImageOptions,
    base: ImageManifest | None,
    paths: Sequence[Path],
    images: Images,
    stay: Flags,
    is_val: Flags,
    console: Console,
) -> dict[SplitName, ImageSplit]:
    """Write the tars of each split; those of a set that is appended to are linked."""
    jobs: list[TarJob] = []
    old: dict[SplitName, tuple[ImageShard, ...]] = {}
    parts: dict[SplitName, Flags] = {"train": stay & ~is_val, "val": stay & is_val}
    for name, which in parts.items():
        before = base.splits.get(name) if base else None
        old[name] = before.shards if before else ()
        for shard in old[name]:
            for file in (shard.file, shard.index):
                assert options.append
                link_file(options.append / file, folder / file)
        chosen = images.take(which)
        ordered = chosen.take(shuffled(chosen, options.seed))
        first = before.images if before else 0
        jobs += tar_jobs(ordered, name, options.shard_bytes, len(old[name]), first)
    made: dict[SplitName, list[ImageShard]] = {"train": [], "val": []}
    sizes = [int(job.images.size.sum()) for job in jobs]
    processes = min(options.processes, len(jobs), 1 + sum(sizes) // PROCESS_BYTES)
    writer = functools.partial(tar_writer, folder, paths)
    with (
        stage(console, "pack", sum(sizes)) as advance,
        closing(ordered_map(writer, jobs, max(1, processes))) as results,
    ):
        for job, size, shard in zip(jobs, sizes, results, strict=True):
            made[job.split].append(shard)
            advance(size)
    splits: dict[SplitName, ImageSplit] = {}
    for name, which in parts.items():
        before = base.splits.get(name) if base else None
        if shards := (*old[name], *made[name]):
            splits[name] = ImageSplit(
                images=int(np.count_nonzero(which)) + (before.images if before else 0),
                image_bytes=int(images.size[which].sum()) + (before.image_bytes if before else 0),
                shards=shards,
            )
    return splits


def tar_writer(folder: Path, paths: Sequence[Path]) -> Callable[[TarJob], ImageShard]:
    """Return a function for `ordered_map` that writes a job's tar and index, with a record beside
    them, unless all are there already."""

    def write(job: TarJob) -> ImageShard:
        name = shard_name(job.split, job.number)
        path, record = folder / name, folder / f"{name}.json"
        if record.exists():
            return ImageShard.model_validate_json(record.read_bytes())
        for each in (path, folder / index_name(name)):
            each.unlink(missing_ok=True)
        shard = write_shard(path, name, _samples(job.images, paths), job.first)
        write_whole(record, lambda beside: beside.write_text(shard.model_dump_json()))
        return shard

    return write


def _samples(images: Images, paths: Sequence[Path]) -> Iterator[Sample]:
    """Read the images of a tar out of the chunks, with a bounded number of open files."""
    open_files: dict[int, int] = {}
    try:
        columns = (images.chunk, images.offset, images.size, images.label)
        shapes = (images.width, images.height, images.pixels)
        for chunk, offset, size, label, width, height, (low, high) in zip(
            *(each.tolist() for each in (*columns, *shapes)), strict=True
        ):
            if chunk not in open_files:
                if len(open_files) >= OPEN_FILES:
                    os.close(open_files.pop(next(iter(open_files))))
                open_files[chunk] = os.open(data_path(paths[chunk]), os.O_RDONLY)
            data = os.pread(open_files[chunk], size, offset)
            if len(data) != size:
                raise ValueError(
                    f"{data_path(paths[chunk])}: ends too early; remove it and "
                    f"{paths[chunk].name}, and run the same command again to make them anew"
                )
            yield Sample(data, label, width, height, (low, high))
    finally:
        for descriptor in open_files.values():
            os.close(descriptor)
