"""Rows of images: the same ones, to the pixel, on any number of ranks and processes."""

import hashlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import webdataset
from PIL import Image
from torch import Tensor

from data_prep.images.shards import SplitReader, load_manifest
from dnt_scale.config import AugmentSection
from dnt_scale.data import augment
from dnt_scale.data.augment import (
    OPERATIONS,
    Part,
    augmented,
    draws,
    erased,
    middle,
    middle_box,
    mixed,
    part_of,
    reduction,
    resized,
    resized_by_pillow,
    resized_by_torch,
)
from dnt_scale.data.augment import random_box as random_box_of
from dnt_scale.data.images import ImageSource
from dnt_scale.model.batch import IGNORED
from testbed.images import drawn, encoded, prepared, small_image_set
from tests.helpers.image_sources import TRAIN, VAL, source


def read(
    found: ImageSource, batches: int, ranks: int = 1, consumed: int = 0, seed: int = 7
) -> list[dict[str, Tensor]]:
    """Global batches of 12 rows, put together from what each rank gets."""
    parts: list[list[dict[str, Tensor]]] = []
    for rank in range(ranks):
        with found.stream(
            seed=seed, global_batch=12, rank=rank, world_size=ranks, consumed_rows=consumed
        ) as stream:
            parts.append([next(stream)[0] for _ in range(batches)])
    return [
        {name: torch.cat([each[name] for each in batch]) for name in batch[0]}
        for batch in zip(*parts, strict=True)
    ]


def hashes(batches: list[dict[str, Tensor]]) -> list[str]:
    return [
        hashlib.sha256(
            b"".join(name.encode() + batch[name].numpy().tobytes() for name in sorted(batch))
        ).hexdigest()
        for batch in batches
    ]


def test_any_ranks_see_the_same_pixels_before_and_after_a_stop(image_set: Path) -> None:
    found = source(image_set)
    whole = hashes(read(found, 50))  # six epochs
    assert len(set(whole)) == 50
    stopped = hashes(read(found, 20, ranks=4))
    for ranks in (1, 3):
        resumed = hashes(read(found, 30, ranks=ranks, consumed=20 * 12))
        assert stopped + resumed == whole, ranks
    assert hashes(read(found, 1, seed=8))[0] not in whole


def test_processes_make_the_same_rows(image_set: Path) -> None:
    by_two = source(image_set, workers=2)
    assert hashes(read(by_two, 12)) == hashes(read(source(image_set), 12))
    mine, theirs = (
        list(each.validation(rows=None, micro_batch=5, rank=0, world_size=1)[""])
        for each in (source(image_set), by_two)
    )
    assert hashes(mine) == hashes(theirs)


def test_validation_borrows_the_processes_of_training(image_set: Path) -> None:
    found = source(image_set, workers=1)
    before = set(psutil.Process().children())
    with found.stream(seed=7, global_batch=12, rank=0, world_size=1) as stream:
        next(stream)
        [process] = stream.read.decoders.processes
        batches = found.validation(rows=None, micro_batch=5, rank=0, world_size=1)[""]
        mine = [next(batches)]
        assert {each.pid for each in set(psutil.Process().children()) - before} == {process.pid}
        mine += batches
    own = source(image_set).validation(rows=None, micro_batch=5, rank=0, world_size=1)[""]
    assert hashes(mine) == hashes(list(own))


def test_processes_are_as_many_as_cpus_and_images_ask_for(
    image_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert source(image_set, workers=3).processes == 3
    for cpus, ranks, large, expected in (
        (1, 1, True, 0),
        (2, 1, True, 1),
        (8, 1, True, 7),
        (8, 1, False, 1),
        (8, 4, True, 1),
        (192, 1, True, 16),
    ):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cpus=cpus: set(range(cpus)))
        monkeypatch.setattr("dnt_scale.distributed.host.sharing", ranks)
        monkeypatch.setattr("dnt_scale.data.images.SMALL_PIXELS", 0 if large else 64 * 64)
        assert source(image_set, workers=None).processes == expected, (cpus, ranks, large)


