"""Speed and memory of `dnt data prepare`, as ratios to its peers in the same run.

    python -m benchmarks.data_prep                                  # the standard library's source
    python -m benchmarks.data_prep --input 'corpus/*.jsonl.zst'     # your own text
    python -m benchmarks.data_prep --parts memory --input ...       # also: encode workers kitoken
                                                                    # datatrove

The bare loops hold all text in memory.

encode      the whole pipeline (read, tokenise, hash, pack, checksum, report; a given tokenizer, no
            cleaning or dedup) in one process, against `for text in texts: processor.encode(text)`
            on the same texts, already in memory
workers     the same pipeline on 2 workers against 1 (unigram: on four copies of the corpus, being
            so fast)
kitoken     the pipeline with --encoder kitoken against the bare SentencePiece BPE loop
datatrove   the pipeline's fastest checked path, and its BPE, against datatrove's JsonlReader +
            DocumentTokenizer with a byte-level BPE of the same vocabulary size, trained on the same
            text, in a virtual environment of its own
memory      the largest process and the sum (proportional set size) of all, on about 10 MB, the
            corpus, and 10 times the corpus (copies with their words shuffled), with cleaning and
            near dedup

Each ratio is the median over --repeats of pairs run one after the other. Times exclude starting
Python and its imports.
"""

import argparse
import datetime
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from rich.console import Console
from rich.table import Table

from data_prep.identity import text_hash
from data_prep.options import PrepareOptions
from data_prep.pipeline import prepare
from data_prep.read.documents import Findings, read_documents
from data_prep.read.inputs import find_sources, plan_units
from data_prep.read.pieces import read_pieces
from data_prep.tokenizer import Kind
from data_prep.train_tokenizer import SAMPLE_BYTES, TextSample, train
from dnt_scale.record.files import git_commit
from testbed.corpus import python_source_files

ROOT = Path(__file__).parent.parent
PARTS = ("encode", "workers", "kitoken", "datatrove", "memory")

DATATROVE = """
import sys, time, json
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
folder, tokenizer, out = sys.argv[1:]
def run(n):
    made = f"{out}/tokens{n}"
    tokens = DocumentTokenizer(made, tokenizer, eos_token="<eos>", shuffle_documents=False)
    pipeline = [JsonlReader(folder), tokens]
    start = time.perf_counter()
    LocalPipelineExecutor(pipeline, tasks=1, workers=1, logging_dir=f"{out}/logs{n}").run()
    return time.perf_counter() - start
print(json.dumps(run(0)))
"""

