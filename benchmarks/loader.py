"""Loading speed from the page cache: our stream, as training uses it, beside plain webdataset with
one row a member.

    python -m benchmarks.loader

Both give int64 batches of --batch rows of 2049 uint16 tokens in one process: ours in its shuffled
order out of blocks of 512 rows, webdataset in the order of its tars, without a shuffle. The mixture
has this set and one of packing "best_fit" with padding, by equal weights. They take turns; the
tables show medians beside what is wanted.

Starting is the time from a manifest in memory to the first batch of a fresh stream, at position 0
and at random positions of the first thousand epochs, in turns.
"""

import argparse
import datetime
import hashlib
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data_prep import shards
from data_prep.arrays import Tokens
from data_prep.shards import (
    BLOCK_ROWS,
    Manifest,
    Options,
    Packing,
    SourceInfo,
    Split,
    TokenizerInfo,
)
from dnt_scale.config import DataConfig
from dnt_scale.data.token_sets import TokenSet, TokenSets, load_sets
from dnt_scale.data.tokens import token_stream
from dnt_scale.record.files import git_commit

SEQ_LEN = 2048
VOCABULARY = 50_304
BLOCKS_A_SHARD = 32  # 64 MiB
PADDING = 100  # places of a row, of the set that has some
SEED = 1
WANTED_TOKENS_PER_S = 300e6  # of one set
WANTED_RATIO = 3.0  # to webdataset
WANTED_START_RATIO = 1.0  # about
OURS, MIXED, PLAIN = "ours", "ours, a mixture of two, one best_fit", "webdataset, a row a member"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=128, help="blocks of 512 rows in the set")
    parser.add_argument("--batch", type=int, default=64, help="rows a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=100)
    parser.add_argument(
        "--out", type=Path, help="JSON to write (default: benchmarks/results/loader-DEVICE.json)"
    )
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        source = make_set(Path(folder, "set"), options.blocks)
        padded = make_set(Path(folder, "padded"), options.blocks, "best_fit")
        mixture = load_sets(
            DataConfig.model_validate(
                {
                    "mixture": {
                        s.folder.name: {"path": s.folder, "weight": 1} for s in (source, padded)
                    }
                }
            )
        )
        (Path(folder) / "plain").mkdir()
        tars = make_plain_tars(Path(folder, "plain"), source)
        loaders: dict[str, Callable[[], Iterator[Tensor]]] = {
            OURS: lambda: our_batches((source,), options.batch),
            MIXED: lambda: our_batches(mixture, options.batch),
            PLAIN: lambda: plain_batches(tars, options.batch),
        }
        rounds: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(options.rounds):
            for name, batches in loaders.items():
                rounds[name].append(tokens_per_s(batches))
        at_zero, at_random = first_batches(source, options.batch, options.starts)

    rates = {name: statistics.median(found) for name, found in rounds.items()}
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "device": f"{os.cpu_count()}-core CPU",
        "torch": torch.__version__,
        "webdataset": webdataset.__version__,
        "rows": source.manifest.splits["train"].rows,
        "seq_len": SEQ_LEN,
        "batch": options.batch,
        "tokens_per_s": rates,
        "tokens_per_s_of_rounds": rounds,
        "ratio": rates[OURS] / rates[PLAIN],
        "first_batch_s": {
            "position 0": statistics.median(at_zero),
            "random position": statistics.median(at_random),
        },
        "start_ratio": statistics.median(at_random) / statistics.median(at_zero),
        "wanted": {
            "tokens_per_s": WANTED_TOKENS_PER_S,
            "ratio": WANTED_RATIO,
            "start_ratio": WANTED_START_RATIO,
        },
    }
    show(result)
    out = (
        options.out
        or Path(__file__).parent / "results" / f"loader-{result['device'].replace(' ', '-')}.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out}")


def make_set(folder: Path, blocks: int, packing: Packing = "concat") -> TokenSet:
    """A set of random tokens, in our format; of packing "best_fit" each row ends in padding."""
    folder.mkdir()
    made = []
    for number, first in enumerate(range(0, blocks, BLOCKS_A_SHARD)):
        name = shards.shard_name("train", number)
        content = (
            random_block(block, packing)
            for block in range(first, min(blocks, first + BLOCKS_A_SHARD))
        )
        made.append(shards.write_shard(folder / name, name, content, first))
    tokenizer = b"none: the tokens are random"
    (folder / shards.TOKENIZER).write_bytes(tokenizer)
    rows = blocks * BLOCK_ROWS
    padding, tail = (PADDING, ()) if packing == "best_fit" else (0, (1,))
    train = Split(
        documents=1,
        tokens=rows * (SEQ_LEN - padding),
        text_bytes=rows * SEQ_LEN,
        rows=rows,
        tail=tail,
        shards=tuple(made),
    )
    manifest = Manifest(
        format="dnt-shards",
        version=1,
        dtype="uint16",
        seq_len=SEQ_LEN,
        packing=packing,
        tokenizer=TokenizerInfo(
            file="tokenizer.model",
            sha256=hashlib.sha256(tokenizer).hexdigest(),
            vocab_size=VOCABULARY,
            round_trip=False,
        ),
        eos_id=0,
        options=Options(
            vocab_size=None, kind=None, sample_bytes=None, val_fraction=0, shard_bytes=64 << 20
        ),
        sources=(
            SourceInfo(
                name="random", documents=1, text_bytes=train.text_bytes, replaced=0, empty=0
            ),
        ),
        splits={"train": train},
    )
    shards.write_manifest(folder, manifest)
    return TokenSet("", folder, shards.load_manifest(folder))


