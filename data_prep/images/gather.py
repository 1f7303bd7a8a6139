"""What all chunks tell together: the images, the classes, the findings."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from data_prep.images.chunks import ROW, read_chunk
from data_prep.images.classes import class_list, class_name
from data_prep.images.findings import Finding
from data_prep.images.inputs import ImageInput
from data_prep.images.options import ImageOptions, read_val_list
from data_prep.images.plan import Images
from data_prep.images.raw import Label
from data_prep.images.shards import ImageManifest
from data_prep.progress import stage
from data_prep.set_files import SplitName

REJECTS = "rejects.jsonl"


class Gathered(NamedTuple):
    """What all chunks tell: the images, names of the classes, and findings by INPUT; `read` is how
    many images were found, `labels_before` the labels of a chunk's images as numbers."""

    images: Images
    classes: list[str]
    findings: list[Counter[str]]
    read: int


def gather(
    folder: Path,
    options: ImageOptions,
    base: ImageManifest | None,
    inputs: Sequence[ImageInput],
    chunks: list[list[Path]],
    console: Console,
) -> Gathered:
    """Read all chunks, and write all findings to rejects.jsonl. Raises ValueError for labels that
    no class has, and for names of validation images that none has."""
    source_of = [number for number, each in enumerate(inputs) for _ in each.units]
    findings = [Counter(finding.kind for finding in each.passed) for each in inputs]
    labels: dict[SplitName | None, dict[Label, str]] = {"train": {}, "val": {}, None: {}}
    declared: dict[tuple[str, ...], None] = {}
    matched: set[str] = set()
    columns: list[tuple[Any, ...]] = []
    own_labels: list[list[Label]] = []
    read = 0
    with (
        (folder / REJECTS).open("wb") as rejects,
        stage(console, "count", sum(map(len, chunks)), "chunks") as advance,
    ):
        for each in inputs:
            _write_findings(rejects.write, each.passed)
        every = ((s, path) for s, unit in zip(source_of, chunks, strict=True) for path in unit)
        for number, (source, path) in enumerate(every):
            rows, meta = read_chunk(path)
            split = inputs[source].split
            for label, place in zip(meta["labels"], meta["places"], strict=True):
                labels[split].setdefault(label, place)
            declared[tuple(meta["class_names"])] = None
            matched.update(meta["matched"])
            findings[source].update(finding.kind for finding in meta["findings"])
            _write_findings(rejects.write, meta["findings"])
            own_labels.append(meta["labels"])
            is_val = np.full(len(rows), split == "val") | rows["held"]
            columns.append((np.full(len(rows), number), rows, np.full(len(rows), source), is_val))
            read += meta["read"]
            advance(1)
    if missing := sorted(read_val_list(options) - matched):
        raise ValueError(
            f"{options.val}: {len(missing):,} of its names are of no image, such as "
            f"{missing[0]!r}; expected names below the INPUT, such as CLASS/IMAGE.jpg"
        )
    before = [each.name for each in base.classes] if base else []
    train_labels = {**labels["train"], **labels[None]}
    if not train_labels:
        raise ValueError("the input holds no images with a label; see what else was found there")
    classes = class_list(train_labels, declared, before)
    _check_val_labels(labels["val"], classes, declared)
    place_of = {name: number for number, name in enumerate(classes)}
    label_columns = [
        np.array([place_of[class_name(label, declared)] for label in own], np.int64)[rows["label"]]
        for own, (_, rows, _, _) in zip(own_labels, columns, strict=True)
    ]
    images = _images(columns, label_columns)
    return Gathered(images, classes, findings, read)


def _images(columns: Sequence[tuple[Any, ...]], labels: Sequence[Any]) -> Images:
    """Put the rows of all chunks one after the other."""

    def joined(name: str, dtype: Any = np.int64) -> Any:
        empty = np.empty((0, *ROW[name].shape), dtype)
        return np.concatenate([empty, *(rows[name] for _, rows, _, _ in columns)], dtype=dtype)

    return Images(
        chunk=np.concatenate([number for number, _, _, _ in columns]),
        offset=joined("offset"),
        size=joined("size"),
        label=np.concatenate(labels),
        width=joined("width"),
        height=joined("height"),
        pixels=joined("pixels", np.uint64),
        source=np.concatenate([source for _, _, source, _ in columns]),
        is_val=np.concatenate([is_val for _, _, _, is_val in columns]),
    )


def _write_findings(write: Callable[[bytes], object], findings: Sequence[Finding]) -> None:
    for finding in findings:
        if finding.action in ("dropped", "converted", "passed over"):
            write(json.dumps(finding.to_json(), ensure_ascii=True).encode() + b"\n")


def _check_val_labels(
    val: dict[Label, str], classes: list[str], declared: Iterable[tuple[str, ...]]
) -> None:
    """Raise ValueError for a class of val that train has not."""
    for label, place in val.items():
        if class_name(label, declared) not in classes:
            raise ValueError(
                f"{place}: class {label!r} of the validation images is unknown in train, which has "
                f"{len(classes):,} classes from {classes[0]!r} to {classes[-1]!r}; correct --val"
            )