def test_an_epoch_has_every_image_once_as_it_is_stored(image_set: Path) -> None:
    found = source(image_set, "none", center=1.0)
    batches = read(found, 25)  # three epochs
    images = torch.cat([batch["image"] for batch in batches]).numpy()
    labels = torch.cat([batch["label"] for batch in batches]).tolist()
    reader = SplitReader(image_set, load_manifest(image_set), "train")
    opened = (Image.open(io.BytesIO(reader.read(number))) for number in range(TRAIN))
    stored = [np.asarray(image.convert("RGB")) for image in opened]
    number_of = {pixels.tobytes(): number for number, pixels in enumerate(stored)}
    order = [number_of[pixels.transpose(1, 2, 0).tobytes()] for pixels in images]
    assert [reader.labels[number] for number in order] == labels
    for epoch in range(3):
        assert sorted(order[epoch * TRAIN : (epoch + 1) * TRAIN]) == list(range(TRAIN))
    assert order[:TRAIN] != order[TRAIN : 2 * TRAIN] != sorted(order[TRAIN : 2 * TRAIN])
    behind = found.rows_behind(7, 0, 3)
    assert behind["rows"] == [
        {"shard": f"train-{number // 40:06}.tar", "key": f"{number:08}"} for number in order[:3]
    ]
    assert "target" not in batches[0]


def test_a_later_stage_goes_on_where_the_set_was_left(image_set: Path) -> None:
    """Also from an odd position, which would part a pair, and with other recipes on the way."""
    whole = source(image_set, recipe="deit")
    left = whole.passed(5)
    later = source(image_set, recipe="deit").after(left)
    assert later.passed(4) == whole.passed(9)
    assert later.rows_behind(7, 0, 4)["rows"] == whole.rows_behind(7, 5, 9)["rows"]
    assert hashes(read(later, 2)) == hashes(read(whole, 2, consumed=5))


def test_tars_of_webdataset_go_through_our_set_and_back(tmp_path: Path) -> None:
    """ShardWriter's tars become a set, our stream gives their pixels and labels, and WebDataset
    reads the set's tars."""
    images = {encoded(drawn(number % 3, number), "png"): number % 3 for number in range(30)}
    with webdataset.ShardWriter(str(tmp_path / "w-%03d.tar"), maxcount=8, verbose=0) as writer:
        for number, (data, label) in enumerate(images.items()):
            writer.write({"__key__": f"{number:05}", "png": data, "cls": label})
    manifest, _ = prepared([tmp_path / "w-*.tar"], tmp_path / "set", val_fraction=0)
    assert manifest.class_names == ["0", "1", "2"]
    pixels = {
        np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1).tobytes(): label
        for data, label in images.items()
    }
    found = source(tmp_path / "set", "none", center=1.0)
    with found.stream(seed=7, global_batch=10, rank=0, world_size=1) as stream:
        batches = [next(stream)[0] for _ in range(3)]
    read_by_us = {
        image.numpy().tobytes(): int(label)
        for batch in batches
        for image, label in zip(batch["image"], batch["label"], strict=True)
    }
    assert read_by_us == pixels
    tars = [str(tmp_path / "set" / shard.file) for shard in manifest.splits["train"].shards]
    samples = webdataset.WebDataset(tars, shardshuffle=False)
    assert {sample["png"]: int(sample["cls"]) for sample in samples} == images


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_counts_every_image_once(image_set: Path, ranks: int) -> None:
    found = source(image_set, center=1.0)
    parts = [
        list(found.validation(rows=None, micro_batch=4, rank=rank, world_size=ranks)[""])
        for rank in range(ranks)
    ]
    assert len({len(part) for part in parts}) == 1  # the engines' collectives need it
    batches = [batch for part in parts for batch in part]
    assert {len(batch["image"]) for batch in batches} == {4}
    seen = [
        image.numpy().tobytes()
        for batch in batches
        for image, label in zip(batch["image"], batch["label"], strict=True)
        if label != IGNORED
    ]
    assert len(seen) == len(set(seen)) == VAL
    few = found.validation(rows=5, micro_batch=4, rank=0, world_size=1)[""]
    assert sum(int((batch["label"] != IGNORED).sum()) for batch in few) == 5


