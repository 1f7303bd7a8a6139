import io
import json
import os
import random
import resource
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.shards import (
    iter_documents,
    load_manifest,
    read_block,
    write_manifest,
)
from dnt_scale.config import DataConfig
from dnt_scale.data import rows as rows_module
from dnt_scale.data.order import WINDOW_BLOCKS, Order, block_rows, deal, row_at, rows_from
from dnt_scale.data.rows import ShardError
from dnt_scale.data.token_sets import SHARES, TokenSet, load_sets
from dnt_scale.data.tokens import token_stream, validation_batches
from dnt_scale.model.batch import IGNORED
from testbed.run import call, synthetic_set, write_split

BLOCK_SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=3 * WINDOW_BLOCKS)
SEEDS = st.integers(0, 2**64 - 1)
SIZES_200 = [5 + block % 7 for block in range(200)]  # of the goldens


def order_of(block_rows: list[int], seed: int) -> Order:
    """The order over a split of which only the rows of its blocks are known."""
    return Order(np.array(block_rows, dtype=np.int64), seed)


def epoch(order: Order, number: int) -> list[tuple[int, int]]:
    return [order.row_at(number * order.rows + inside) for inside in range(order.rows)]


@settings(deadline=None, max_examples=40)
@given(BLOCK_SIZES, SEEDS, st.integers(0, 1000))
def test_an_epoch_holds_every_row_once(block_rows, seed, number):
    every_row = [(block, row) for block, rows in enumerate(block_rows) for row in range(rows)]
    assert sorted(epoch(order_of(block_rows, seed), number)) == every_row


@settings(deadline=None, max_examples=40)
@given(BLOCK_SIZES, SEEDS, st.lists(st.integers(0, 10**6), max_size=20))
def test_a_position_is_the_same_row_whatever_was_asked_before(block_rows, seed, positions):
    used = order_of(block_rows, seed)
    assert [used.row_at(p) for p in positions] == [
        order_of(block_rows, seed).row_at(p) for p in positions
    ]


@settings(deadline=None, max_examples=20)
@given(BLOCK_SIZES, SEEDS)
def test_rows_are_shuffled_inside_windows_of_blocks(block_rows, seed):
    order = order_of(block_rows, seed)
    blocks_seen: list[int] = []
    for block, _ in epoch(order, 0):
        if block not in blocks_seen:
            blocks_seen.append(block)
    position = 0
    for start in range(0, len(block_rows), WINDOW_BLOCKS):
        window = blocks_seen[start : start + WINDOW_BLOCKS]
        size = sum(block_rows[block] for block in window)
        assert {order.row_at(p)[0] for p in range(position, position + size)} == set(window)
        position += size


def test_epochs_and_seeds_differ():
    order = order_of(SIZES_200, 1)
    assert epoch(order, 0) != epoch(order, 1)
    assert epoch(order, 0) != epoch(order_of(SIZES_200, 2), 0)
    assert epoch(order, 0) != sorted(epoch(order, 0))


@pytest.mark.parametrize(
    ("seed", "position", "row"),
    [
        (0, 0, (44, 4)),
        (1234, 0, (173, 4)),
        (1234, 1, (120, 1)),
        (1234, 1000, (144, 6)),
        (1234, 1599, (118, 3)),
        (1234, 10**7, (101, 5)),
        (2**64 - 1, 10**12, (57, 2)),
    ],
)
def test_the_order_never_changes(seed, position, row):
    """A change here would give every run in progress another order of data when it resumes."""
    assert order_of(SIZES_200, seed).row_at(position) == row