def random_block(block: int, packing: Packing) -> Tokens:
    generator = np.random.Generator(np.random.Philox(block))
    tokens = generator.integers(1, VOCABULARY, (BLOCK_ROWS, SEQ_LEN + 1), dtype=np.uint16)
    tokens[:, 0] = 0
    if packing == "best_fit":
        tokens[:, -1 - PADDING :] = 0  # the end of the last document, and as much padding
    return tokens


def make_plain_tars(folder: Path, source: TokenSet) -> list[str]:
    """The same rows, each a member of its own."""
    paths = []
    for number, shard in enumerate(source.manifest.splits["train"].shards):
        paths.append(str(folder / f"{number:06d}.tar"))
        with webdataset.TarWriter(paths[-1]) as tar:
            first = number * BLOCKS_A_SHARD
            for block in range(first, first + len(shard.members)):
                for row, tokens in enumerate(
                    shards.read_block(source.folder, source.manifest, "train", block)
                ):
                    tar.write({"__key__": f"{block * BLOCK_ROWS + row:09d}", "tokens.npy": tokens})
    return paths


def our_batches(sources: TokenSets, batch: int) -> Iterator[Tensor]:
    """As many rows as an epoch of one set has."""
    with token_stream(sources, seed=SEED, global_batch=batch, rank=0, world_size=1) as stream:
        for _ in range(sources[0].manifest.splits["train"].rows // batch):
            yield next(stream)[0]


def plain_batches(tars: list[str], batch: int) -> Iterator[Tensor]:
    """One epoch. A row's bytes are taken as they are, which is several times faster than
    webdataset's own decoder.
    """
    rows: list[Tokens] = []
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        rows.append(np.frombuffer(sample["tokens.npy"], "<u2", offset=shards.NPY_HEADER))
        if len(rows) == batch:
            yield torch.from_numpy(np.stack(rows).astype(np.int64))
            rows.clear()


def tokens_per_s(batches: Callable[[], Iterator[Tensor]]) -> float:
    """Row tokens, seq_len + 1 a row, a second, over all batches."""
    started = time.perf_counter()
    tokens = 0
    for batch in batches():
        assert batch.dtype == torch.int64 and batch.shape[1] == SEQ_LEN + 1
        tokens += batch.numel()
    return tokens / (time.perf_counter() - started)


def first_batches(source: TokenSet, batch: int, starts: int) -> tuple[list[float], list[float]]:
    """Seconds to the first batch of fresh streams at position 0, and at random positions."""
    rows = source.manifest.splits["train"].rows
    generator = random.Random(SEED)
    found: tuple[list[float], list[float]] = [], []
    for number in range(starts):
        pair = list(zip(found, (0, generator.randrange(1000 * rows)), strict=True))
        for seconds, position in pair if number % 2 else reversed(pair):
            started = time.perf_counter()
            with token_stream(
                (source,),
                seed=SEED,
                global_batch=batch,
                rank=0,
                world_size=1,
                consumed_rows=position,
            ) as stream:
                next(stream)
                seconds.append(time.perf_counter() - started)
    return found


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['device']}, {result['date']}, {result['commit'][:12]}")
    for column in ("one process, from the page cache", "Mtok/s", "against webdataset"):
        table.add_column(column, justify="right")
    for name, rate in result["tokens_per_s"].items():
        table.add_row(name, f"{rate / 1e6:,.0f}", f"{rate / result['tokens_per_s'][PLAIN]:.2f}")
    table.add_row(
        "wanted of ours, at least", f"{WANTED_TOKENS_PER_S / 1e6:,.0f}", f"{WANTED_RATIO:.2f}"
    )
    Console(width=110).print(table)
    table = Table()
    for column in ("first batch of a fresh stream at", "ms", "against position 0"):
        table.add_column(column, justify="right")
    for name, seconds in result["first_batch_s"].items():
        table.add_row(
            name, f"{seconds * 1e3:.1f}", f"{seconds / result['first_batch_s']['position 0']:.2f}"
        )
    table.add_row("wanted, about", "", f"{WANTED_START_RATIO:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
