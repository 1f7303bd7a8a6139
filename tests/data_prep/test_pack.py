import io
import itertools
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.pack import (
    Layout,
    StreamSlice,
    best_fit,
    predicted_tokens,
    shard_jobs,
    shard_writer,
    slice_size,
    tail,
)
from data_prep.shards import BLOCK_ROWS, Shard, blocks_per_shard, write_shard

EOS = 1
DOCUMENT = st.lists(st.integers(2, 9), min_size=1, max_size=30)


def write_chunk(path: Path, documents: list[list[int]], held: list[bool]) -> None:
    ids = {
        side: [
            i
            for document, val in zip(documents, held, strict=True)
            if val == side
            for i in (*document, EOS)
        ]
        for side in (False, True)
    }
    np.savez(
        path,
        train_ids=np.array(ids[False], np.uint16),
        val_ids=np.array(ids[True], np.uint16),
        lengths=np.array([len(document) + 1 for document in documents], np.uint32),
        held=np.array(held, bool),
    )


def rows_of(folder: Path, shards: list[Shard]) -> np.ndarray:
    arrays = []
    for shard in shards:
        with tarfile.open(folder / shard.file) as tar:
            arrays += [np.load(io.BytesIO(tar.extractfile(info).read())) for info in tar]
    assert [len(array) for array in arrays[:-1]] == [BLOCK_ROWS] * (len(arrays) - 1)
    return np.concatenate(arrays)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(st.tuples(DOCUMENT, st.booleans(), st.booleans()), max_size=12),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 6),
    st.integers(1, 30_000),
    st.sampled_from(["concat", "best_fit"]),
    st.booleans(),
)
def test_packing_loses_and_invents_nothing(
    tmp_path_factory: pytest.TempPathFactory, chunks, seq_len, shard_bytes, packing, drop
) -> None:
    folder = tmp_path_factory.mktemp("pack")
    every = [entry for chunk in chunks for entry in chunk]
    keep = folder / "keep.npy"
    np.save(keep, np.array([stays for *_, stays in every], bool))
    layout = Layout(packing, seq_len, EOS, "uint16", shard_bytes, keep if drop else None)
    wanted = [document for document, held, stays in every if not held and (stays or not drop)]

    lead = np.array([EOS] if packing == "concat" else [], np.uint16)
    np.save(folder / "lead.npy", lead)
    parts, first = [StreamSlice(folder / "lead.npy", 0, len(lead))], 0
    for number, chunk in enumerate(chunks):
        write_chunk(
            folder / f"{number}.npz",
            [document for document, *_ in chunk],
            [held for _, held, _ in chunk],
        )
        lengths = [
            len(document) + 1 for document, held, stays in chunk if not held and (stays or not drop)
        ]
        parts.append(
            StreamSlice(
                folder / f"{number}.npz", first, slice_size(layout, np.array(lengths, np.uint32))
            )
        )
        first += len(chunk)

    jobs = shard_jobs(layout, folder, "train", parts, 0, 0)
    shards = [shard_writer(layout)(job) for job in reversed(jobs)][::-1]
    assert [shard.file for shard in shards] == [
        f"train-{number:06}.tar" for number in range(len(jobs))
    ]
    stream = [EOS, *(i for document in wanted for i in (*document, EOS))]
    total = predicted_tokens(
        layout, np.array([len(document) + 1 for document in wanted], np.uint32)
    )
    if packing == "concat":
        rows = (len(stream) - 1) // seq_len
        assert sum(shard.rows for shard in shards) == rows
        assert tail(layout, "train", parts).tolist() == stream[rows * seq_len :]
        assert total == len(stream) - 1
        if rows:
            assert rows_of(folder, shards).tolist() == [
                stream[row * seq_len : (row + 1) * seq_len + 1] for row in range(rows)
            ]
    elif wanted:
        rows = rows_of(folder, shards)
        assert (rows[:, 0] == EOS).all()
        padding = (rows[:, 1:] == EOS) & (rows[:, :-1] == EOS)
        assert int((~padding).sum()) == total
        pieces = []
        for row in rows.tolist():
            inside = [[]]
            for token in row[1:]:
                inside[-1].append(token)
                if token == EOS:
                    inside.append([])
            pieces += [piece for piece in inside if piece not in ([], [EOS])]
        expected = []
        for document in wanted:
            ended = [*document, EOS]
            expected += [ended[at : at + seq_len] for at in range(0, len(ended), seq_len)]
        assert sorted(pieces) == sorted(piece for piece in expected if piece != [EOS])
    else:
        assert not jobs
    shutil.rmtree(folder)


