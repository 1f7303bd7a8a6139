"""report.json and report.html of an image set: what was found, dropped and kept, class by class,
with a contact sheet."""

import base64
import contextlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from data_prep.arrays import Counts
from data_prep.images.findings import KINDS
from data_prep.images.gather import Gathered
from data_prep.images.inputs import ImageInput
from data_prep.images.options import ImageOptions
from data_prep.images.plan import Copies
from data_prep.images.shards import ImageManifest, SplitReader
from data_prep.report.markup import (
    ByteSize,
    Cell,
    Table,
    bar,
    histogram,
    table,
    templates,
    visible,
)
from data_prep.set_files import SplitName
from data_prep.words import counted, percent, ratio, size

SHEET_CLASSES, SHEET_IMAGES, THUMBNAIL = 24, 8, 96
MOST_CLASSES = 1000  # that the page has rows for
SECTIONS = ("Images", "Classes", "Sizes", "Sources", "Findings", "Options")


class SplitCount(BaseModel):
    """Train or val: images, their bytes, tars and the bytes of those."""

    images: int
    image_bytes: int
    shards: int
    shard_bytes: int


class ImageReport(BaseModel):
    """All of report.json. `read` images were found in `sources`, name by name (kept, copies left
    out, findings by kind); `copies` have the pixels of one before, `conflicting` of them another
    label. `sides[i]` and `sizes[i]` count the set's images with a shorter side of 2**i to 2**(i+1)
    - 1 pixels, and of as many bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    options: dict[str, str | int | float | None]
    read: int
    copies: int
    conflicting: int
    sources: dict[str, tuple[int, int, dict[str, int]]]
    classes: dict[str, dict[SplitName, int]]
    splits: dict[SplitName, SplitCount]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sides: list[int]
    sizes: list[int]


class SheetRow(NamedTuple):
    """A class on the contact sheet: its name, and thumbnails as data URIs."""

    name: str
    images: list[str]


def make_report(
    folder: Path,
    options: ImageOptions,
    manifest: ImageManifest,
    inputs: Sequence[ImageInput],
    gathered: Gathered,
    copies: Copies,
) -> ImageReport:
    """Make the report of a set whose tars are in `folder`."""
    shorter, sizes = [], []
    for name in manifest.splits:
        with contextlib.closing(SplitReader(folder, manifest, name)) as reader:
            shorter.append(np.minimum(reader.index["width"], reader.index["height"]))
            sizes.append(reader.index["size"])
    new = manifest.sources[len(manifest.sources) - len(inputs) :]
    asked = manifest.options.model_dump(mode="json")
    return ImageReport(
        name=Path(options.out).resolve().name,
        options={**asked, "val": options.val, "strict": str(options.strict).lower()},
        read=gathered.read,
        copies=int(np.count_nonzero(copies.is_copy)),
        conflicting=copies.conflicting,
        sources={each.name: (each.images, each.duplicates, dict(each.findings)) for each in new},
        classes={each.name: dict(each.images) for each in manifest.classes},
        splits={
            name: SplitCount(
                images=split.images,
                image_bytes=split.image_bytes,
                shards=len(split.shards),
                shard_bytes=sum(shard.bytes for shard in split.shards),
            )
            for name, split in manifest.splits.items()
        },
        mean=manifest.statistics.mean,
        std=manifest.statistics.std,
        sides=_by_power(np.concatenate(shorter)),
        sizes=_by_power(np.concatenate(sizes)),
    )


def contact_sheet(folder: Path, manifest: ImageManifest) -> list[SheetRow]:
    """Return the first SHEET_IMAGES training images of up to SHEET_CLASSES classes, evenly
    spread."""
    from PIL import Image

    classes = len(manifest.classes)
    step = max(1, classes // SHEET_CLASSES)
    rows = []
    with contextlib.closing(SplitReader(folder, manifest, "train")) as reader:
        for label in range(0, classes, step)[:SHEET_CLASSES]:
            thumbnails = []
            for number in np.flatnonzero(reader.labels == label)[:SHEET_IMAGES].tolist():
                with Image.open(io.BytesIO(reader.read(number))) as image:
                    small = image.convert("RGB")
                small.thumbnail((THUMBNAIL, THUMBNAIL))
                file = io.BytesIO()
                small.save(file, "JPEG", quality=80)
                encoded = base64.b64encode(file.getvalue()).decode()
                thumbnails.append(f"data:image/jpeg;base64,{encoded}")
            rows.append(SheetRow(manifest.classes[label].name, thumbnails))
    return rows


def write_report(folder: Path, report: ImageReport, sheet: Sequence[SheetRow]) -> None:
    """Write report.json and report.html into the folder; the same report gives the same bytes.
    Raises OSError."""
    text = json.dumps(report.model_dump(mode="json"), ensure_ascii=True, indent=1)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(report, sheet), encoding="utf-8")


def page(report: ImageReport, sheet: Sequence[SheetRow]) -> str:
    """Render the whole page: nothing on it runs or is fetched."""
    plots = [
        (f"images by {what}", histogram(counts, *_span(counts), unit, "images"))
        for what, counts, unit in (
            ("shorter side in pixels", report.sides, "pixels"),
            ("size in bytes", report.sizes, "bytes"),
        )
    ]
    return (
        templates()
        .get_template("images.html.j2")
        .render(
            report=report,
            anchors={heading: heading.lower() for heading in SECTIONS},
            headline=_headline(report),
            notes=find_notes(report),
            sheet=sheet,
            classes=_classes(report),
            more_classes=max(0, len(report.classes) - MOST_CLASSES),
            plots=plots,
            splits=_splits(report),
            sources=_sources(report),
            findings=_findings(report),
            options=[(name, "none" if v is None else v) for name, v in report.options.items()],
            thumbnail=THUMBNAIL,
        )
    )


def find_notes(report: ImageReport) -> list[str]:
    """Return what somebody who is about to train on the set should look at first, a line each."""
    total, lines = findings_of(report), []
    for action in ("dropped", "converted"):
        if kinds := _kinds(total, action):
            lines.append(f"{action} {kinds}")
    if report.options["dedup"] == "none" and report.copies:
        lines.append(
            f"{counted(report.copies, 'image has', 'images have')} the pixels of one before "
            "(--dedup exact leaves them out)"
        )
    if report.conflicting:
        lines.append(
            f"{counted(report.conflicting, 'copy has', 'copies have')} another label than the "
            "first with the same pixels"
        )
    if "val" not in report.splits:
        lines.append("there is no validation split")
    empty = [name for name, images in report.classes.items() if not images.get("train", 0)]
    if empty:
        such = ", ".join(empty[:3])
        lines.append(f"{counted(len(empty), 'class', 'classes')} without images in train: {such}")
    return lines


def findings_of(report: ImageReport) -> Counter[str]:
    """Return how often each kind was found, in all sources."""
    return sum((Counter(found) for _, _, found in report.sources.values()), Counter[str]())


def format_summary(report: ImageReport) -> str:
    """Return some lines for a terminal, without control characters."""
    found = findings_of(report)
    kept = sum(images for images, _, _ in report.sources.values())
    left_out = sum(copies for _, copies, _ in report.sources.values())
    lines = [
        ("found", f"{counted(report.read, 'image')} in {counted(len(report.sources), 'INPUT')}")
    ]
    for action in ("dropped", "converted"):
        lines.append((action, _kinds(found, action) or "none"))
    asked = report.options["dedup"] != "none"
    lines.append(("copies", f"-{left_out:,} exact" if asked else "not left out"))
    lines.append(("kept", f"{counted(kept, 'image')} ({percent(kept, report.read)})"))
    per_class = [images.get("train", 0) for images in report.classes.values()]
    spread = f"{min(per_class):,} to {max(per_class):,} training images each"
    lines.append(("classes", f"{len(per_class):,}, {spread}"))
    for name, split in report.splits.items():
        shards = counted(split.shards, "shard")
        lines.append(
            (name, f"{counted(split.images, 'image')}, {shards}, {size(split.shard_bytes)}")
        )
    notes = (line for line in find_notes(report) if not line.startswith(("dropped", "converted")))
    lines += [("note", line) for line in notes]
    return "\n".join(visible(f"{name:9} {line}").replace("\n", " ") for name, line in lines)


def _kinds(found: Counter[str], action: str) -> str:
    """Return the kinds of findings of an action, the most frequent first: "3: 2 cmyk, 1 ..."."""
    here = [(kind, n) for kind, n in sorted(found.items()) if KINDS[kind][0] == action]
    listed = ", ".join(f"{n:,} {kind}" for kind, n in sorted(here, key=lambda each: -each[1]))
    return f"{sum(n for _, n in here):,}: {listed}" if here else ""


def _headline(report: ImageReport) -> list[tuple[str, Cell]]:
    images = sum(split.images for split in report.splits.values())
    mean, std = (", ".join(f"{v:.3f}" for v in each) for each in (report.mean, report.std))
    return [
        ("images", images),
        ("of images", ByteSize(sum(split.image_bytes for split in report.splits.values()))),
        ("classes", len(report.classes)),
        (f"mean; deviation {std}", mean),
    ]


def _classes(report: ImageReport) -> Table:
    most = max(sum(images.values()) for images in report.classes.values())
    rows: list[list[Cell]] = []
    for label, (name, images) in enumerate(report.classes.items()):
        if label == MOST_CLASSES:
            break
        train, val = images.get("train", 0), images.get("val", 0)
        parts = bar(
            ("kept", ratio(train, most), f"{train:,} train"),
            ("near", ratio(val, most), f"{val:,} val"),
        )
        rows.append([label, name, parts, train, val])
    return table("rlwrr", ["label", "class", "images", "train", "val"], rows)


def _splits(report: ImageReport) -> Table:
    rows: list[list[Cell]] = [
        [name, s.images, ByteSize(s.image_bytes), s.shards, ByteSize(s.shard_bytes)]
        for name, s in report.splits.items()
    ]
    return table("lrrrr", ["split", "images", "of images", "shards", "on disk"], rows)


def _sources(report: ImageReport) -> Table:
    rows: list[list[Cell]] = []
    for name, (images, copies, found) in report.sources.items():
        listed = ", ".join(f"{kind} {n:,}" for kind, n in found.items())
        rows.append([name, images, copies, listed])
    return table("lrrl", ["source", "kept", "copies left out", "findings"], rows)


def _findings(report: ImageReport) -> Table | None:
    found = findings_of(report)
    rows: list[list[Cell]] = [
        [kind, KINDS[kind][0], KINDS[kind][1], count] for kind, count in found.most_common()
    ]
    return table("lllr", ["finding", "action", "what it means", "times"], rows) if rows else None


def _by_power(values: Counts) -> list[int]:
    """Count values (n,), of at least 1, by their power of two."""
    powers = np.bincount(np.log2(values.astype(np.float64)).astype(np.int64))
    return [int(count) for count in powers]


def _span(counts: Sequence[int]) -> tuple[int, int]:
    """Return the powers of two that any image falls in, as a range of eight at least."""
    low = next((power for power, count in enumerate(counts) if count), 0)
    return low, max(len(counts), low + 8)
