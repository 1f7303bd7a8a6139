"""Damaged and hostile checkpoints are refused with a message that names the file."""

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dnt_scale.checkpoint import CheckpointError, check_files, newest, read_state, read_tensors
from dnt_scale.checkpoint.inspection import verify
from dnt_scale.checkpoint.safetensors_header import read_header
from dnt_scale.checkpoint.storage import Storage
from dnt_scale.distributed import process_group
from dnt_scale.distributed.process_group import Ranks
from tests.helpers.tensor_shards import copies, save_made_up, some_tensors, zeros

SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def me() -> Iterator[Ranks]:
    with process_group.alone() as me:
        yield me


@pytest.fixture
def step(me: Ranks, tmp_path: Path) -> Path:
    save_made_up(tmp_path, 1, me)
    save_made_up(tmp_path, 2, me)
    return tmp_path / "step-00000002"


def truncate(step: Path) -> str:
    os.truncate(step / SHARD, 5000)
    return f"{step / SHARD}: truncated or changed: 5000 bytes, expected"


def flip_a_bit(step: Path) -> str:
    data = bytearray((step / SHARD).read_bytes())
    data[-100] ^= 1
    (step / SHARD).write_bytes(data)
    return f"{step / SHARD}: damaged: its sha256 is not the recorded one"


def remove(step: Path) -> str:
    (step / SHARD).unlink()
    return f"{step / SHARD}: missing"


def add_a_shard(step: Path) -> str:
    shutil.copyfile(step / SHARD, step / SHARD.replace("shard-00001", "shard-00009"))
    return f"{step / SHARD.replace('shard-00001', 'shard-00009')}: not part of this checkpoint"


def truncate_state(step: Path) -> str:
    os.truncate(step / "state.json", 200)
    return f"{step}/state.json: damaged (JSON: "


def change_state(step: Path, **changes: object) -> None:
    state = json.loads((step / "state.json").read_text())
    (step / "state.json").write_text(json.dumps({**state, **changes}))


def name_a_file_elsewhere(step: Path) -> str:
    change_state(step, files={"../../secret.safetensors": {"bytes": 1, "sha256": ""}})
    return f"{step}/state.json: names a file outside its folder"


def name_another_kind_of_file(step: Path) -> str:
    change_state(step, files={"model.pt": {"bytes": 1, "sha256": ""}})
    return f"{step}/state.json: names a file outside its folder, or none of a checkpoint's"


def other_version(step: Path) -> str:
    change_state(step, version=2)
    return f"{step}/state.json: is dnt-checkpoint version 2, expected dnt-checkpoint version 1"


def a_field_of_another_type(step: Path) -> str:
    change_state(step, tokens="many")
    return f"{step}/state.json: damaged (tokens: "


def nest_deeply(step: Path) -> str:
    (step / "state.json").write_text("[" * 200_000)
    return f"{step}/state.json: damaged (JSON: "


DAMAGES = [
    truncate,
    flip_a_bit,
    remove,
    add_a_shard,
    truncate_state,
    name_a_file_elsewhere,
    name_another_kind_of_file,
    other_version,
    a_field_of_another_type,
    nest_deeply,
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("at_url", [False, True])
def test_a_damaged_checkpoint_is_named_and_refused(me, step, damage, at_url):
    message = damage(step)
    path = f"file://{step}" if at_url else step
    with pytest.raises(CheckpointError) as caught:
        check_files(path, read_state(path), me)
    assert str(caught.value).removeprefix("file://").startswith(message)
    assert f"remove {path} to go on from an older checkpoint" in str(caught.value)
    before, (problem,) = verify(str(step.parent)).values()
    assert before == [] and problem.startswith(message)


def test_verify_names_every_file(me, step):
    flip_a_bit(step)
    flip_a_bit(step.parent / "step-00000001")
    add_a_shard(step)
    found = verify(str(step.parent))
    assert [len(problems) for problems in found.values()] == [1, 2]


def test_a_folder_without_state_json_is_no_checkpoint(me, step):
    (step / "state.json").unlink()
    (step.parent / "step-99").mkdir()
    (step.parent / "step-99" / "state.json").touch()
    assert newest(step.parent) == step.parent / "step-00000001"
    with pytest.raises(
        CheckpointError, match=r"state\.json: no such file; expected a checkpoint folder"
    ):
        read_state(step)


def with_head(step: Path, text: bytes, length: int | None = None) -> None:
    """Put another head before the tensors."""
    data = (step / SHARD).read_bytes()
    (before,) = struct.unpack("<Q", data[:8])
    found = struct.pack("<Q", len(text) if length is None else length)
    (step / SHARD).write_bytes(found + text + data[8 + before :])


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}