@settings(max_examples=200)
@given(st.lists(st.integers(2, 200), max_size=80), st.integers(1, 64))
def test_best_fit_fills_rows_and_uses_few(lengths: list[int], seq_len: int) -> None:
    rows = best_fit(np.array(lengths, np.uint32), seq_len)
    taken = sorted(piece for row in rows for piece in row)
    assert all(sum(stop - start for start, stop in row) <= seq_len for row in rows)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(taken))
    dropped = sum((length - 1) % seq_len == 0 for length in lengths)
    used = sum(stop - start for start, stop in taken)
    assert used == sum(lengths) - dropped
    # Any two rows of a greedy fit could not have been one.
    fill = sorted(sum(stop - start for start, stop in row) for row in rows)
    assert len(fill) < 2 or fill[0] + fill[1] > seq_len


def test_best_fit_is_the_textbook_one() -> None:
    assert best_fit(np.array([4, 8, 1 + 5, 4, 2]), 10) == [
        [(4, 12), (22, 24)],
        [(12, 18), (0, 4)],
        [(18, 22)],
    ]


def test_a_shard_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    write_chunk(tmp_path / "0.npz", [[5] * 50], [False])
    np.save(tmp_path / "lead.npy", np.array([EOS], np.uint16))
    layout = Layout("concat", 4, EOS, "uint16", 1 << 20, None)
    parts = [StreamSlice(tmp_path / "lead.npy", 0, 1), StreamSlice(tmp_path / "0.npz", 0, 51)]
    [job] = shard_jobs(layout, tmp_path, "train", parts, 0, 0)
    first = shard_writer(layout)(job)
    written = job.path.stat().st_mtime_ns
    assert shard_writer(layout)(job) == first
    assert job.path.stat().st_mtime_ns == written
    job.path.write_bytes(job.path.read_bytes()[:100])  # cut short, as a power cut may leave it
    whole = shard_writer(layout)(job)
    assert whole == first
    assert job.path.stat().st_size == first.bytes


def test_a_tar_is_what_webdataset_writes(tmp_path: Path) -> None:
    blocks = [np.arange(3 * 5, dtype=np.uint16).reshape(3, 5), np.ones((2, 5), np.uint16)]
    shard = write_shard(tmp_path / "ours.tar", "train-000000.tar", blocks, 7)
    settings = {"user": "dnt", "group": "dnt", "mode": 0o444, "mtime": 0, "compress": False}
    with webdataset.TarWriter(str(tmp_path / "theirs.tar"), **settings) as tar:
        for number, block in enumerate(blocks, 7):
            tar.write({"__key__": f"{number:06}", "tokens.npy": block})
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()
    assert (shard.rows, shard.tokens, shard.bytes) == (
        5,
        20,
        (tmp_path / "theirs.tar").stat().st_size,
    )
    with pytest.raises(FileExistsError):
        write_shard(tmp_path / "ours.tar", "train-000000.tar", blocks, 7)


@given(st.integers(2, 4000), st.integers(1, 1 << 22))
def test_shards_keep_to_their_size(row_tokens: int, shard_bytes: int) -> None:
    row_bytes = 2 * row_tokens
    blocks = blocks_per_shard(row_bytes, shard_bytes)
    member = 512 + -(-(128 + BLOCK_ROWS * row_bytes) // 512) * 512
    assert blocks == 1 or blocks * member <= shard_bytes
    assert (blocks + 1) * member + 512 > shard_bytes