def test_soft_targets_say_what_was_mixed(image_set: Path) -> None:
    recipe = {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.3}
    batch = read(source(image_set, recipe), 1)[0]
    target = batch["target"]
    torch.testing.assert_close(target.sum(1), torch.ones(12))
    assert (target.amin(1) >= 0.1 - 1e-6).all()
    own = torch.nn.functional.one_hot(batch["label"], 3).float() * 0.7
    pairs = (target - 0.1).view(6, 2, 3).sum(1)  # what one image gives, its partner takes
    torch.testing.assert_close(pairs, own.view(6, 2, 3).sum(1))
    assert ((target - 0.1 - own).abs().amax(1) > 1e-3).any()


def test_a_batch_that_cuts_a_pair_mixes_it_all_the_same(image_set: Path) -> None:
    found = source(image_set, {"mixup": 0.8})
    whole = read(found, 5)[0]
    with found.stream(seed=7, global_batch=12, rank=3, world_size=4) as stream:
        ninth = next(stream)[0]  # three rows: positions 9, 10 and 11
    for name, tensor in ninth.items():
        assert torch.equal(tensor, whole[name][9:]), name


# ---------------------------------------------------------------- what is done to an image


def noisy(side: int = 24) -> Image.Image:
    return drawn(1, 5, side)


def test_mixup_is_a_mean_and_cutmix_a_rectangle() -> None:
    one, other = (np.full((3, 16, 16), value, np.uint8) for value in (200, 100))
    shares = []
    for position in range(40):
        both = mixed(one, other, AugmentSection(mixup=0.8), draws(1, position, augment.MIX))
        assert both.first[0, 0, 0] == np.rint(both.share * 200 + (1 - both.share) * 100)
        assert (both.first.astype(int) + both.second == 300).all()
        both = mixed(one, other, AugmentSection(cutmix=1.0), draws(1, position, augment.MIX))
        assert (both.first == 200).mean() == pytest.approx(both.share)
        assert (both.second == 100).mean() == pytest.approx(both.share)
        shares.append(both.share)
    assert 0.3 < np.mean(shares) < 0.8 and np.std(shares) > 0.15
    assert (one == 200).all() and (other == 100).all()


@pytest.mark.parametrize(("width", "height"), [(50, 40), (7, 100), (1, 1), (300, 20)])
def test_a_random_crop_lies_inside(width: int, height: int) -> None:
    areas = []
    for position in range(300):
        left, top, right, bottom = random_box_of(width, height, 0.08, 1.0, draws(0, position, 1))
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        areas.append((right - left) * (bottom - top) / (width * height))
    if (width, height) == (50, 40):
        assert min(areas) < 0.15 and max(areas) > 0.9


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_changes_an_image_and_keeps_its_shape(name: str) -> None:
    image = noisy()
    changed = [OPERATIONS[name](image, 0.9, sign) for sign in (1, -1)]
    assert {(each.size, each.mode) for each in changed} == {(image.size, "RGB")}
    assert any(each.tobytes() != image.tobytes() for each in changed)


def test_erasing_covers_a_rectangle_with_noise() -> None:
    pixels = np.zeros((3, 32, 32), np.uint8)
    shares = [(erased(pixels, draws(2, position, 1)) != 0).mean() for position in range(100)]
    assert min(shares) > 0.01 and max(shares) < 0.35 and not pixels.any()


