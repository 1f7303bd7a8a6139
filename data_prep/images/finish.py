"""From finished chunks to a published set: classes, splits, tars, statistics, manifest, report."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from data_prep.arrays import Flags
from data_prep.files import sync
from data_prep.images.chunks import read_chunk
from data_prep.images.gather import REJECTS, Gathered, gather
from data_prep.images.inputs import ImageInput
from data_prep.images.options import ImageOptions
from data_prep.images.pack import write_tars
from data_prep.images.plan import Images, find_copies, hold_out, which_stay
from data_prep.images.report import contact_sheet, format_summary, make_report, write_report
from data_prep.images.shards import (
    ClassInfo,
    ImageManifest,
    ImageSetOptions,
    ImageSource,
    PixelStats,
    manifest_sha256,
    read_index,
    write_manifest,
)
from data_prep.read.inputs import unused
from data_prep.set_files import MANIFEST, SplitName
from data_prep.work_folder import key, publish


def finish(
    work: Path,
    options: ImageOptions,
    base: ImageManifest | None,
    inputs: Sequence[ImageInput],
    chunks: list[list[Path]],
    console: Console,
) -> ImageManifest:
    """Make chunks a published set. Raises ValueError where classes or splits do not fit."""
    paths = list(itertools.chain.from_iterable(chunks))
    identity = manifest_sha256(options.append) if options.append else None
    asked = _set_options(options).model_dump(mode="json")
    names = [path.relative_to(work).as_posix() for path in paths]
    given = [[each.name, each.split, len(each.units)] for each in inputs]
    folder = work / f"set-{key(asked, identity, given, names)}"
    folder.mkdir(exist_ok=True)
    gathered = gather(folder, options, base, inputs, chunks, console)
    images = gathered.images
    copies = find_copies(images.pixels, images.label)
    stay = which_stay(copies, _in_base(images, options, base), options.dedup)
    is_val = _validation(images, stay, options)
    _check_classes(gathered, images, stay, is_val, base)
    splits = write_tars(folder, options, base, paths, images, stay, is_val, console)
    manifest = ImageManifest(
        format="dnt-images",
        version=1,
        options=_set_options(options),
        statistics=_statistics(base, paths, stay & ~is_val),
        sources=(
            *(base.sources if base else ()),
            *_sources(inputs, base, images, stay, gathered),
        ),
        classes=_classes(gathered.classes, base, images, stay, is_val),
        splits=splits,
    )
    report = make_report(folder, options, manifest, inputs, gathered, copies)
    write_report(folder, report, contact_sheet(folder, manifest))
    _publish(folder, Path(options.out), manifest)
    console.print(format_summary(report), highlight=False, markup=False, soft_wrap=True)
    return manifest


def _set_options(options: ImageOptions) -> ImageSetOptions:
    return ImageSetOptions(
        resize_shorter=options.resize_shorter,
        reencode=options.reencode,
        quality=options.quality,
        val_fraction=None if options.val else options.val_fraction,
        dedup=options.dedup,
        shard_bytes=options.shard_bytes,
        seed=options.seed,
    )


# --- splits ---------------------------------------------------------------------------------------


def _in_base(images: Images, options: ImageOptions, base: ImageManifest | None) -> Flags:
    """Return which images have the pixels of one of the set that is appended to."""
    if not base or not options.append or options.dedup == "none":
        return np.zeros(len(images), bool)
    pair = np.dtype([("low", np.uint64), ("high", np.uint64)])
    earlier = [
        read_index(options.append, shard)["pixels"].astype(np.uint64)
        for split in base.splits.values()
        for shard in split.shards
    ]
    known = np.ascontiguousarray(np.concatenate(earlier)).view(pair).ravel()
    return np.isin(np.ascontiguousarray(images.pixels).view(pair).ravel(), known)


def _validation(images: Images, stay: Flags, options: ImageOptions) -> Flags:
    """Return which images belong to val."""
    if options.val:
        return images.is_val
    is_val = np.zeros(len(images), bool)
    is_val[stay] = hold_out(images.take(stay), options.val_fraction)
    return is_val


def _check_classes(
    gathered: Gathered, images: Images, stay: Flags, is_val: Flags, base: ImageManifest | None
) -> None:
    """Raise ValueError where nothing is left to train on, val is asked for and empty, or has images
    of a class that train has none of."""
    if not (stay & ~is_val).any():
        dropped = sum((Counter(each) for each in gathered.findings), Counter[str]())
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in dropped.most_common(4))
        raise ValueError(
            f"none of the {gathered.read:,} images is left to train on ({kinds or 'all are val'}); "
            "give other images, or a smaller --val"
        )
    counts = [
        np.bincount(images.label[stay & which], minlength=len(gathered.classes))
        for which in (~is_val, is_val)
    ]
    if base:
        counts[0] += [each.images.get("train", 0) for each in base.classes] + [0] * (
            len(gathered.classes) - len(base.classes)
        )
    for label in np.flatnonzero((counts[1] > 0) & (counts[0] == 0)).tolist():
        raise ValueError(
            f"class {gathered.classes[label]!r} has {counts[1][label]:,} validation images but "
            "none in train; give some to train on, or leave it out of --val"
        )


def _classes(
    names: Sequence[str], base: ImageManifest | None, images: Images, stay: Flags, is_val: Flags
) -> tuple[ClassInfo, ...]:
    """Return the classes with how many images each has in each split."""
    splits: dict[SplitName, Flags] = {"train": stay & ~is_val}
    if (stay & is_val).any() or (base and "val" in base.splits):
        splits["val"] = stay & is_val
    counts = {
        split: np.bincount(images.label[which], minlength=len(names))
        for split, which in splits.items()
    }
    infos = []
    for label, name in enumerate(names):
        before = base.classes[label].images if base and label < len(base.classes) else {}
        here: dict[SplitName, int] = {
            split: int(found[label]) + before.get(split, 0) for split, found in counts.items()
        }
        infos.append(ClassInfo(name=name, images=here))
    return tuple(infos)


# --- manifest and report --------------------------------------------------------------------------


def _statistics(base: ImageManifest | None, paths: Sequence[Path], is_train: Flags) -> PixelStats:
    """Return the statistics of the train split's pixels."""
    pixels, sums, squares = 0, [0, 0, 0], [0, 0, 0]
    if base:
        stats = base.statistics
        pixels, sums, squares = stats.pixels, list(stats.sums), list(stats.squares)
    start = 0
    for path in paths:
        rows, _ = read_chunk(path)
        here = rows[is_train[start : start + len(rows)]]
        start += len(rows)
        pixels += int((here["width"].astype(np.int64) * here["height"]).sum())
        sums = [a + b for a, b in zip(sums, here["sums"].sum(0).tolist(), strict=True)]
        squares = [a + b for a, b in zip(squares, here["squares"].sum(0).tolist(), strict=True)]
    return PixelStats.of(pixels, sums, squares)


def _sources(
    inputs: Sequence[ImageInput],
    base: ImageManifest | None,
    images: Images,
    stay: Flags,
    gathered: Gathered,
) -> Iterator[ImageSource]:
    used = {source.name: 1 for source in base.sources} if base else {}
    for number, each in enumerate(inputs):
        here = images.source == number
        yield ImageSource(
            name=unused(each.name, used),
            images=int(np.count_nonzero(here & stay)),
            image_bytes=int(images.size[here & stay].sum()),
            findings=dict(sorted(gathered.findings[number].items())),
            duplicates=int(np.count_nonzero(here & ~stay)),
        )


def _publish(folder: Path, out: Path, manifest: ImageManifest) -> None:
    """Put a whole set in place, once all of it is on disk; the manifest comes last."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    names = [name for shard in shards for name in (shard.file, shard.index)]
    others = [REJECTS, "report.html", "report.json"]
    for name in others:  # tars and indexes are synced as they are written
        sync(folder / name)
    write_manifest(folder, manifest)
    publish(out, [folder / name for name in names + others], folder / MANIFEST)
