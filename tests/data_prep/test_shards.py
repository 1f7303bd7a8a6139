import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from data_prep.shards import (
    BLOCK_ROWS,
    Manifest,
    iter_documents,
    load_manifest,
    manifest_sha256,
    read_block,
)
from data_prep.tokenizer import Tokenizer
from data_prep.verify import verify
from testbed.corpus import python_source_files, small_set


def all_rows(folder: Path, manifest: Manifest, split: str) -> np.ndarray:
    blocks = sum(len(shard.members) for shard in manifest.splits[split].shards)
    return np.concatenate([read_block(folder, manifest, split, block) for block in range(blocks)])


def test_plain_webdataset_reads_every_row(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    assert len(manifest.splits["train"].shards) > 2
    for name, split in manifest.splits.items():
        urls = [str(prepared / shard.file) for shard in split.shards]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        theirs = np.concatenate([sample["tokens.npy"] for sample in samples])
        assert theirs.dtype == np.uint16
        assert theirs.shape == (split.rows, manifest.seq_len + 1)
        assert (theirs == all_rows(prepared, manifest, name)).all()


def test_a_row_is_where_the_manifest_says(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    for split in manifest.splits.values():
        for shard in split.shards:
            raw = (prepared / shard.file).read_bytes()
            with tarfile.open(prepared / shard.file) as tar:
                assert [info.name for info in tar] == [member.name for member in shard.members]
                for info, member in zip(tar, shard.members, strict=True):
                    assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (
                        0,
                        0,
                        0,
                        "dnt",
                        "dnt",
                    )
                    array = np.load(io.BytesIO(tar.extractfile(info).read()))
                    assert array.shape == (member.rows, manifest.seq_len + 1)
                    for row in (0, member.rows - 1):
                        start = member.offset + row * manifest.row_bytes
                        assert raw[start : start + manifest.row_bytes] == array[row].tobytes()


def test_every_token_is_predicted_exactly_once(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    for name, split in manifest.splits.items():
        rows = all_rows(prepared, manifest, name)
        assert (rows[1:, 0] == rows[:-1, -1]).all()
        targets = [*rows[:, 1:].ravel().tolist(), *split.tail[1:]]
        expected = [i for ids in iter_documents(prepared, name) for i in (*ids, manifest.eos_id)]
        assert targets == expected
        assert rows[0, 0] == manifest.eos_id
        assert len(targets) == split.tokens
        assert sum(shard.tokens for shard in split.shards) == split.rows * manifest.seq_len


def test_documents_come_back_as_they_went_in(prepared: Path) -> None:
    tokenizer = Tokenizer.load(prepared / "tokenizer.model")
    texts = {
        path.read_bytes().decode("utf-8", "replace") for path in python_source_files(1_000_000)
    } - {""}
    back = [
        tokenizer.decode(ids)
        for split in ("train", "val")
        for ids in iter_documents(prepared, split)
    ]
    assert set(back) == texts
    manifest = load_manifest(prepared)
    assert len(back) == sum(split.documents for split in manifest.splits.values())
    assert sum(len(text.encode()) for text in back) == sum(
        split.text_bytes for split in manifest.splits.values()
    )


def test_a_whole_set_has_no_problems(prepared: Path) -> None:
    read: list[int] = []
    assert verify(prepared, read.append) == []
    assert sum(read) == sum(path.stat().st_size for path in prepared.glob("*.tar"))


def member_at(manifest: Manifest, file: str, position: int) -> str | None:
    """The member in whose rows a byte of a tar lies."""
    for split in manifest.splits.values():
        for shard in split.shards:
            for member in shard.members:
                inside = 0 <= position - member.offset < member.rows * manifest.row_bytes
                if shard.file == file and inside:
                    return member.name
    return None


@pytest.mark.parametrize("seed", range(25))
def test_a_flipped_bit_is_named(copy: Path, seed: int) -> None:
    draw = random.Random(seed)
    path = draw.choice(sorted(copy.glob("*.tar")))
    raw = bytearray(path.read_bytes())
    # Half of them in the headers, where a random place would hardly ever fall.
    position = draw.randrange(len(raw)) if seed % 2 else draw.randrange(640)
    raw[position] ^= 1 << draw.randrange(8)
    path.chmod(0o644)
    path.write_bytes(raw)
    problems = verify(copy)
    assert problems
    assert all(problem.startswith(str(path)) for problem in problems)
    manifest = load_manifest(copy)
    if member := member_at(manifest, path.name, position):
        assert f"{path}: {member}: " in problems[0]
        name, block = path.name.split("-")[0], int(member.split(".")[0])
        with pytest.raises(ValueError, match=f"{path.name}: {member} is damaged"):
            read_block(copy, manifest, name, block)
        with pytest.raises(ValueError, match=f"{path.name}: {member} is damaged"):
            list(iter_documents(copy, name))


def cut_places(prepared: Path) -> list[int]:
    shard = load_manifest(prepared).splits["train"].shards[0]
    boundary = shard.members[1].offset - 640
    return [
        0,
        1,
        100,
        512,
        boundary - 1,
        boundary,
        boundary + 100,
        boundary + 512,
        shard.bytes - 10240,
        shard.bytes - 1,
    ]


@pytest.mark.parametrize("place", range(10))
def test_a_truncated_shard_is_named(copy: Path, place: int) -> None:
    path = copy / "train-000000.tar"
    size = cut_places(copy)[place]
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path}: truncated, {size} bytes where the manifest says" in verify(copy)[0]
    with pytest.raises(ValueError, match=r"train-000000\.tar: truncated"):
        load_manifest(copy)


def test_missing_longer_and_swapped_files_are_named(copy: Path) -> None:
    first, second = copy / "train-000000.tar", copy / "train-000001.tar"
    spare = first.rename(copy / "spare")
    assert verify(copy)[0].startswith(f"{first}: missing")
    with pytest.raises(ValueError, match="missing"):
        load_manifest(copy)
    shutil.copy(second, first)
    assert any(problem.startswith(str(first)) for problem in verify(copy))
    first.write_bytes(spare.read_bytes() + b"\0" * 512)
    assert f"{first}: altered" in verify(copy)[0]
    shutil.copy(spare, first)
    assert verify(copy) == []
    model = copy / "tokenizer.model"
    model.write_bytes(model.read_bytes() + b"\0")
    assert verify(copy)[0].startswith(f"{model}: SHA-256")
    model.unlink()
    assert verify(copy) == [f"{model}: missing"]
    with pytest.raises(ValueError, match=r"tokenizer\.model: missing"):
        load_manifest(copy)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_manifest_is_named(copy: Path, keep: float) -> None:
    path = copy / "manifest.json"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(ValueError, match=r"manifest\.json: truncated or damaged"):
        load_manifest(copy)
    assert len(verify(copy)) == 1


Edit = Callable[[dict[str, Any]], object]


def shard(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["splits"]["train"]["shards"][1]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda m: m.update(format="other"),
            "found format 'other' version 1, expected 'dnt-shards' version 1",
        ),
        (lambda m: m.update(version=2), "version 2"),
        (lambda m: m.pop("dtype"), "dtype: Field required"),
        (lambda m: m.update(dtype="uint32"), "dtype is uint32, expected uint16"),
        (lambda m: m.update(surprise=1), "surprise: Extra inputs"),
        (lambda m: m.update(seq_len="64"), "seq_len: "),
        (lambda m: m.update(eos_id=512), "eos_id is 512"),
        (lambda m: m["splits"].pop("train"), 'no "train"'),
        (lambda m: m["splits"].update(test=m["splits"]["val"]), "splits.test"),
        (lambda m: shard(m).update(file="../train-000001.tar"), "splits.train.shards.1.file: "),
        (lambda m: shard(m).update(file="/tmp/train-000001.tar"), "splits.train.shards.1.file: "),
        (lambda m: shard(m).update(file="train-000001.tar\n"), "splits.train.shards.1.file: "),
        (
            lambda m: shard(m).update(file="train-000002.tar"),
            "splits.train.shards.1.file is train-000002.tar",
        ),
        (lambda m: shard(m).update(rows=7), "splits.train.shards.1.rows is 7"),
        (lambda m: shard(m).update(tokens=7), "splits.train.shards.1.tokens is 7"),
        (lambda m: shard(m)["members"][0].update(offset=10), "splits.train.shards.1: "),
        (lambda m: shard(m)["members"][0].update(offset=10**9), "splits.train.shards.1: "),
        (lambda m: shard(m)["members"][0].update(name="../x.tokens.npy"), "members.0.name"),
        (lambda m: m["splits"]["train"].update(rows=7), "splits.train.rows is 7"),
        (lambda m: m["splits"]["train"].update(tokens=7), "splits.train.tokens is 7"),
        (lambda m: m["splits"]["train"].update(tail=[]), "splits.train"),
        (lambda m: m["splits"]["train"]["tail"].append(600), "splits.train"),
        (lambda m: m["splits"]["val"].update(documents=10**6), "documents in splits"),
        (lambda m: m["sources"][0].update(text_bytes=1), "text_bytes in splits"),
        (lambda m: m["tokenizer"].update(file="../tokenizer.model"), "tokenizer.file"),
        (lambda m: m["tokenizer"].update(sha256="x"), "tokenizer.sha256"),
    ],
)
def test_an_altered_manifest_is_refused(copy: Path, edit: Edit, said: str) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="; ") as caught:
        load_manifest(copy)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert verify(copy) == [str(caught.value)]