TRAIN_PEER = """
import sys, json
from tokenizers import Tokenizer, models, pre_tokenizers, decoders, trainers
sample, vocab_size, out = sys.argv[1:]
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
texts = (json.loads(line)["text"] for line in open(sample, encoding="utf-8"))
options = {"special_tokens": ["<eos>"], "show_progress": False}
engine = trainers.BpeTrainer(vocab_size=int(vocab_size), **options)
tokenizer.train_from_iterator(texts, engine)
tokenizer.save(out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", default=None, help="as INPUT of `dnt data prepare`")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--peer", type=Path, default=ROOT / "build" / "datatrove", help="datatrove's environment"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON to write (default: benchmarks/results/data_prep-N-core-CPU.json)",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    show(result)
    out = (
        options.out
        or Path(__file__).parent / "results" / f"data_prep-{os.cpu_count()}-core-CPU.json"
    )
    earlier = json.loads(out.read_text()) if out.exists() else {}
    result["rows"] = merged(earlier.get("rows", []), result["rows"])
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out}")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    inputs = options.input or [str(path) for path in python_source_files(1 << 40)]
    texts = read_all(inputs)
    corpus = folder / "corpus"
    corpus.mkdir()
    size = write_jsonl(corpus / "corpus.jsonl", texts)
    print(f"{len(texts):,} documents, {size / 1e6:,.1f} MB", file=sys.stderr)
    models = {kind: model(folder, texts, kind, options.vocab_size) for kind in ("bpe", "unigram")}
    bench = Bench(corpus / "corpus.jsonl", texts, size, models, folder, options)
    rows = [row for part in PARTS if part in options.parts for row in getattr(bench, part)()]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "device": f"{os.cpu_count()}-core CPU",
        "corpus_bytes": size,
        "documents": len(texts),
        "vocab_size": options.vocab_size,
        "repeats": options.repeats,
        "rows": rows,
    }


class Bench:
    """One part a method; each returns rows of the table."""

    def __init__(
        self,
        corpus: Path,
        texts: list[str],
        size: int,
        models: dict[str, Path],
        folder: Path,
        options: argparse.Namespace,
    ) -> None:
        self.corpus, self.texts, self.size, self.models = corpus, texts, size, models
        self.folder, self.options = folder, options
        self.runs = 0

    def encode(self) -> list[dict[str, Any]]:
        return [
            self.row(
                "encode",
                f"{kind}, 1 worker / bare loop",
                0.85,
                lambda k=kind: self.bare(k),
                lambda k=kind: self.ours(k),
            )
            for kind in ("unigram", "bpe")
        ]

    def workers(self) -> list[dict[str, Any]]:
        return [
            self.row(
                "workers",
                f"{kind}, 2 workers / 1",
                1.8,
                lambda k=kind, n=copies: self.ours(k, copies=n) / n,
                lambda k=kind, n=copies: self.ours(k, workers=2, copies=n) / n,
            )
            for kind, copies in (("unigram", 4), ("bpe", 1))
        ]

    def kitoken(self) -> list[dict[str, Any]]:
        ours = lambda: self.ours("bpe", encoder="kitoken")  # noqa: E731
        return [
            self.row(
                "kitoken",
                "bpe by kitoken / bare SentencePiece loop",
                2.5,
                lambda: self.bare("bpe"),
                ours,
            )
        ]

    def datatrove(self) -> list[dict[str, Any]]:
        python = peer_environment(self.options.peer)
        sample = self.folder / "sample.jsonl"
        write_jsonl(sample, sampled(self.texts, SAMPLE_BYTES["bpe"]))
        tokenizer = self.folder / "peer.json"
        subprocess.run(
            [python, "-c", TRAIN_PEER, sample, str(self.options.vocab_size), tokenizer], check=True
        )

        def peer() -> float:
            self.runs += 1
            out = self.folder / f"peer-{self.runs}"
            command = [python, "-c", DATATROVE, self.corpus.parent, tokenizer, out]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            return float(json.loads(done.stdout.decode().splitlines()[-1]))

        paths: list[tuple[str, float | None, Kind, str]] = [
            ("unigram, SentencePiece / datatrove", 3.0, "unigram", "sentencepiece"),
            ("bpe by kitoken / datatrove", 3.0, "bpe", "kitoken"),
            ("bpe, SentencePiece / datatrove", None, "bpe", "sentencepiece"),
        ]
        return [
            self.row(
                "datatrove", name, wanted, peer, lambda k=kind, e=encoder: self.ours(k, encoder=e)
            )
            for name, wanted, kind, encoder in paths
        ]

    def memory(self) -> list[dict[str, Any]]:
        small, large = self.folder / "small.jsonl", self.folder / "large.jsonl"
        write_jsonl(small, self.texts[: max(1, len(self.texts) * 10_000_000 // self.size)])
        with large.open("w", encoding="utf-8") as file:
            for copy in range(10):
                for number, text in enumerate(self.texts):
                    words = text.split(" ")
                    if copy:
                        random.Random(copy * len(self.texts) + number).shuffle(words)
                    file.write(json.dumps({"text": " ".join(words)}) + "\n")
        rows = []
        for name, path in (
            ("about 10 MB", small),
            ("the corpus", self.corpus),
            ("10 x the corpus", large),
        ):
            largest, together = self.peak(path)
            print(
                f"memory: {name}: {largest / 1e6:,.0f} MB, all {together / 1e6:,.0f} MB",
                file=sys.stderr,
            )
            rows.append(
                {
                    "part": "memory",
                    "name": name,
                    "text_mb": path.stat().st_size / 1e6,
                    "largest_process_mb": largest / 1e6,
                    "all_processes_mb": together / 1e6,
                    "wanted": "under 1000",
                }
            )
        return rows

    def row(
        self,
        part: str,
        name: str,
        wanted: float | None,
        peer: Callable[[], float],
        ours: Callable[[], float],
    ) -> dict[str, Any]:
        """Pairs of peer and ours, seconds each; the ratio is of speeds."""
        pairs = [(peer(), ours()) for _ in range(self.options.repeats)]
        ratios = [theirs / mine for theirs, mine in pairs]
        row = {
            "part": part,
            "name": name,
            "peer_mb_s": self.size / 1e6 / statistics.median(theirs for theirs, _ in pairs),
            "ours_mb_s": self.size / 1e6 / statistics.median(mine for _, mine in pairs),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "wanted": wanted,
        }
        print(f"{part}: {name}: {row['ratio']:.2f}", file=sys.stderr)
        return row

    def bare(self, kind: Kind) -> float:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(self.models[kind]))
        start = time.perf_counter()
        for text in self.texts:
            processor.encode(text)
        return time.perf_counter() - start

    def ours(
        self, kind: Kind, workers: int = 1, encoder: Any = "sentencepiece", copies: int = 1
    ) -> float:
        self.runs += 1
        inputs = [self.folder / f"copy-{number}.jsonl" for number in range(copies)]
        for path in inputs:
            if not path.exists():
                path.hardlink_to(self.corpus)
        options = PrepareOptions(
            inputs=inputs,
            out=self.folder / f"set-{self.runs}",
            tokenizer=self.models[kind],
            workers=workers,
            encoder=encoder,
        )
        start = time.perf_counter()
        prepare(options, Console(quiet=True))
        seconds = time.perf_counter() - start
        shutil.rmtree(options.out)
        return seconds

    def peak(self, path: Path) -> tuple[int, int]:
        """Bytes of the largest process and of all, at most, of a whole `dnt data prepare` on 2
        workers.
        """
        self.runs += 1
        command = [sys.executable, "-m", "dnt_scale.cli", "data", "prepare", str(path)]
        command += [
            "--out",
            str(self.folder / f"set-{self.runs}"),
            "--clean",
            "light",
            "--dedup",
            "near",
        ]
        command += [
            "--kind",
            "bpe",
            "--encoder",
            "kitoken",
            "--workers",
            "2",
            "--vocab-size",
            str(self.options.vocab_size),
        ]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        largest = together = 0
        ended = threading.Event()
        watch = threading.Thread(target=lambda: (process.wait(), ended.set()))
        watch.start()
        while not ended.wait(0.1):
            sizes = [memory_of(number) for number in family(process.pid)]
            largest = max([largest, *(resident for resident, _ in sizes)])
            together = max(together, sum(proportional for _, proportional in sizes))
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        return largest, together


def family(root: int) -> list[int]:
    """The process and all that it started."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for number in found:
        found += children.get(number, [])
    return found


