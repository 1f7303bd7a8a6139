"""Whatever cut the tensors, and on however many ranks: what is read is what was written, to the
last bit.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import load
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_saver import save

from dnt_scale import checkpoint
from dnt_scale.checkpoint import CheckpointError, Saver, read_tensors
from dnt_scale.checkpoint.storage import Storage
from dnt_scale.checkpoint.tensor_shards import (
    Region,
    TensorShard,
    first_gap_or_overlap,
    flat_shards,
    intersect,
    shard_to_write,
)
from dnt_scale.checkpoint.write import write_file
from dnt_scale.distributed import process_group
from dnt_scale.distributed.process_group import Ranks
from testbed.run import call, tensors
from tests.helpers.tensor_shards import (
    CUTS,
    copies,
    equal,
    flat,
    rows,
    save_made_up,
    some_state,
    some_tensors,
    zeros,
)


@pytest.fixture(scope="module")
def me() -> Iterator[Ranks]:
    with process_group.alone() as me:
        yield me


def write_as(folder: Path, whole: dict[str, Tensor], cut, number: int, me: Ranks) -> None:
    """What `number` ranks would write, one after the other."""
    for rank in range(number):
        saver = Saver(folder, replace(me, rank=rank), keep=1)
        for file in saver.stage(cut(whole, rank, number)):
            write_file(Storage(folder), file.name, file.chunks())


shapes = st.lists(st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1, max_size=4)
cuts = st.tuples(st.sampled_from(CUTS), st.integers(1, 5))


@settings(max_examples=80, deadline=None)
@given(shapes, st.booleans(), cuts, st.lists(cuts, min_size=1, max_size=3))
def test_any_cut_is_read_back_by_any_other(me, shapes, narrow, writers, readers):
    whole = {f"model.{n}": torch.randn(shape) for n, shape in enumerate(shapes)}
    whole["momentum_buffer.0"] = torch.randn(shapes[0]).to(
        torch.bfloat16 if narrow else torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        write_as(Path(folder), whole, *writers, me)
        for cut, number in readers:
            back = zeros(whole)
            for rank in range(number):
                read_tensors(folder, cut(back, rank, number), me)
            assert equal(back, whole)


def test_large_tensors_are_read_in_chunks(me, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.read, "CHUNK", 1000)
    whole = some_tensors(scale=9)
    write_as(tmp_path, whole, flat, 3, me)
    for cut in CUTS:
        back = zeros(whole)
        for rank in range(2):
            read_tensors(tmp_path, cut(back, rank, 2), me)
        assert equal(back, whole)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), st.data())
def test_flat_boxes_cover_their_run_and_no_more(shape, data):
    size = torch.Size(shape).numel()
    start = data.draw(st.integers(0, size))
    length = data.draw(st.integers(0, size - start))
    place = torch.arange(size).view(shape)
    shards = list(flat_shards("model.x", shape, start, torch.arange(start, start + length)))
    assert len(shards) <= {1: 1, 2: 3, 3: 5}[len(shape)]
    found = []
    for shard in shards:
        window = tuple(slice(a, a + n) for a, n in zip(*shard.region, strict=True))
        assert torch.equal(shard.data, place[window])
        found += shard.data.flatten().tolist()
    assert sorted(found) == list(range(start, start + length))


def test_replicas_share_out_what_is_large_and_write_nothing_twice():
    large, small, flat_row = torch.ones(1001, 64), torch.ones(8, 8), torch.ones(1, 100_000)
    for data in (large, small, flat_row, torch.ones(())):
        parts = [
            shard_to_write(TensorShard("model.x", tuple(data.shape), (0,) * data.dim(), data, r, 3))
            for r in range(3)
        ]
        there = [part.region for part in parts if part]
        assert first_gap_or_overlap(Region((0,) * data.dim(), tuple(data.shape)), there) is None
        assert len(there) == (3 if data is large else 1)
    assert shard_to_write(TensorShard("model.x", (4, 4), (4, 0), torch.ones(0, 4))) is None


@pytest.mark.parametrize(
    ("parts", "place"),
    [
        ([((0, 0), (2, 3)), ((2, 0), (2, 1)), ((2, 1), (2, 2))], None),
        ([((0, 0), (4, 1)), ((0, 1), (1, 2)), ((1, 1), (3, 2))], None),
        ([((0, 0), (2, 3)), ((3, 0), (1, 3))], (2, 0)),
        ([((0, 0), (4, 2)), ((0, 2), (3, 1))], (3, 2)),
        ([((0, 0), (3, 3)), ((2, 0), (2, 3))], (2, 0)),
        # as many elements as there should be, but one twice and one not at all
        ([((0, 0), (4, 2)), ((0, 1), (1, 2)), ((1, 2), (2, 1))], (0, 1)),
        ([], (0, 0)),
    ],
)
def test_holes_and_overlaps_are_found(parts, place):
    assert first_gap_or_overlap(Region((0, 0), (4, 3)), [Region(*part) for part in parts]) == place


def test_regions_meet_or_do_not():
    assert intersect(Region((0, 2), (3, 3)), Region((2, 0), (2, 3))) == Region((2, 2), (1, 1))
    assert intersect(Region((0, 0), (2, 2)), Region((2, 0), (2, 2))) is None
    assert intersect(Region((), ()), Region((), ())) == Region((), ())


def test_a_momentum_in_bf16_and_one_in_fp32_read_each_other(me, tmp_path):
    whole = some_tensors()
    write_as(tmp_path, whole, rows, 2, me)
    name = "momentum_buffer.emb.weight"
    wide = torch.zeros(50, 33)
    read_tensors(tmp_path, copies({name: wide}, 0, 1), me)
    assert torch.equal(wide, whole[name].float())
    narrow = torch.zeros(50, 33, dtype=torch.bfloat16)
    read_tensors(tmp_path, copies({"model.emb.weight": narrow}, 0, 1), me)
    assert torch.equal(narrow, whole["model.emb.weight"].bfloat16())


@pytest.mark.parametrize(("cut", "number"), [(rows, 3), (copies, 2), (flat, 3)])
def test_torch_reads_ours(me, tmp_path, cut, number):
    whole = some_tensors(scale=30)
    write_as(tmp_path, whole, cut, number, me)
    back = zeros(whole)
    load(back, storage_reader=HuggingFaceStorageReader(str(tmp_path)))
    assert equal(back, whole)
    assert equal(tensors(tmp_path), whole)
    for file in tmp_path.iterdir():
        with safe_open(file, "pt") as opened:
            assert set(opened.keys()) <= whole.keys()


def test_we_read_torchs_and_so_the_checkpoints_of_old(me, tmp_path):
    whole = some_tensors()
    save(dict(whole), storage_writer=HuggingFaceStorageWriter(str(tmp_path), save_distributed=True))
    back = zeros(whole)
    read_tensors(tmp_path, flat(back, 0, 1), me)
    assert equal(back, whole)


def test_a_checkpoint_of_old_has_its_counts_elsewhere():
    assert some_state(9, skipped=2, engine={}).scalars == {"step": 9, "updates": 7}
    assert some_state(9, engine={"step": 9, "updates": 5, "x": 1.5}).scalars == {
        "step": 9,
        "updates": 5,
        "x": 1.5,
    }


def test_what_does_not_fit_is_named(me, tmp_path):
    write_as(tmp_path, some_tensors(), rows, 2, me)
    with pytest.raises(CheckpointError, match=r"has no exp_avg\.norm\.gain"):
        read_tensors(tmp_path, copies({"exp_avg.norm.gain": torch.zeros(33)}, 0, 1), me)
    with pytest.raises(CheckpointError, match=r"norm\.gain has shape \(33,\), expected \(34,\)"):
        read_tensors(tmp_path, copies({"model.norm.gain": torch.zeros(34)}, 0, 1), me)
    sorted(tmp_path.iterdir())[0].unlink()
    with pytest.raises(
        CheckpointError, match=r"element \[0, 0\] of model\.emb\.weight is in 0 parts, expected 1"
    ):
        read_tensors(tmp_path, copies({"model.emb.weight": torch.zeros(50, 33)}, 0, 1), me)


def save_cut(folder: Path, cut, scale: int) -> None:
    me = process_group.start("cpu")
    saver = Saver(folder, me, keep=1, background=False)
    saver.save(some_state(1, me.world_size), cut(some_tensors(scale), me.rank, me.world_size))
    saver.close()
    process_group.stop()


def read_cut(path: Path, cut, scale: int, wrong_on: int | None) -> None:
    me = process_group.start("cpu")
    whole, back = some_tensors(scale), zeros(some_tensors(scale))
    shards = cut(back, me.rank, me.world_size)
    if me.rank == wrong_on:
        shards.append(TensorShard("model.other", (1,), (0,), torch.zeros(1)))
    try:
        checkpoint.check_files(path, checkpoint.read_state(path), me)
        read_tensors(path, shards, me)
        assert wrong_on is None
    except CheckpointError as error:
        assert wrong_on is not None
        print(error)
    expected = cut(whole, me.rank, me.world_size)
    assert (
        all(torch.equal(a.data, b.data) for a, b in zip(shards, expected, strict=False))
        or wrong_on is not None
    )
    dist.barrier()
    process_group.stop()


def test_real_ranks_read_what_other_ranks_wrote(tmp_path):
    call(save_cut, tmp_path / "three", flat, 60, ranks=3).ok()
    call(save_cut, tmp_path / "two", copies, 60, ranks=2).ok()
    three, two = tmp_path / "three" / "step-00000001", tmp_path / "two" / "step-00000001"
    assert equal(tensors(three), some_tensors(60))
    assert equal(tensors(two), some_tensors(60))
    sizes = [path.stat().st_size for path in sorted(two.glob("*.safetensors"))]
    assert len(sizes) == 2 and max(sizes) < 1.05 * min(sizes)
    call(read_cut, three, copies, 60, None, ranks=2).ok()
    call(read_cut, two, flat, 60, None, ranks=3).ok()


def test_a_fault_on_one_rank_is_every_ranks_fault(me, tmp_path):
    save_made_up(tmp_path, 1, me)
    done = call(read_cut, tmp_path / "step-00000001", rows, 1, 1, ranks=3).ok()
    lines = done.out.splitlines()
    assert len(lines) == 3 and len(set(lines)) == 1
    assert "rank 1" in lines[0] and "has no model.other" in lines[0]