def test_numbers_that_only_the_rows_can_prove(copy: Path) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["documents"] += 1
    manifest["sources"][0]["documents"] += 1
    manifest["splits"]["val"]["tail"][0] = 7
    path.write_text(json.dumps(manifest))
    problems = verify(copy)
    assert "splits.train.documents is" in problems[0]
    assert "splits.val.tail does not go on from the last row" in problems[1]


def test_a_folder_without_a_set(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="nowhere: no such folder; expected one made by `dnt data prepare`"
    ):
        load_manifest(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"manifest\.json: no manifest here"):
        load_manifest(tmp_path)
    with pytest.raises(ValueError, match="no manifest"):
        manifest_sha256(tmp_path)
    assert len(verify(tmp_path / "nowhere")) == 1
    for content in ("[]", "null", '"x"', "{}"):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match="expected 'dnt-shards' version 1"):
            load_manifest(tmp_path)


def test_splits_and_blocks_that_are_not_there(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    with pytest.raises(ValueError, match="split: found 'test', expected one of train, val"):
        next(iter_documents(prepared, "test"))
    for block in (-1, 10**6):
        with pytest.raises(IndexError):
            read_block(prepared, manifest, "train", block)


def test_readers_do_not_import_torch() -> None:
    code = (
        "import sys, data_prep.pipeline; sys.exit('torch' in sys.modules or 'webdataset' in "
        "sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "name", ["../../evil.npy", "/etc/evil.npy", "000000.tokens.npy\n", "a/../../b.tokens.npy"]
)
def test_a_tar_with_other_names_inside_is_named_and_writes_nowhere(copy: Path, name: str) -> None:
    manifest = load_manifest(copy)
    path = copy / "train-000000.tar"
    raw = bytearray(path.read_bytes())
    header = tarfile.TarInfo.frombuf(raw[:512], "utf-8", "surrogateescape")
    header.name = name
    raw[:512] = header.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(raw)
    before = sorted(copy.parent.rglob("*"))
    assert verify(copy) == [
        f"{path}: 000000.tokens.npy: its tar header tells of {name!r}, {header.size} bytes"
    ]
    assert (
        len(read_block(copy, manifest, "train", 0)) == BLOCK_ROWS
    )  # by its offset; the tar's names play no part
    assert sorted(copy.parent.rglob("*")) == before


def test_best_fit_rows_are_verified(tmp_path: Path) -> None:
    manifest = small_set(tmp_path / "set", packing="best_fit", dedup="exact")
    assert verify(tmp_path / "set") == []
    split = manifest.splits["train"]
    pieces = list(iter_documents(tmp_path / "set", "train"))
    tokens = sum(map(len, pieces)) + sum(len(piece) < manifest.seq_len for piece in pieces)
    assert tokens == split.tokens < split.rows * manifest.seq_len
    rows = all_rows(tmp_path / "set", manifest, "train")
    assert (rows[:, 0] == manifest.eos_id).all()
    path = tmp_path / "set" / "manifest.json"
    altered = json.loads(path.read_text())
    altered["splits"]["train"]["tokens"] -= 1
    path.write_text(json.dumps(altered))
    assert verify(tmp_path / "set") == [
        f"manifest.json: splits.train.tokens is {tokens - 1}, the rows hold {tokens}"
    ]
    (tmp_path / "set" / "fingerprints.npy").write_bytes(b"other")
    assert verify(tmp_path / "set")[0].startswith(
        f"{tmp_path / 'set' / 'fingerprints.npy'}: SHA-256 is"
    )
