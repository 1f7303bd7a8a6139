"""The format of image sets: what is written is read, by us and by webdataset, and damage is
found."""

import contextlib
import ctypes
import io
import json
import mmap
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from data_prep import shards as text_shards
from data_prep.images.pixels import measure
from data_prep.images.shards import (
    INDEX,
    LABEL_BEFORE,
    PixelStats,
    Sample,
    SplitReader,
    load_manifest,
    read_sample,
    sample_bytes,
    sample_key,
    suffix_of,
    write_shard,
)
from data_prep.images.verify import verify
from testbed.corpus import contents, small_set
from testbed.images import CLASSES, drawn, encoded, small_image_set
from testbed.waiting import until


def test_the_same_images_give_the_same_bytes_and_are_whole(tmp_path: Path) -> None:
    manifest = small_image_set(tmp_path / "a")
    small_image_set(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert load_manifest(tmp_path / "a") == manifest
    assert verify(tmp_path / "a") == []
    assert manifest.class_names == list(CLASSES)
    assert len(manifest.splits["train"].shards) == 3


def test_every_sample_is_one_read(tmp_path: Path) -> None:
    manifest = small_image_set(tmp_path / "set")
    with contextlib.closing(SplitReader(tmp_path / "set", manifest, "train")) as reader:
        assert len(reader) == 96
        assert reader.labels.tolist() == [number % 3 for number in range(96)]
        for number in range(96):
            data, row = reader.read(number), reader.index[number]
            suffix = ("png", "jpg")[number // 3 % 2]
            assert data == encoded(drawn(number % 3, number), suffix)
            assert suffix_of(data) == suffix
            assert (row["width"], row["height"]) == (32, 32)
            tar = reader.paths[reader.shards[number]].read_bytes()
            at = int(row["offset"]) - LABEL_BEFORE
            assert tar[at : at + 2] == str(number % 3).encode() + b"\0"
        with pytest.raises(IndexError):
            reader.read(96)
    assert read_sample(tmp_path / "set", manifest, "train", 95).data == data


def in_cache(path: Path, start: int, size: int) -> bool:
    """Whether the system has bytes of a file in memory: looking at pages fetches none."""
    page = mmap.PAGESIZE
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as whole:
        pages = (ctypes.c_ubyte * -(-len(whole) // page))()
        view = ctypes.c_char.from_buffer(whole)
        assert (
            ctypes.CDLL(None).mincore(ctypes.byref(view), ctypes.c_size_t(len(whole)), pages) == 0
        )
        del view
    return all(there & 1 for there in pages[start // page : -(-(start + size) // page)])


def test_what_is_expected_is_fetched_from_the_disk(tmp_path: Path) -> None:
    """Where the file system lets pages be dropped, as one in memory does not."""
    out = tmp_path / "set"
    manifest = small_image_set(out)
    with contextlib.closing(SplitReader(out, manifest, "train")) as reader:
        places = [
            (reader.paths[reader.shards[number]], int(row["offset"]), int(row["size"]))
            for number, row in enumerate(reader.index)
        ]
        for path in reader.paths:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        reader.expect(range(0, 96, 2))
        until(lambda: all(in_cache(*place) for place in places[::2]))
        reader.paths[0].unlink()
    with contextlib.closing(SplitReader(out, manifest, "train")) as reader:
        reader.expect([0, 95])  # says nothing
        with pytest.raises(FileNotFoundError):
            reader.read(0)


def test_what_is_expected_is_asked_for_in_its_order_on_disk_and_in_small_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a longer part Linux reads its beginning only. Neighbours are one part."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *place: asked.append(place[:2]))
    out = tmp_path / "set"
    manifest = small_image_set(out)
    with contextlib.closing(SplitReader(out, manifest, "train")) as reader:
        places = [(int(row["offset"]), int(row["size"])) for row in reader.index]
        first = range(reader.firsts[1])
        begin, end = places[0][0], sum(places[first[-1]])
        monkeypatch.setattr("data_prep.images.shards.ADVISED", 1 << 20)
        reader.expect(reversed(first))
        assert asked == [(begin, end - begin)]
        asked.clear()
        monkeypatch.setattr("data_prep.images.shards.ADVISED", 5000)
        reader.expect(first)
        assert len(asked) == -(-(end - begin) // 5000) > 2
        assert max(size for _, size in asked) == 5000
        assert sum(asked[-1]) == end
        assert [sum(place) for place in asked[:-1]] == [place for place, _ in asked[1:]]
        asked.clear()
        monkeypatch.setattr("data_prep.images.shards.NEAR", 0)
        reader.expect([5, 3, 3, first[-1] + 1])
        assert asked == [places[3], places[5], places[first[-1] + 1]]
        asked.clear()
        reader.expect([])
        assert not asked


def test_few_tars_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A split has more tars than a process may open."""
    monkeypatch.setattr("data_prep.images.shards.OPEN_FILES", 1)
    manifest = small_image_set(tmp_path / "set")
    before = psutil.Process().num_fds()
    with contextlib.closing(SplitReader(tmp_path / "set", manifest, "train")) as reader:
        assert len(reader.paths) > 1
        for number in (0, 95, 1, 94):
            reader.expect([0, 95])
            assert zlib.crc32(reader.read(number)) == reader.index["crc32"][number]
            assert psutil.Process().num_fds() == before + 1
    assert psutil.Process().num_fds() == before


def test_webdataset_reads_them(tmp_path: Path) -> None:
    import webdataset

    small_image_set(tmp_path / "set", train=50)
    urls = sorted(str(path) for path in (tmp_path / "set").glob("train-*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [sample_key(n) for n in range(50)]
    for number, sample in enumerate(samples):
        assert sample["cls"] == number % 3
        if "png" in sample:
            assert np.array_equal(sample["png"], np.asarray(drawn(number % 3, number)))


def test_the_bytes_are_those_of_webdatasets_writer(tmp_path: Path) -> None:
    import webdataset

    images = [encoded(drawn(number % 3, number), "jpg") for number in range(5)]
    samples = [Sample(data, 7 * number, 32, 32, (0, 0)) for number, data in enumerate(images)]
    write_shard(tmp_path / "ours.tar", "train-000000.tar", samples, 0)
    with webdataset.TarWriter(
        str(tmp_path / "theirs.tar"), user="dnt", group="dnt", mode=0o444, mtime=0, encoder=False
    ) as writer:
        for number, sample in enumerate(samples):
            writer.write(
                {
                    "__key__": sample_key(number),
                    "jpg": sample.data,
                    "cls": str(sample.label).encode(),
                }
            )
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()
    each = [sample_bytes(len(sample.data)) for sample in samples]
    assert 0 < (tmp_path / "ours.tar").stat().st_size - sum(each) <= 10240


def test_statistics_are_those_of_numpy() -> None:
    images = [drawn(number % 3, number, 20) for number in range(7)]
    pixels = np.concatenate([np.asarray(image).reshape(-1, 3) for image in images])
    found = [measure(image) for image in images]
    totals = np.sum([[each.sums, each.squares] for each in found], 0).tolist()
    stats = PixelStats.of(len(pixels), *totals)
    assert np.allclose(stats.mean, pixels.mean(0) / 255, rtol=1e-12)
    assert np.allclose(stats.std, (pixels / 255).std(0), rtol=1e-9)
    assert len({each.hash for each in found}) == 7


def test_the_hash_is_of_pixels_and_shape() -> None:
    image = drawn(2, 5)
    again = Image.open(io.BytesIO(encoded(image, "png"))).convert("RGB")
    assert measure(image) == measure(again)
    flat = Image.new("RGB", (8, 2)), Image.new("RGB", (2, 8)), Image.new("RGB", (4, 4))
    assert len({measure(each).hash for each in flat}) == 3


def damage(path: Path, at: int, value: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(value)] = value
    path.write_bytes(raw)


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    out = tmp_path / "set"
    manifest = small_image_set(out)
    tar, index = out / "train-000001.tar", out / "train-000001.idx.npy"
    whole, whole_index = tar.read_bytes(), index.read_bytes()
    row = np.load(index)[3]
    at = int(row["offset"])
    for place, value, words in (
        (at + 40, b"\1\2\3\4", "00000043: its image is altered"),
        (at - LABEL_BEFORE, b"9", "00000043: its .cls is b'9', the index says 1"),
        (at - 512, b"x", "00000043: its tar header"),
        (len(whole) - 3, b"x", "SHA-256 is"),
    ):
        damage(tar, place, value)
        [problem] = verify(out)
        assert words in problem and "train-000001.tar" in problem
        tar.write_bytes(whole)
    reader = SplitReader(out, manifest, "train")
    damage(tar, at + 40, b"\1\2\3\4")
    with pytest.raises(ValueError, match=r"train-000001\.tar: image 00000043 is damaged"):
        reader.read(43)
    reader.close()
    tar.write_bytes(whole[:-9000])
    with pytest.raises(ValueError, match=r"train-000001\.tar: truncated"):
        load_manifest(out)
    assert "truncated" in verify(out)[0]
    tar.write_bytes(whole)
    damage(index, 200, b"\7")
    assert verify(out) == [f"{index}: altered (SHA-256 differs); copy or prepare the set again"]
    index.write_bytes(whole_index[:-1])
    with pytest.raises(ValueError, match=r"train-000001\.idx\.npy: truncated"):
        load_manifest(out)
    index.unlink()
    with pytest.raises(ValueError, match=r"train-000001\.idx\.npy: missing"):
        load_manifest(out)


def test_a_manifest_whose_numbers_differ_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "set"
    small_image_set(out)
    text = (out / "manifest.json").read_text()
    for key, words in (("classes", "images is 24, expected 25"), ("statistics", "statistics is")):
        value = json.loads(text)
        if key == "classes":
            value[key][0]["images"]["val"] += 1
        else:
            value[key]["mean"][0] += 1e-9
        (out / "manifest.json").write_text(json.dumps(value))
        with pytest.raises(ValueError, match=words):
            load_manifest(out)


def test_a_set_of_the_other_kind_is_refused_in_one_line(tmp_path: Path) -> None:
    small_image_set(tmp_path / "images")
    with pytest.raises(ValueError, match="made by `dnt data images`, give one made by `dnt data p"):
        text_shards.load_manifest(tmp_path / "images")
    small_set(tmp_path / "text", limit_bytes=100_000, val_fraction=0)
    with pytest.raises(ValueError, match="made by `dnt data prepare`, give one made by `dnt data"):
        load_manifest(tmp_path / "text")


def test_the_format_loads_without_pillow_and_torch() -> None:
    code = (
        "import sys, data_prep.images.shards; print('PIL' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert INDEX.itemsize == 44
