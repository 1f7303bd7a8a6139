"""kill -9 at any moment, any number of workers, tasks: the same bytes."""

import dataclasses
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from data_prep.images import chunks, inputs, read
from data_prep.images.options import ImageOptions
from data_prep.images.pipeline import prepare_images
from data_prep.images.shards import SplitReader, load_manifest
from data_prep.images.verify import verify
from testbed.corpus import contents
from testbed.images import class_folders, drawn, encoded, prepared, stored
from testbed.random_kills import NEVER, kill_at_random, run_until
from tests.helpers.kills import killed, watch

QUIET = Console(quiet=True)
SMALL = {"PIECE_BYTES": (read, 20_000), "UNIT_BYTES": (inputs, 60_000)}


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (module, value) in SMALL.items():
        monkeypatch.setattr(module, name, value)


def every_stage(folder: Path) -> ImageOptions:
    """Options of a run in which every stage has work: copies, findings, both splits, many tars."""
    source = class_folders(folder / "in", 90)
    for number in range(6):
        (source / "bar" / f"copy-{number}.png").write_bytes(encoded(drawn(0, 3 * number), "png"))
        (source / "disc" / f"half-{number}.png").write_bytes(encoded(drawn(2, 1), "png")[:500])
    return ImageOptions(
        inputs=[source],
        out=folder / "out",
        val_fraction=0.2,
        dedup="exact",
        shard_bytes=40_000,
        workers=1,
    )


def kill(options: ImageOptions, last: int) -> None:
    killed(prepare_images, options, SMALL, last, ["data_prep.images.pipeline", "PIL.Image"])


@pytest.mark.slow
def test_kill_9_at_any_moment_and_a_rerun_make_the_same_bytes(tmp_path: Path) -> None:
    options = every_stage(tmp_path)
    steps: list[str] = []
    stop = watch(options.out, steps.append)
    prepare_images(options, QUIET)
    stop()
    whole = contents(options.out)
    assert len(whole) > 20 and verify(options.out) == []
    draw = random.Random(0)
    reached = set()
    for number in sorted(draw.sample(range(1, len(steps)), 24)):
        shutil.rmtree(options.out)
        kill(options, number)
        left = {path.name[:5] for path in options.out.rglob("*") if path.is_file()}
        reached.add(frozenset(left))
        if not (options.out / "manifest.json").exists():
            with pytest.raises(ValueError, match=r"manifest|no such folder"):
                load_manifest(options.out)
            prepare_images(options, QUIET)
        else:
            with pytest.raises(ValueError, match="already holds a prepared set"):
                prepare_images(options, QUIET)
        assert contents(options.out) == whole, (
            f"kill before step {number}, {steps[number]}, which left {sorted(left)}"
        )
    assert len(reached) >= 5, "the kills did not reach different stages"


@pytest.mark.slow
def test_kill_9_at_random_moments_with_workers(tmp_path: Path) -> None:
    """Of the process, a worker and all of them; `benchmarks.image_kills` does it with many more."""
    source = class_folders(tmp_path / "in", 120)
    words = ["data", "images", str(source), "--shard-mb", "1", "--workers", "2"]
    ask = [sys.executable, "-m", "dnt_scale.cli", *words, "--out"]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    whole, killed = tmp_path / "whole" / "set", tmp_path / "killed" / "set"
    first = run_until([*ask, str(whole)], NEVER, "main", environment)
    assert first.status == 0
    expected = contents(whole)
    compared = []

    def finished() -> None:
        compared.append(contents(killed) == expected)
        shutil.rmtree(killed)

    kills = kill_at_random([*ask, str(killed)], killed, 3, first.seconds, 30, finished, environment)
    assert {kill.who for kill in kills} == {"main", "worker", "all"}
    assert compared and all(compared)


@pytest.mark.slow
def test_any_number_of_workers_and_tasks_make_the_same_bytes(tmp_path: Path) -> None:
    options = every_stage(tmp_path)
    prepare_images(options, QUIET)
    whole = contents(options.out)
    for workers in (2, 4):
        out = tmp_path / f"workers-{workers}" / "out"
        prepare_images(dataclasses.replace(options, out=out, workers=workers), QUIET)
        assert contents(out) == whole
    out = tmp_path / "tasks" / "out"
    for task in (2, 0, 1):
        part = dataclasses.replace(options, out=out, task=(task, 3))
        assert prepare_images(part, QUIET) is None
    prepare_images(dataclasses.replace(options, out=out), QUIET)
    assert contents(out) == whole


def test_what_was_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = every_stage(tmp_path)
    prepare_images(dataclasses.replace(options, task=(0, 2)), QUIET)
    done = set(options.out.rglob("*.npz"))
    made = []
    make = chunks.ImageChunkMaker.__call__
    monkeypatch.setattr(
        chunks.ImageChunkMaker,
        "__call__",
        lambda maker, item: made.append(item[2]) or make(maker, item),
    )
    prepare_images(options, QUIET)
    assert done and made and not done & set(made)


def test_append_keeps_what_was_there(tmp_path: Path) -> None:
    options = every_stage(tmp_path)
    prepare_images(options, QUIET)
    more = class_folders(tmp_path / "more", 12, seed=5)
    (more / "bar").rename(more / "zebra")
    (more / "disc" / "again.png").write_bytes(encoded(drawn(0, 0), "png"))
    base = load_manifest(options.out)
    manifest, _ = prepared([more], tmp_path / "both", append=options.out)
    assert verify(tmp_path / "both") == []
    assert manifest.class_names == ["bar", "cross", "disc", "zebra"]
    for name, split in base.splits.items():
        assert manifest.splits[name].shards[: len(split.shards)] == split.shards
    assert manifest.sources[:1] == base.sources
    assert (manifest.sources[1].images, manifest.sources[1].duplicates) == (12, 1)
    new = {path.read_bytes(): path.parent.name for path in more.glob("*/*")}
    del new[encoded(drawn(0, 0), "png")]
    both = {**stored(tmp_path / "both", manifest, "train")}
    both |= stored(tmp_path / "both", manifest, "val")
    assert {data: both[data] for data in new} == new
    reader = SplitReader(tmp_path / "both", manifest, "train")
    pixels = [int(row["width"]) * int(row["height"]) for row in reader.index]
    assert manifest.statistics.pixels == sum(pixels)
    reader.close()
    with pytest.raises(ValueError, match=r"seed: found 3, but .* was made with 0"):
        prepared([more], tmp_path / "no", append=options.out, seed=3)


def test_input_that_changes_is_told(tmp_path: Path) -> None:
    options = every_stage(tmp_path)
    path = tmp_path / "in" / "bar" / "00000.png"

    class Growing(Console):
        def print(self, *args: object, **settings: object) -> None:
            if "decode" in str(args[0]):
                path.write_bytes(encoded(drawn(1, 77), "png"))

    with pytest.raises(ValueError, match="the input changed while it was read"):
        prepare_images(options, Growing(quiet=True))
    prepare_images(options, QUIET)
    assert verify(options.out) == []
