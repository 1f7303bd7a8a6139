"""Each kind of input gives the images and labels that it holds; what cannot be is one line."""

import dataclasses
import gzip
import io
import json
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from rich.console import Console

from data_prep.images.inputs import all_units, find_inputs
from data_prep.images.options import ImageOptions
from data_prep.images.shards import SplitReader
from data_prep.images.terminal import print_plan
from data_prep.images.verify import verify
from testbed.images import CLASSES, class_folders, drawn, encoded, prepared, stored

IMAGES = [(encoded(drawn(n % 3, n), ("png", "jpg", "webp")[n % 3]), n % 3) for n in range(12)]
BY_NAME = {data: CLASSES[label] for data, label in IMAGES}
BY_NUMBER = {data: str(label) for data, label in IMAGES}
ALL = {"val_fraction": 0}


def write_tar(path: Path, images: list[tuple[bytes, int]] = IMAGES, first: int = 0) -> Path:
    """Write a tar as webdataset's own writer does."""
    with webdataset.TarWriter(str(path)) as writer:
        for number, (data, label) in enumerate(images, first):
            suffix = ("png", "jpg", "webp")[number % 3]
            writer.write({"__key__": f"s{number:03}", suffix: data, "cls": str(label).encode()})
    return path


def write_parquet(path: Path, labels: Any, images: Any = None, features: Any = None) -> Path:
    images = images or [{"bytes": data, "path": f"{n}.png"} for n, (data, _) in enumerate(IMAGES)]
    table = pa.table({"image": images, "label": labels})
    if features:
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    pq.write_table(table, path, row_group_size=5)
    return path


def write_idx(folder: Path, name: str, count: int, pack: bool = True) -> Path:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = np.arange(count, dtype=np.uint8) % 10
    for what, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        raw = header + array.tobytes()
        path = folder / f"{name}-{what}-ubyte{'.gz' if pack else ''}"
        path.write_bytes(gzip.compress(raw, mtime=0) if pack else raw)
    return folder / f"{name}-images-idx3-ubyte{'.gz' if pack else ''}"