@settings(deadline=None, max_examples=60)
@given(BLOCK_SIZES, SEEDS, st.integers(0, 10**9), st.integers(0, 3000))
def test_many_rows_at_once_are_row_at(block_rows, seed, position, count):
    order = order_of(block_rows, seed)
    blocks, rows = order.rows_from(position, count)
    assert blocks.dtype == rows.dtype == np.int64
    some = range(0, count, max(1, count // 100))
    assert [(blocks[i], rows[i]) for i in some] == [order.row_at(position + i) for i in some]


# ---------------------------------------------------------------- mixtures

WEIGHTS = st.lists(
    st.one_of(st.floats(1e-6, 1e6), st.sampled_from([1.0, 2.0])), min_size=1, max_size=8
)


def shares_of(weights):
    """What `load_sets` makes of weights."""
    return sorted(
        (max(1, round(weight / sum(weights) * SHARES)) for weight in weights), reverse=True
    )


def dealt_by_hand(shares, position):
    """The definition of `deal`, in integers of any size."""
    for index, share in enumerate(shares):
        total = sum(shares[index:])
        before, after = (
            (2 * share * count + total) // (2 * total) for count in (position, position + 1)
        )
        if after > before:
            return index, before
        position -= before
    raise AssertionError


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 10**12), st.integers(1, 300))
def test_deal_is_right_at_any_position(weights, first, count):
    shares = shares_of(weights)
    source, within = deal(shares, np.arange(first, first + count))
    assert source.dtype == within.dtype == np.int64
    by_hand = [dealt_by_hand(shares, position) for position in range(first, first + count)]
    assert list(zip(source.tolist(), within.tolist(), strict=True)) == by_hand