@pytest.mark.parametrize(
    ("text", "length"),
    [
        (b"", None),
        (b"{}", 1 << 62),
        (b"{}", 99_999_999),
        (b"\xff\xfe", None),
        (b"[1, 2]", None),
        (b"[" * 100_000, None),
        (json.dumps({"x": {"a": "b"}}).encode(), None),
        (json.dumps({"x": entry(dtype="F31")}).encode(), None),
        (json.dumps({"x": entry(dtype="I128")}).encode(), None),
        (json.dumps({"x": entry(shape=[-4])}).encode(), None),
        (json.dumps({"x": entry(shape=[1 << 80])}).encode(), None),
        (json.dumps({"x": entry(shape=[5])}).encode(), None),
        (json.dumps({"x": entry(data_offsets=[16, 0])}).encode(), None),
        (json.dumps({"x": entry(data_offsets=[1 << 40, (1 << 40) + 16])}).encode(), None),
        (json.dumps({"x": entry(more=1)}).encode(), None),
        (json.dumps({"__metadata__": {"DCP_SHARDING_INFO": "{"}, "x": entry()}).encode(), None),
        (
            json.dumps(
                {
                    "__metadata__": {"DCP_SHARDING_INFO": '{"x": {"saved_offsets": [1, 2]}}'},
                    "x": entry(),
                }
            ).encode(),
            None,
        ),
        (
            json.dumps(
                {
                    "__metadata__": {"DCP_SHARDING_INFO": '{"x": {"saved_offsets": [-1]}}'},
                    "x": entry(),
                }
            ).encode(),
            None,
        ),
    ],
)
def test_a_head_that_lies_is_refused(me, step, text, length):
    with_head(step, text, length)
    with pytest.raises(CheckpointError, match=r"shard-00001.*: not readable as safetensors: "):
        read_header(Storage(step), SHARD)
    with pytest.raises(CheckpointError, match=r"not readable as safetensors"):
        read_tensors(step, copies(zeros(some_tensors()), 0, 1), me)


def test_parts_that_differ_in_dimensions_are_refused(me, step):
    shutil.copyfile(step / SHARD, step / SHARD.replace("shard-00001", "shard-00009"))
    with_head(step, json.dumps({"model.emb.weight": entry()}).encode())
    with pytest.raises(
        CheckpointError,
        match=r"the parts of model\.emb\.weight differ in their number of dimensions",
    ):
        read_tensors(step, copies({"model.emb.weight": torch.zeros(50, 33)}, 0, 1), me)


def test_twice_the_same_part_is_refused(me, step):
    add_a_shard(step)
    with pytest.raises(
        CheckpointError, match=r"element \[0, 0\] of model\.emb\.weight is in 2 parts, expected 1"
    ):
        read_tensors(step, copies({"model.emb.weight": torch.zeros(50, 33)}, 0, 1), me)


def test_a_file_that_ends_early_is_refused(me, step):
    """Truncated after its head was read: between the check of its files and the reading of its
    tensors.
    """
    parts = read_header(Storage(step), SHARD)
    from dnt_scale.checkpoint.read import by_name, fill_shards

    os.truncate(step / SHARD, parts[0].begin + 50)
    with pytest.raises(
        CheckpointError, match=r"shard-00001.*: truncated: model\.emb\.weight is not whole"
    ):
        fill_shards(
            Storage(step), by_name(parts), copies({"model.emb.weight": torch.zeros(50, 33)}, 0, 1)
        )