def memory_of(process: int) -> tuple[int, int]:
    """Resident and proportional bytes; 0 for a process that has ended."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0, 0
    fields = {line.split(":")[0]: int(line.split()[1]) << 10 for line in text.splitlines()[1:]}
    return fields["Rss"], fields["Pss"]


def peer_environment(folder: Path) -> Path:
    """Python of a virtual environment with datatrove, made at the first call."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if subprocess.run([python, "-c", "import datatrove, orjson"], capture_output=True).returncode:
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "datatrove[io]", "tokenizers", "orjson"],
            check=True,
        )
    return python


def read_all(inputs: list[str]) -> list[str]:
    return [
        document.text
        for unit in plan_units(find_sources(inputs))
        for piece in read_pieces(unit)
        for document in read_documents(piece, "text", Findings(), strict=False)
    ]


def sampled(texts: list[str], size: int) -> list[str]:
    sample = TextSample(size)
    for text in texts:
        sample.add(text_hash(text.encode(), "sample"), text)
    return [text for _, text in sample.items()]


def model(folder: Path, texts: list[str], kind: Kind, vocab_size: int) -> Path:
    path = folder / f"{kind}.model"
    train(sampled(texts, SAMPLE_BYTES[kind]), vocab_size, path, kind)
    return path


def write_jsonl(path: Path, texts: list[str]) -> int:
    """Writes the texts; returns their bytes."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return sum(len(text.encode()) for text in texts)


def merged(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of parts that were not run again stay."""
    parts = {row["part"] for row in now}
    rows = [row for row in before if row["part"] not in parts] + now
    return sorted(rows, key=lambda row: PARTS.index(row["part"]))


def show(result: dict[str, Any]) -> None:
    title = (
        f"{result['device']}, {result['corpus_bytes'] / 1e6:,.1f} MB, {result['date']}, "
        f"{result['commit'][:12]}"
    )
    table = Table("part", "what", "peer", "ours", "ratio", "wanted", title=title)
    for row in result["rows"]:
        if row["part"] == "memory":
            largest, together = (
                f"{row['largest_process_mb']:,.0f} MB",
                f"all {row['all_processes_mb']:,.0f} MB",
            )
            table.add_row("memory", row["name"], "", largest, together, row["wanted"])
        else:
            speeds = (f"{row['peer_mb_s']:.1f} MB/s", f"{row['ours_mb_s']:.1f} MB/s")
            table.add_row(
                row["part"],
                row["name"],
                *speeds,
                f"{row['ratio']:.2f}",
                f"{row['wanted']}" if row["wanted"] else "",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
