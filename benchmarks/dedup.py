"""Finding near duplicates: documents/s of data_prep.dedup and of datasketch, on the same text, one
process each.

    python -m benchmarks.dedup
    python -m benchmarks.dedup --input corpus.jsonl.zst --megabytes 30

Both do the whole work, signatures and look-up: datasketch the usual way, MinHash(num_perm=128) of
5-word shingles made in Python and MinHashLSH(threshold=0.8), once with update() a shingle and once
with update_batch(). Text: the sources of Python's standard library, in documents of
--document-bytes; or the "text" fields of a .jsonl or .jsonl.zst. Copies with one run of words
replaced are planted in it, so that there is something to find. Ours removes from an estimate of
0.7.

The parties take turns --rounds times, so that a busy machine slows them alike; the table shows each
one's median.
"""

import argparse
import datetime
import io
import json
import os
import random
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasketch
import orjson
import zstandard
from rich.console import Console
from rich.table import Table

from data_prep.dedup import find_duplicates, fingerprints
from dnt_scale.record.files import git_commit

BATCH_BYTES = 4_000_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", type=Path, help=".jsonl or .jsonl.zst (default: Python's standard library)"
    )
    parser.add_argument("--megabytes", type=float, default=10, help="of text to read")
    parser.add_argument(
        "--document-bytes", type=int, default=3000, help="of each document of the standard library"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, help="JSON to write (default: benchmarks/results/dedup-DEVICE.json)"
    )
    options = parser.parse_args()

    name = f"{os.cpu_count()}-core CPU"
    limit = int(options.megabytes * 1e6)
    texts, planted = with_copies(
        json_lines(options.input, limit)
        if options.input
        else standard_library(limit, options.document_bytes)
    )
    size = sum(len(text.encode()) for text in texts)
    parties: dict[str, Callable[[list[str]], set[int]]] = {
        "datasketch, update": lambda some: by_datasketch(some, batch=False),
        "datasketch, update_batch": lambda some: by_datasketch(some, batch=True),
        "data_prep.dedup": by_ours,
    }
    seconds: dict[str, list[float]] = {party: [] for party in parties}
    found: dict[str, set[int]] = {}
    by_ours(texts[:10])  # imports and tables
    for _ in range(options.rounds):
        for party, work in parties.items():
            started = time.perf_counter()
            found[party] = work(texts)
            seconds[party].append(time.perf_counter() - started)
    rows = [
        {
            "party": party,
            "seconds": statistics.median(times),
            "documents_per_s": len(texts) / statistics.median(times),
            "megabytes_per_s": size / 1e6 / statistics.median(times),
            "planted_found": len(found[party] & planted) / len(planted),
            "duplicates": len(found[party]),
        }
        for party, times in seconds.items()
    ]
    ours = rows[-1]["documents_per_s"]
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "device": name,
        "datasketch": datasketch.__version__,
        "input": options.input.name if options.input else "standard library",
        "documents": len(texts),
        "bytes": size,
        "rounds": options.rounds,
        "parties": rows,
        "ours_over": {row["party"]: ours / row["documents_per_s"] for row in rows[:-1]},
    }
    show(result)
    out = options.out or Path(__file__).parent / "results" / f"dedup-{name.replace(' ', '-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out}")


def standard_library(limit: int, document_bytes: int) -> list[str]:
    """Sources, cut at lines into documents of about `document_bytes`."""
    texts: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if size >= limit or "site-packages" in path.parts:
            continue
        lines: list[str] = []
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            lines.append(line)
            if sum(map(len, lines)) >= document_bytes:
                texts.append("".join(lines))
                lines = []
        texts += ["".join(lines)] if lines else []
        size += path.stat().st_size
    return texts


def json_lines(path: Path, limit: int) -> list[str]:
    """The "text" of each line, of `limit` bytes together or a little more."""
    texts: list[str] = []
    size = 0
    with path.open("rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file) if path.suffix == ".zst" else file
        for line in io.BufferedReader(stream):
            if size >= limit:
                break
            texts.append(orjson.loads(line)["text"])
            size += len(line)
    return texts


def with_copies(texts: list[str]) -> tuple[list[str], set[int]]:
    """The texts and, at the end, a copy of every tenth of 100 words or more with 5 % replaced in
    one run (similarity about 0.88); and the copies' indices."""
    rng = random.Random(0)
    copies = []
    for text in texts[::10]:
        words = text.split()
        count = len(words) // 20
        if count >= 5:
            start = rng.randrange(len(words) - count)
            words[start : start + count] = [f"w{rng.randrange(10**9)}" for _ in range(count)]
            copies.append(" ".join(words))
    return texts + copies, set(range(len(texts), len(texts) + len(copies)))


def by_ours(texts: list[str]) -> set[int]:
    parts, some, size = [], [], 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            parts.append(fingerprints(some))
            some, size = [], 0
    parts.append(fingerprints(some))
    with tempfile.TemporaryDirectory() as folder:
        return set(
            (find_duplicates(parts, Path(folder), near=True).original >= 0).nonzero()[0].tolist()
        )


def by_datasketch(texts: list[str], batch: bool) -> set[int]:
    index = datasketch.MinHashLSH(threshold=0.8, num_perm=128)
    found = set()
    for number, text in enumerate(texts):
        words = text.lower().split()
        shingles = {" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))}
        minhash = datasketch.MinHash(num_perm=128)
        if batch:
            minhash.update_batch(list(shingles))
        else:
            for shingle in shingles:
                minhash.update(shingle)
        if index.query(minhash):
            found.add(number)
        else:
            index.insert(number, minhash)
    return found


def show(result: dict[str, Any]) -> None:
    title = (
        f"{result['device']}, {result['documents']:,} documents, {result['bytes'] / 1e6:.0f} MB of "
        f"{result['input']}"
    )
    table = Table(
        title=f"{title}, datasketch {result['datasketch']}, {result['date']}, "
        f"{result['commit'][:12]}"
    )
    for column in (
        "",
        "documents/s",
        "MB/s",
        "planted copies found",
        "duplicates",
        "ours is so many times as fast",
    ):
        table.add_column(column, justify="right")
    for row in result["parties"]:
        ratio = result["ours_over"].get(row["party"])
        table.add_row(
            row["party"],
            f"{row['documents_per_s']:,.0f}",
            f"{row['megabytes_per_s']:.1f}",
            f"{row['planted_found']:.1%}",
            f"{row['duplicates']:,}",
            f"{ratio:.1f}" if ratio else "",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