def test_class_folders(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", 30)
    manifest, said = prepared([source], tmp_path / "out", **ALL)
    expected = {path.read_bytes(): path.parent.name for path in source.glob("*/*")}
    assert stored(tmp_path / "out", manifest, "train") == expected
    assert manifest.class_names == sorted(CLASSES)
    assert verify(tmp_path / "out") == []
    assert "30 images in 1 INPUT" in said and "no validation split" in said


def test_classes_are_mixed_and_in_another_order_by_another_seed(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", 60)
    orders = []
    for seed in (0, 1):
        out = tmp_path / f"out-{seed}"
        manifest, _ = prepared([source], out, seed=seed, **ALL)
        orders.append(SplitReader(out, manifest, "train").labels.tolist())
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    assert min(len(set(orders[0][at : at + 12])) for at in range(0, 60, 12)) >= 2


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_webdataset_tars(tmp_path: Path, packed: str) -> None:
    path = write_tar(tmp_path / f"a.tar{packed}")
    manifest, _ = prepared([path], tmp_path / "out", **ALL)
    assert stored(tmp_path / "out", manifest, "train") == BY_NUMBER


def test_tars_of_webdatasets_shard_writer_and_a_val_of_their_own(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "x-%04d.tar"), maxcount=5, verbose=0) as writer:
        for number, (data, label) in enumerate(IMAGES):
            suffix = ("png", "jpg", "webp")[number % 3]
            writer.write({"__key__": f"d/s{number:03}", suffix: data, "json": {"label": label}})
    manifest, _ = prepared(
        [tmp_path / "x-*.tar"], tmp_path / "out", val=str(tmp_path / "x-0002.tar")
    )
    train, val = (stored(tmp_path / "out", manifest, name) for name in ("train", "val"))
    assert len(train) == 10 and len(val) == 2 and {**train, **val} == BY_NUMBER


def test_parquet_of_hugging_face(tmp_path: Path) -> None:
    names = {"_type": "ClassLabel", "names": ["unused", *CLASSES]}
    path = write_parquet(
        tmp_path / "a.parquet",
        [label + 1 for _, label in IMAGES],
        features={"image": {"_type": "Image"}, "label": names},
    )
    manifest, _ = prepared([path], tmp_path / "out", **ALL)
    assert manifest.class_names == ["unused", *CLASSES]
    assert stored(tmp_path / "out", manifest, "train") == BY_NAME


def test_parquet_of_bytes_and_names(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "a.parquet",
        [CLASSES[label] for _, label in IMAGES],
        [data for data, _ in IMAGES],
    )
    manifest, _ = prepared([path], tmp_path / "out", **ALL)
    assert stored(tmp_path / "out", manifest, "train") == BY_NAME


def test_parquet_with_rows_that_lack_something(tmp_path: Path) -> None:
    images = [{"bytes": data, "path": None} for data, _ in IMAGES]
    images[3] = {"bytes": None, "path": "elsewhere.png"}
    labels: list[int | None] = [label for _, label in IMAGES]
    labels[5] = None
    manifest, _ = prepared(
        [write_parquet(tmp_path / "a.parquet", labels, images)], tmp_path / "out", **ALL
    )
    assert manifest.sources[0].findings == {"no_image": 1, "no_label": 1}
    assert manifest.splits["train"].images == 10


@pytest.mark.parametrize("pack", [True, False])
def test_idx_files(tmp_path: Path, pack: bool) -> None:
    (tmp_path / "in").mkdir()
    write_idx(tmp_path / "in", "train", 100, pack)
    test = write_idx(tmp_path / "in", "t10k", 20, pack)
    manifest, _ = prepared([tmp_path / "in"], tmp_path / "out", val=str(test))
    assert {name: split.images for name, split in manifest.splits.items()} == {
        "train": 100,
        "val": 20,
    }
    assert manifest.class_names == [str(digit) for digit in range(10)]
    images = np.random.default_rng(0).integers(0, 256, (100, 28, 28), dtype=np.uint8)
    expected = {image.tobytes(): str(n % 10) for n, image in enumerate(images)}
    found = stored(tmp_path / "out", manifest, "train")
    opened = {Image.open(io.BytesIO(data)).tobytes(): name for data, name in found.items()}
    assert opened == expected
    assert np.isclose(manifest.statistics.mean[0], images.mean() / 255)
    assert np.allclose(manifest.statistics.std, (images / 255).std())


def test_a_url_gives_what_a_path_gives(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", 12)
    fs = fsspec.filesystem("memory")
    fs.put(str(source), "/bucket/in", recursive=True)
    fs.put(str(write_tar(tmp_path / "a.tar")), "/bucket/a.tar")
    try:
        for name in ("in", "a.tar"):
            here, _ = prepared([tmp_path / name], tmp_path / f"here-{name}", **ALL)
            there, _ = prepared([f"memory://bucket/{name}"], tmp_path / f"there-{name}", **ALL)
            assert here == there
    finally:
        fs.rm("/bucket", recursive=True)


def test_val_by_a_list_of_names_and_by_a_folder(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", 30)
    chosen = sorted(path.relative_to(source).as_posix() for path in source.glob("*/*"))[::4]
    (tmp_path / "val.txt").write_text("\n".join(chosen) + "\n\n")
    manifest, _ = prepared([source], tmp_path / "listed", val=str(tmp_path / "val.txt"))
    held = stored(tmp_path / "listed", manifest, "val")
    assert held == {(source / name).read_bytes(): name.split("/")[0] for name in chosen}
    for name in chosen:
        target = tmp_path / "val" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (source / name).rename(target)
    again, _ = prepared([source], tmp_path / "given", val=str(tmp_path / "val"))
    assert stored(tmp_path / "given", again, "val") == held
    assert again.options.val_fraction is None


def test_copies_go_from_train_and_not_from_val(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", 30)
    val = class_folders(tmp_path / "val", 6)  # the first six of train
    (source / "bar" / "again.png").write_bytes(encoded(drawn(0, 0), "png"))
    manifest, _ = prepared([source], tmp_path / "out", val=str(val), dedup="exact")
    assert {name: split.images for name, split in manifest.splits.items()} == {
        "train": 24,
        "val": 6,
    }
    assert [source.duplicates for source in manifest.sources] == [0, 7]
    manifest, said = prepared([source], tmp_path / "all", val=str(val))
    assert manifest.splits["train"].images == 31
    assert "7 images have the pixels of one before" in said


def test_copies_with_another_label_are_told(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", 30)
    (source / "disc" / "again.webp").write_bytes((source / "bar" / "00000.png").read_bytes())
    _, said = prepared([source], tmp_path / "out", **ALL)
    assert "1 copy has another label than the first with the same pixels" in said


def refused(inputs: list[Any], out: Path, words: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        prepared(inputs, out, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert not (out / "manifest.json").exists()


def test_input_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = class_folders(tmp_path / "in", 30)
    (source / "empty").mkdir()
    refused([source], out, r"in/empty: a class folder without images")
    (source / "empty").rmdir()
    refused([tmp_path / "nowhere"], out, "no such file or folder")
    refused([source / "bar"], out, "images but no class folders, expected .*/CLASS/")
    refused([source / "bar" / "00000.png"], out, "named one by one have no class")
    (tmp_path / "splits").mkdir()
    for name in ("train", "val"):
        class_folders(tmp_path / "splits" / name, 6)
    refused([tmp_path / "splits"], out, r"give .*splits/train --val .*splits/val")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    refused([tmp_path / "text"], out, r"found no images among 1 files, such as a\.txt")
    other = class_folders(tmp_path / "other", 6)
    (other / "bar").rename(other / "whale")
    refused([source], out, "class 'whale' of the validation images is unknown", val=str(other))
    (tmp_path / "val.txt").write_text("bar/00000.png\nbar/none.png\n")
    refused(
        [source],
        out,
        r"1 of its names are of no image, such as 'bar/none\.png'",
        val=str(tmp_path / "val.txt"),
    )
    refused([source], out, "val: found 1.5", val_fraction=1.5)
    refused([source], out, "holds all of the input", val=str(source))


def test_labels_that_no_class_has_are_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    names = {"label": {"_type": "ClassLabel", "names": list(CLASSES)}}
    bad = write_parquet(tmp_path / "a.parquet", [3] * 12, features=names)
    refused([bad], out, r"a\.parquet, row 1: label 3 has no class, for the file names 3")
    named = write_parquet(tmp_path / "b.parquet", ["bar"] * 12)
    refused([named, write_tar(tmp_path / "a.tar")], out, "labels that are numbers .* and labels")
    refused([write_tar(tmp_path / "c.tar", [(IMAGES[0][0], -1)])], out, "label -1 has no class")
    two = pa.table({"image": [b""], "fine": [1], "coarse": [2]})
    pq.write_table(two, tmp_path / "two.parquet")
    refused([tmp_path / "two.parquet"], out, "several columns that may be the label: 'fine', 'co")
    refused([tmp_path / "two.parquet"], out, "none of the 1 images is left", label_field="fine")


def test_damaged_containers_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = write_tar(tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        offsets = [member.offset for member in tar]
    cut = tmp_path / "cut.tar"
    for end in (offsets[6], offsets[6] + 700, offsets[6] + 100):
        cut.write_bytes(whole[:end])
        refused([cut], out, r"cut\.tar: damaged after \d samples: .*make it again")
    cut.write_bytes(whole[: offsets[6]] + b"x" * 512 + whole[offsets[6] + 512 :])
    refused([cut], out, r"cut\.tar: damaged after \d samples")
    images = write_idx(tmp_path, "train", 50, pack=False)
    images.write_bytes(images.read_bytes()[:-5])
    refused([images], out, "ends after 49 of 50 images")
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    refused([images], out, "has no labels beside it, expected .*train-labels-idx1-ubyte")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    refused([tmp_path / "b.parquet"], out, r"b\.parquet: damaged")


def test_a_plan_is_shown_and_nothing_written(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", 12)
    (source / "bar" / "notes.txt").write_text("no image")
    (tmp_path / "val.txt").write_text("bar/00000.png\n")
    asked = ImageOptions([source], tmp_path / "out", resize_shorter=16, workers=3)
    console = Console(file=io.StringIO(), width=100)
    print_plan(asked, console)
    print_plan(dataclasses.replace(asked, task=(1, 2), val=str(tmp_path / "val.txt")), console)
    said = console.file.getvalue()
    for words in (
        "train, val",
        "shorter side at most 16",
        "5.00% held out",
        "3 processes in",
        "1 other_suffix",
        "task       1 of 2: 0 units",
        "val.txt",
        "nothing was written",
    ):
        assert words in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"none\.txt: cannot be read"):
        print_plan(dataclasses.replace(asked, val="none.txt"), console)


def test_the_list_of_files_takes_little_memory(tmp_path: Path) -> None:
    """Below 1 GB for ImageNet's 1.28 million, twice: it is listed again at the end."""
    files = 2_600
    for number in range(files):
        path = tmp_path / "in" / f"n{number // 1300:08}" / f"n{number // 1300:08}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    tracemalloc.start()
    try:
        units = all_units(find_inputs([tmp_path / "in"], None))
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(len(unit.files) for unit in units) == files
    assert units[0].files[1].name == "in/n00000000/n00000000_1.JPEG"
    assert units == all_units(find_inputs([tmp_path / "in"], None))
    assert held / files < 200 and most / files < 450, (held / files, most / files)