@settings(deadline=None)
@given(WEIGHTS, st.integers(1, 3000))
def test_each_set_gives_its_rows_in_turn_and_its_part_of_any_prefix(weights, count):
    shares = shares_of(weights)
    source, within = deal(shares, np.arange(count))
    bound = {1: 0, 2: 0.5}.get(
        len(shares), 0.5 + 0.5 * sum(1 / k for k in range(1, len(shares) - 1))
    )
    for index, share in enumerate(shares):
        mine = source == index
        assert np.array_equal(within[mine], np.arange(mine.sum()))
        exact = np.arange(1, count + 1) * (share / sum(shares))
        assert np.abs(np.cumsum(mine) - exact).max() <= bound + 1e-6


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(BLOCK_SIZES, st.floats(0.01, 1)), min_size=1, max_size=4),
    SEEDS,
    st.integers(0, 10**8),
    st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 3)), min_size=1, max_size=4
    ),
)
def test_any_sequence_of_ranks_sees_the_same_rows(sets, seed, first_batch, stages):
    """Each stage runs some steps of 12 rows on some ranks, each rank with orders of its own."""
    shares = shares_of([weight for _, weight in sets])

    def new_orders():
        return [
            order_of(block_rows, (seed + index) % 2**64)
            for index, (block_rows, _) in enumerate(sets)
        ]

    start = position = 12 * first_batch
    seen = []
    for ranks, steps in stages:
        orders = [new_orders() for _ in range(ranks)]
        for _ in range(steps):
            for rank in range(ranks):
                parts = rows_from(
                    shares, orders[rank], position + rank * (12 // ranks), 12 // ranks
                )
                seen += zip(*(part.tolist() for part in parts), strict=True)
            position += 12
    orders = new_orders()
    wanted = [dealt_by_hand(shares, p) for p in range(start, position)]
    assert seen == [(source, *orders[source].row_at(within)) for source, within in wanted]


def test_the_order_of_a_mixture_never_changes():
    shares = shares_of([0.7, 0.2, 0.1])
    assert shares == [751619277, 214748365, 107374182]
    source, within = deal(shares, np.arange(20))
    assert "".join(map(str, source)) == "01000200100100020010"
    source, within = deal(shares, np.arange(10**12, 10**12 + 3))
    assert source.tolist() == [0, 0, 1]
    assert within.tolist() == [700000000186, 700000000187, 200000000186]
    seeds = [TokenSet(name, Path(), None).shuffle_seed(1234) for name in ("", "wiki", "code")]
    assert seeds == [1234, 8878525314788845825, 2800035312695850502]


# ---------------------------------------------------------------- real sets


@pytest.fixture(scope="module")
def manifest(corpus):
    return load_manifest(corpus)


@pytest.fixture(scope="module")
def plain(corpus):
    """What `webdataset` alone reads of a split: its blocks, in file order."""

    def read(split):
        shards = sorted(str(path) for path in corpus.glob(f"{split}-*.tar"))
        samples = webdataset.WebDataset(shards, shardshuffle=False)
        return [np.load(io.BytesIO(sample["tokens.npy"])).astype(np.int64) for sample in samples]

    return read


def batches(
    corpus, manifest, count, *, seed=7, consumed_rows=0, rank=0, world_size=1, global_batch=8
):
    """The first ``count`` batches of one rank, and the states that belong to them."""
    with token_stream(
        (TokenSet("", corpus, manifest),),
        seed=seed,
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        consumed_rows=consumed_rows,
    ) as stream:
        got = [next(stream) for _ in range(count)]
    return [batch for batch, _ in got], [consumed for _, consumed in got]


def test_rows_are_those_that_webdataset_reads(corpus, manifest, plain):
    blocks = plain("train")
    got = torch.cat(batches(corpus, manifest, 5)[0])
    assert got.dtype == torch.int64
    wanted = [
        blocks[block][row]
        for block, row in (row_at(manifest, 7, position) for position in range(40))
    ]
    assert np.array_equal(got.numpy(), np.stack(wanted))


def test_an_epoch_predicts_every_token_once(corpus, manifest):
    split = manifest.splits["train"]
    position_of = {row_at(manifest, 7, position): position for position in range(split.rows)}
    assert len(position_of) == split.rows
    batch = 128
    read = torch.cat(batches(corpus, manifest, -(-split.rows // batch), global_batch=batch)[0])[
        : split.rows
    ]
    in_file_order = read[[position_of[row] for row in sorted(position_of)]]
    predicted = in_file_order[:, 1:].flatten().tolist() + list(split.tail[1:])
    documents = [
        token
        for document in iter_documents(corpus, "train")
        for token in (*document, manifest.eos_id)
    ]
    assert predicted == documents  # all but the eos in front, which nothing predicts
    assert len(predicted) == split.tokens
    assert torch.equal(in_file_order[1:, 0], in_file_order[:-1, -1])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_slice_the_same_global_batches(corpus, manifest, world_size):
    alone, consumed_alone = batches(corpus, manifest, 6)
    parts = [
        batches(corpus, manifest, 6, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for index, whole in enumerate(alone):
        assert torch.equal(torch.cat([part[index] for part, _ in parts]), whole)
    assert all(consumed == consumed_alone for _, consumed in parts)
    assert consumed_alone == [8, 16, 24, 32, 40, 48]


def test_starting_at_consumed_rows_is_skipping_them(corpus, manifest):
    everything, states = batches(corpus, manifest, 8)
    later, later_states = batches(corpus, manifest, 5, consumed_rows=24)
    assert torch.equal(torch.cat(later), torch.cat(everything[3:]))
    assert later_states == states[3:]


def test_a_batch_may_cross_the_end_of_an_epoch(corpus, manifest, plain):
    rows = manifest.splits["train"].rows
    blocks = plain("train")
    got = torch.cat(batches(corpus, manifest, 2, consumed_rows=rows - 5)[0])
    wanted = [row_at(manifest, 7, position) for position in range(rows - 5, rows + 11)]
    assert np.array_equal(got.numpy(), np.stack([blocks[block][row] for block, row in wanted]))


def test_global_random_states_stay(corpus, manifest):
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    batches(corpus, manifest, 3)
    list(
        validation_batches(
            TokenSet("", corpus, manifest), rows=8, micro_batch=4, rank=0, world_size=1
        )
    )
    after = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def stream_threads():
    return [thread for thread in threading.enumerate() if thread.name == "stream"]


@pytest.mark.parametrize("taken", [0, 1, 9])
def test_leaving_stops_the_thread_and_closes_the_files(corpus, manifest, taken):
    with (
        pytest.raises(ZeroDivisionError),
        token_stream(
            (TokenSet("", corpus, manifest),), seed=0, global_batch=8, rank=0, world_size=1
        ) as stream,
    ):
        for _ in range(taken):
            next(stream)
        assert len(stream_threads()) == 1
        raise ZeroDivisionError
    assert not stream_threads()
    assert not [path for path in Path("/proc/self/fd").iterdir() if path.resolve().parent == corpus]


def test_a_batch_that_ranks_cannot_share_is_an_error(corpus, manifest):
    with pytest.raises(ValueError, match=r"train\.global_batch is 9, not divisible by 2 ranks"):
        token_stream(
            (TokenSet("", corpus, manifest),), seed=0, global_batch=9, rank=0, world_size=2
        )


def test_a_shard_truncated_in_use_is_named(corpus, manifest, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "set")
    with token_stream(
        (TokenSet("", folder, manifest),), seed=0, global_batch=64, rank=0, world_size=1
    ) as stream:
        next(stream)
        for path in folder.glob("train-*.tar"):
            os.truncate(path, 2048)
        with pytest.raises(ShardError, match=r"train-00000\d\.tar: ends inside block \d+, row \d+"):
            while True:
                next(stream)
    assert not stream_threads()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("rows", [30, 32, 10**6])
def test_validation_deals_every_row_once(corpus, manifest, plain, world_size, rows):
    every_row = np.concatenate(plain("val"))
    taken = min(rows, len(every_row))
    wanted = every_row[[index * len(every_row) // taken for index in range(taken)]]
    ranks = [
        list(
            validation_batches(
                TokenSet("", corpus, manifest),
                rows=rows,
                micro_batch=4,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(part) for part in ranks}) == 1
    assert all(batch.shape == (4, manifest.seq_len + 1) for part in ranks for batch in part)
    dealt = torch.cat([batch for together in zip(*ranks, strict=True) for batch in together])
    real = dealt[(dealt != IGNORED).any(dim=1)]
    assert np.array_equal(real.numpy(), wanted)
    assert (dealt[len(real) :] == IGNORED).all()


# ---------------------------------------------------------------- several real sets, one of them
# with padding


@pytest.fixture(scope="module")
def mixture(corpus, packed):
    entries = {"docs": {"path": corpus, "weight": 2}, "packed": {"path": packed, "weight": 1}}
    return load_sets(DataConfig.model_validate({"mixture": entries}))


def ignoring_padding(row, eos):
    """A row of packing "best_fit" as the loader should give it."""
    return [
        IGNORED if place and token == eos == before else token
        for place, (before, token) in enumerate(zip([-1, *row], row, strict=False))
    ]


def test_a_mixture_reads_each_sets_rows_in_its_own_order(mixture):
    with token_stream(mixture, seed=7, global_batch=30, rank=0, world_size=1) as stream:
        got = torch.cat([next(stream)[0] for _ in range(20)]).tolist()
    orders = [
        Order(block_rows(source.manifest.splits["train"]), source.shuffle_seed(7))
        for source in mixture
    ]
    assert orders[0].seed != orders[1].seed
    wanted = []
    for position in range(600):
        index, within = dealt_by_hand([source.share for source in mixture], position)
        block, row = orders[index].row_at(within)
        ids = read_block(mixture[index].folder, mixture[index].manifest, "train", block)[
            row
        ].tolist()
        wanted.append(
            ignoring_padding(ids, mixture[index].manifest.eos_id)
            if mixture[index].name == "packed"
            else ids
        )
    assert got == wanted
    assert sum(IGNORED in row for row in got) > 20


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_slice_the_same_batches_of_a_mixture(mixture, world_size):
    def read(rank, world_size, consumed_rows=0):
        with token_stream(
            mixture,
            seed=7,
            global_batch=12,
            rank=rank,
            world_size=world_size,
            consumed_rows=consumed_rows,
        ) as stream:
            return [next(stream)[0] for _ in range(6)]

    alone = read(0, 1)
    parts = [read(rank, world_size) for rank in range(world_size)]
    assert all(
        torch.equal(torch.cat(part), whole)
        for part, whole in zip(zip(*parts, strict=True), alone, strict=True)
    )
    assert torch.equal(torch.cat(read(0, 1, consumed_rows=36)[:3]), torch.cat(alone[3:]))


def test_padding_is_all_that_is_ignored(packed):
    """An epoch of a "best_fit" set predicts as many tokens as the manifest says."""
    [source] = load_sets(DataConfig(path=packed))
    split = source.manifest.splits["train"]
    with token_stream((source,), seed=0, global_batch=split.rows, rank=0, world_size=1) as stream:
        tokens = next(stream)[0]
    assert (tokens[:, 0] == source.manifest.eos_id).all()
    assert (
        int((tokens[:, 1:] != IGNORED).sum()) == split.tokens < split.rows * source.manifest.seq_len
    )
    targets, inputs = tokens[:, 1:], tokens[:, :-1]
    assert not ((targets == source.manifest.eos_id) & (inputs == source.manifest.eos_id)).any()
    val = source.manifest.splits["val"]
    held_out = torch.cat(
        list(validation_batches(source, rows=10**6, micro_batch=4, rank=0, world_size=1))
    )
    assert int((held_out[:, 1:] != IGNORED).sum()) == val.tokens


def test_a_mixture_weighs_tokens_not_rows(corpus, packed):
    entries = {"docs": {"path": corpus, "weight": 1}, "packed": {"path": packed, "weight": 1}}
    sources = load_sets(DataConfig.model_validate({"mixture": entries}))
    assert [source.name for source in sources] == [
        "packed",
        "docs",
    ]  # half of the tokens is more rows of the padded one
    rows = sources[0].manifest.splits["train"].rows  # an epoch of it
    count = rows * sum(source.share for source in sources) // sources[0].share
    with token_stream(sources, seed=7, global_batch=count, rank=0, world_size=1) as stream:
        predicted = (next(stream)[0][:, 1:] != IGNORED).sum(1).numpy()
    source, _ = deal([source.share for source in sources], np.arange(count))
    by_set = [int(predicted[source == index].sum()) for index in (0, 1)]
    assert by_set[0] == pytest.approx(by_set[1], rel=0.01)
    assert by_set[0] < 0.97 * rows * sources[0].manifest.seq_len


def test_many_shards_are_read_through_few_open_files(corpus, manifest, monkeypatch):
    def open_files():
        return len(
            [path for path in Path("/proc/self/fd").iterdir() if path.resolve().parent == corpus]
        )

    wanted = torch.cat(batches(corpus, manifest, 6)[0])
    assert len(manifest.splits["train"].shards) > 2
    monkeypatch.setattr(rows_module, "OPEN_FILES", 2)
    with token_stream(
        (TokenSet("", corpus, manifest),), seed=7, global_batch=8, rank=0, world_size=1
    ) as stream:
        got = torch.cat([next(stream)[0] for _ in range(6)])
        assert open_files() <= 2
    assert torch.equal(got, wanted)
    assert open_files() == 0


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """A mixture of five sets of 24 shards each."""
    folder = tmp_path_factory.mktemp("many")
    manifest = load_manifest(synthetic_set(folder / "made up", val=False))
    entries = {}
    for number in range(5):
        out = folder / f"set{number}"
        out.mkdir()
        shutil.copy(folder / "made up" / "tokenizer.model", out)
        stream = np.arange(24 * 512 * 4 + 1, dtype=np.uint16) % (500 + number)
        split = write_split(out, "train", stream, 4)
        totals = {"documents": split.documents, "text_bytes": split.text_bytes}
        [source] = manifest.sources
        update = {
            "seq_len": 4,
            "splits": {"train": split},
            "sources": (source.model_copy(update=totals),),
        }
        write_manifest(out, manifest.model_copy(update=update))
        entries[f"set{number}"] = {"path": out, "weight": 1}
    return DataConfig.model_validate({"mixture": entries})


def read_with_a_limit_on_files(data, soft, hard):
    """Print how many shards a stream keeps open, the soft limit that it leaves, and the sum of
    what it reads.
    """
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    folders = {entry.path for entry in data.mixture.values()}
    with token_stream(load_sets(data), seed=7, global_batch=600, rank=0, world_size=1) as stream:
        total = sum(int(next(stream)[0].sum()) for _ in range(5))
        opened = sum(path.resolve().parent in folders for path in Path("/proc/self/fd").iterdir())
    print(json.dumps([opened, resource.getrlimit(resource.RLIMIT_NOFILE)[0], total]))


def test_all_sets_together_keep_to_the_limit_on_open_files(many_shards):
    """120 shards are in use at once: more than a soft limit of 64 lets a process open."""

    def read(soft, hard):
        return json.loads(call(read_with_a_limit_on_files, many_shards, soft, hard).ok().out)

    opened, soft, total = read(64, 64)
    assert 16 < opened <= 32 and soft == 64
    assert read(64, 400) == [120, 400, total]
    assert read(64, 4096) == [120, 1280, total]
    assert read(2000, 4096) == [120, 2000, total]
