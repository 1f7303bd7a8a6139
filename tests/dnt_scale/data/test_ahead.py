"""Images on their way from the disk: the ones that rows need, in their order, and not too many."""

import os
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.images.shards import SplitReader, load_manifest
from dnt_scale.data import ahead
from dnt_scale.data.ahead import Ahead, Piece, training_pieces, validation_pieces
from dnt_scale.data.image_reader import ImageReader, Job, number_at
from testbed.images import small_image_set
from testbed.waiting import until
from tests.helpers.image_sources import TRAIN, source


@pytest.fixture
def expected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The samples that the system is told of, as they come."""
    found: list[int] = []
    monkeypatch.setattr(SplitReader, "expect", lambda _, numbers: found.extend(map(int, numbers)))
    return found


def started(folder: Path, pieces: Iterator[Piece]) -> Ahead:
    return Ahead(folder, load_manifest(folder), "train", pieces)


@pytest.mark.parametrize("recipe", ["simple", "deit"])  # deit mixes pairs
@pytest.mark.parametrize(
    ("first", "count", "global_batch"),
    [(0, 12, 12), (8, 4, 12), (3, 5, 10), (7, 40, 80), (1, 1, 3)],
)
def test_pieces_are_what_rows_read(
    image_set: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    first: int,
    count: int,
    global_batch: int,
) -> None:
    reading = source(image_set, recipe).reading(7)
    read: list[int] = []
    read_one = SplitReader.read

    def read_and_note(self: SplitReader, number: int) -> bytes:
        read.append(number)
        return read_one(self, number)

    monkeypatch.setattr(SplitReader, "read", read_and_note)
    pieces = training_pieces(reading, TRAIN, first, count, global_batch)
    used, asked = 0, set[int]()
    with closing(ImageReader(reading)) as reader:
        for batch in range(5):
            at = first + batch * global_batch
            needed = {
                number_at(reader.order, each)
                for position in range(at, at + count)
                for each in ([position, position ^ 1] if recipe == "deit" else [position])
            }
            of_batch = set[int]()
            while used < (batch + 1) * count:
                piece = next(pieces)
                assert used <= piece.rows <= (batch + 1) * count
                assert 0 < len(piece.numbers) <= ahead.PIECE_IMAGES
                of_batch |= set(np.asarray(piece.numbers).tolist())
                used = piece.rows
                # all rows up to here have theirs
                read.clear()
                reader.read(Job("train", tuple(range(at, at + used - batch * count))))
                assert set(read) <= of_batch
            assert of_batch == needed
            asked |= of_batch
    assert asked <= set(range(TRAIN))


def test_pieces_of_validation_are_its_samples() -> None:
    pieces = list(validation_pieces(range(3, 40)))
    assert [number for piece in pieces for number in piece.numbers] == list(range(3, 40))
    assert [piece.rows for piece in pieces] == [16, 32, 37]


def test_no_more_is_on_its_way_than_is_allowed(
    image_set: Path, monkeypatch: pytest.MonkeyPatch, expected: list[int]
) -> None:
    monkeypatch.setattr(ahead, "NEAR", 0)
    with closing(SplitReader(image_set, load_manifest(image_set), "train")) as reader:
        sizes = reader.index["size"].astype(int)
    order = np.random.default_rng(0).permutation(TRAIN)
    most = int(sizes.max()) * 20
    monkeypatch.setattr(ahead, "AHEAD_BYTES", most)
    ends = range(5, TRAIN + 1, 5)
    with closing(started(image_set, (Piece(order[end - 5 : end], end) for end in ends))) as found:
        for used in range(0, TRAIN, 5):
            fits = [end for end in ends if sizes[order[used:end]].sum() <= most][-1]
            assert fits >= min(used + 20, TRAIN)
            until(lambda fits=fits: len(expected) >= fits)
            assert expected == order[:fits].tolist()
            found.use(5)
        until(lambda: not found.thread.is_alive())


def test_an_image_above_what_is_allowed_is_asked_for_by_itself(
    image_set: Path, monkeypatch: pytest.MonkeyPatch, expected: list[int]
) -> None:
    monkeypatch.setattr(ahead, "AHEAD_BYTES", 1)
    with closing(started(image_set, (Piece([each], each + 1) for each in range(9)))) as found:
        for number in range(9):
            until(lambda number=number: len(expected) > number)
            assert expected == list(range(number + 1))
            found.use(1)


def test_it_ends_while_it_waits(image_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "AHEAD_BYTES", 1)
    reading = source(image_set, "simple").reading(7)
    found = started(image_set, training_pieces(reading, TRAIN, 0, 4, 4))
    found.close()
    assert not found.thread.is_alive()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_rank_tells_of_its_rows_and_of_validation(
    image_set: Path, expected: list[int], workers: int
) -> None:
    found = source(image_set, "simple", workers=workers)
    with found.stream(seed=7, global_batch=12, rank=1, world_size=2, consumed_rows=24) as stream:
        next(stream)
        until(lambda: len(expected) >= 3 * TRAIN)
        order = stream.read.decoders.reading
        numbers = [
            int(number)
            for piece in islice(training_pieces(order, TRAIN, 24 + 6, 6, 12), 50)
            for number in piece.numbers
        ]
        assert expected[: len(numbers)] == numbers
    expected.clear()
    batches = found.validation(rows=None, micro_batch=5, rank=1, world_size=2)[""]
    labels = [next(batches)["label"]]
    until(lambda: len(expected) >= 10)
    labels += [batch["label"] for batch in batches]
    assert sum(int((each >= 0).sum()) for each in labels) == len(expected)
    assert expected == [*range(5, 10), *range(15, 20)]


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_do_not_depend_on_it(
    image_set: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def rows() -> list[torch.Tensor]:
        found = source(image_set, "deit", workers=workers)
        with found.stream(seed=7, global_batch=12, rank=0, world_size=1) as stream:
            return [next(stream)[0]["image"] for _ in range(10)]

    mine = rows()
    monkeypatch.delattr(os, "posix_fadvise")
    assert all(torch.equal(one, other) for one, other in zip(mine, rows(), strict=True))


def test_damage_is_left_to_who_reads(image_set: Path, tmp_path: Path) -> None:
    """Of an index that is gone, and of tars."""
    out = tmp_path / "set"
    small_image_set(out, train=40, val=4)
    manifest = load_manifest(out)
    for gone in (out.glob("train-*.tar"), out.glob("train-*.npy")):
        for path in gone:
            path.unlink()
        found = Ahead(out, manifest, "train", validation_pieces(range(40)))
        until(lambda found=found: not found.thread.is_alive())
        found.close()