def test_validation_sees_the_middle() -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:30, 20:40] = 255  # half of the shorter side, in the middle
    data = encoded(Image.fromarray(pixels))
    # the filter of a place at the rim reaches beyond it
    assert (middle(data, 10, 0.5)[:, 1:-1, 1:-1] == 255).all()
    assert middle(data, 10, 1.0).mean() == pytest.approx(255 / 4, abs=3)


def smooth(width: int, height: int) -> Image.Image:
    """Draw waves, of which a JPEG loses little."""
    x, y = np.arange(width), np.arange(height)[:, None]
    waves = [np.sin(x / (9 + n)) * np.cos(y / (7 + 2 * n)) for n in range(3)]
    return Image.fromarray((128 + 100 * np.stack(waves, -1)).astype(np.uint8))


def jpeg(image: Image.Image, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **settings})
    return file.getvalue()


@pytest.mark.parametrize(
    "settings", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"mode": "L"}]
)
def test_a_jpeg_has_the_pixels_that_pillow_decodes(settings: dict[str, Any]) -> None:
    data = jpeg(smooth(83, 61).convert(settings.pop("mode", "RGB")), **settings)
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for left, top in ((0, 0), (17, 9), (83 - 40, 61 - 40)):  # 40 of 40 pixels: none is resized
        box = (left, top, left + 40, top + 40)
        part = part_of(data, 40, lambda width, height, box=box: box)
        for found in (resized_by_pillow(part, 40), resized_by_torch(part, 40)):
            assert (found.transpose(1, 2, 0) == whole[top : top + 40, left : left + 40]).all()
    box = (10, 5, 75, 58)
    resized = Image.fromarray(whole).resize((30, 30), Image.Resampling.BILINEAR, box)
    part = part_of(data, 30, lambda width, height: box)
    found = resized_by_pillow(part, 30).transpose(1, 2, 0)
    # weights of the filter round otherwise where the image begins elsewhere
    assert np.abs(found.astype(int) - np.asarray(resized)).max() <= 1
    alone = Image.fromarray(whole).crop(box).resize((30, 30), Image.Resampling.BILINEAR)
    found = resized_by_torch(part, 30).transpose(1, 2, 0)
    assert np.abs(found.astype(int) - np.asarray(alone)).max() <= 1


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size() -> None:
    assert [reduction((0, 0, side, 5000), 224) for side in (447, 448, 896, 4000)] == [1, 2, 4, 8]
    image = smooth(1003, 805)
    data = jpeg(image, quality=95)
    # decoded at a half to an eighth, where edges are of whole pixels and where they are not
    boxes = ((0, 0, 1003, 805), (200, 101, 700, 540), (200, 104, 696, 536), (900, 700, 1003, 805))
    for box in boxes:
        part = part_of(data, 50, lambda width, height, box=box: box)
        whole = np.asarray(image.resize((50, 50), Image.Resampling.BILINEAR, box))
        found = resized_by_pillow(part, 50).transpose(1, 2, 0).astype(int)
        assert np.abs(found - whole).mean() < 3, box  # moved by 8 pixels: 14 and more
        left, top, right, bottom = map(round, part.box)  # moved by half a pixel of these at most
        rounded = resized_by_pillow(Part(part.pixels, (left, top, right, bottom)), 50)
        assert np.abs(resized_by_torch(part, 50).astype(int) - rounded).mean() < 1, box


def test_a_jpeg_of_four_channels_or_with_bytes_that_are_too_many_is_decoded() -> None:
    image = smooth(64, 64)
    for data in (jpeg(image.convert("CMYK")), jpeg(image) + b"more"):
        found = resized_by_torch(part_of(data, 64, lambda width, height: (0, 0, 64, 64)), 64)
        assert np.abs(found.transpose(1, 2, 0).astype(int) - np.asarray(image)).mean() < 4


@pytest.mark.parametrize("kind", ["png", "webp"])
@pytest.mark.parametrize("shape", [(33, 50), (50, 33), (41, 41)])
def test_validation_sees_what_pillow_makes_of_the_whole_image(
    kind: str, shape: tuple[int, int]
) -> None:
    data = encoded(noisy(64).resize(shape), kind)
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    expected = np.asarray(resized(whole, 16, middle_box(*shape, 0.875)))
    assert (middle(data, 16, 0.875).transpose(1, 2, 0) == expected).all()


def test_pixels_do_not_depend_on_the_kernels_of_the_processor() -> None:
    code = """
import hashlib, numpy as np
from dnt_scale.data.augment import Part, resized_by_torch
draw = np.random.default_rng(0)
found = hashlib.sha256()
for size in (16, 28, 64, 224):
    pixels = draw.integers(0, 256, (233, 171, 3), np.uint8)
    found.update(resized_by_torch(Part(pixels, (3, 5, 160, 229)), size).tobytes())
print(found.hexdigest())
"""
    hashes = set()
    for kernels in ({}, {"ATEN_CPU_CAPABILITY": "default"}):  # the processor's own, and none's
        environment = {**os.environ, **kernels}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        hashes.add(done.stdout)
    assert len(hashes) == 1


def test_choices_differ_from_position_to_position() -> None:
    recipe = AugmentSection(crop=(0.08, 1.0), flip=0.5, randaugment=2, magnitude=9, erase=0.25)
    made = [
        augmented(
            encoded(noisy(40)), 16, 0.875, recipe, draws(3, position, augment.IMAGE)
        ).tobytes()
        for position in (*range(20), *range(20))
    ]
    assert made[:20] == made[20:] and len(set(made)) == 20


# ---------------------------------------------------------------- faults


def damage(folder: Path, out: Path) -> Path:
    """A set of which the first training image has other bytes than were written."""
    small_image_set(out, train=8, val=4)
    reader = SplitReader(out, load_manifest(out), "train")
    path, offset = reader.paths[0], int(reader.index[0]["offset"])
    raw = bytearray(path.read_bytes())
    raw[offset + 40] ^= 255
    path.write_bytes(raw)
    return out


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(image_set: Path, tmp_path: Path, workers: int) -> None:
    found = source(damage(image_set, tmp_path / "set"), workers=workers)
    with (
        found.stream(seed=0, global_batch=8, rank=0, world_size=1) as stream,
        pytest.raises(ValueError, match=r"train-000000\.tar: image 00000000 is damaged"),
    ):
        next(stream)


def test_a_process_that_found_damage_ends_quietly(
    image_set: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = source(damage(image_set, tmp_path / "set"), workers=1)
    stream = found.stream(seed=0, global_batch=8, rank=0, world_size=1)
    [process] = stream.read.decoders.processes
    with stream:
        with pytest.raises(ValueError, match="is damaged"):
            next(stream)
        assert process.wait() == 0
    assert capfd.readouterr().err == ""


def test_a_process_that_ends_is_told_of(image_set: Path) -> None:
    stream = source(image_set, workers=1).stream(seed=0, global_batch=12, rank=0, world_size=1)
    [process] = stream.read.decoders.processes
    os.kill(process.pid, signal.SIGKILL)
    with stream, pytest.raises(OSError, match=r"decodes images ended \(SIGKILL\).*data\.workers"):
        next(stream)


def test_a_set_of_text_and_a_missing_one_are_refused(corpus: Path, tmp_path: Path) -> None:
    for path, message in ((corpus, "dnt-shards"), (tmp_path, "no manifest here")):
        with pytest.raises(ValueError, match=message):
            source(path)


def test_other_classes_are_foreign(image_set: Path) -> None:
    found = source(image_set)
    assert found.foreign(found.facts(), "step-1") is None
    assert "made of other classes than step-1" in str(
        found.foreign({"classes_sha256": "0" * 64}, "step-1")
    )


def test_a_set_without_validation_says_what_to_do(tmp_path: Path) -> None:
    small_image_set(tmp_path / "set", train=8, val=0)
    missing = source(tmp_path / "set").no_validation()
    assert missing and missing.field == "data.path" and "--val" in missing.remedy
