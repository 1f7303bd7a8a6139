"""From a corpus to a set of shards: survey, train the tokenizer, tokenise over processes, pack, write."""

import contextlib
import errno
import fcntl
import multiprocessing
import multiprocessing.process
import os
import re
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from data_prep import shards
from data_prep.read import Counts, Source, find_sources, read_documents
from data_prep.shards import Manifest, Options, SourceInfo, SplitWriter, TokenizerInfo, Tokens
from data_prep.tokenizer import Kind, Tokenizer, sample, text_hash, train
from data_prep.verify import verify as verify_set

PARTIAL = ".dnt-partial"
OUR_FILES = re.compile(r"(train|val)-\d{6,}\.tar|tokenizer\.model")
BATCH_BYTES = 1_000_000
ROUND_TRIP_BYTES = 1_000_000
# What each kind learns from in some 15 seconds on two cores.
SAMPLE_BYTES = {"bpe": 32_000_000, "unigram": 4_000_000}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class PrepareOptions:
    """What `prepare` needs to know.

    `tokenizer` is a SentencePiece model to use; without one, a `kind` model of `vocab_size` pieces is trained on
    about `sample_bytes` of the corpus (default: SAMPLE_BYTES of the kind). Of the documents, `val_fraction` are held
    out. `workers` (default: one for each CPU this process may use) changes the time and nothing else.
    """

    inputs: Sequence[str | Path]
    out: Path
    vocab_size: int = 16384
    tokenizer: Path | None = None
    kind: Kind = "bpe"
    seq_len: int = 1024
    val_fraction: float = 0.005
    workers: int | None = None
    shard_bytes: int = 256 << 20
    sample_bytes: int | None = None


class Encoded(NamedTuple):
    """One split's part of a batch: each document's ids followed by eos (n,), and what they were made of."""

    ids: Tokens
    documents: int
    text_bytes: int


def prepare(options: PrepareOptions, console: Console | None = None) -> Manifest:
    """Make a set of shards in `options.out`, which appears whole or not at all; progress goes to stderr.

    Raises ValueError, in one or two lines, for: bad options or input, a folder that already holds a set, a corpus that
    is empty or smaller than one row, a vocabulary that the corpus does not support, a full disk.
    """
    console = console or Console(stderr=True)
    _check_options(options)
    out = Path(options.out)
    sources = find_sources(options.inputs)
    given = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    try:
        with _all_or_nothing(out) as partial:
            manifest = _prepare_into(partial, options, sources, given, console)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise ValueError(f"{out}: cannot be written: {error.strerror or error}; check the path") from error
        free = shutil.disk_usage(next(p for p in (out, *out.absolute().parents) if p.exists())).free
        raise ValueError(
            f"{out}: the disk is full or a limit is reached ({error.strerror}; {free:,} bytes free "
            "after cleaning up); free some space or choose another --out. Nothing was left behind."
        ) from error
    except BrokenProcessPool as error:
        raise ValueError(
            "a tokenising process was killed, perhaps for want of memory; use fewer --workers. Nothing was left behind."
        ) from error
    rows = ", ".join(f"{split.rows:,} {name} rows" for name, split in manifest.splits.items())
    console.print(f"wrote    {escape(str(out))}: {rows} of {options.seq_len} tokens", highlight=False)
    return manifest


def verify(folder: Path, console: Console | None = None) -> list[str]:
    """`verify.verify` with a progress line on stderr: the problems, a line each, or []."""
    console = console or Console(stderr=True)
    total = sum(path.stat().st_size for path in Path(folder).glob("*.tar"))
    with _stage(console, "verify", total) as advance:
        return verify_set(folder, advance)


def info(folder: Path, console: Console | None = None) -> None:
    """Print a table of what a set holds, on stdout. Raises ValueError as `load_manifest` does."""
    folder = Path(folder)
    manifest = shards.load_manifest(folder)
    table = Table("split", "documents", "text MB", "tokens", "rows", "shards", "MB", "B/token", title=str(folder))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, split in manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        table.add_row(
            name,
            f"{split.documents:,}",
            f"{split.text_bytes / 1e6:,.1f}",
            f"{split.tokens:,}",
            f"{split.rows:,}",
            f"{len(split.shards):,}",
            f"{size / 1e6:,.1f}",
            f"{split.text_bytes / split.tokens:.2f}",
        )
    options, tokenizer = manifest.options, manifest.tokenizer
    origin = f"{options.kind}, trained on a sample of this corpus" if options.kind else "given"
    exact = "decodes to exactly the text" if tokenizer.round_trip else "does NOT decode to exactly the text"
    lines = [
        f"row        {manifest.seq_len} + 1 tokens of {manifest.dtype}",
        f"tokenizer  {tokenizer.vocab_size:,} pieces ({origin}); {exact}",
        f"manifest   sha256 {shards.manifest_sha256(folder)}",
    ]
    for source in manifest.sources[:20]:
        notes = f", {source.replaced:,} with broken UTF-8" if source.replaced else ""
        notes += f", {source.empty:,} empty left out" if source.empty else ""
        lines.append(
            f"source     {source.name}: {source.documents:,} documents, {source.text_bytes / 1e6:,.1f} MB{notes}"
        )
    if more := len(manifest.sources) - 20:
        lines += [f"           and {more:,} more"] if more > 0 else []
    console = console or Console()
    console.print(table)
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def held_out(text: str, val_fraction: float) -> bool:
    """Whether a document belongs to the validation split: a function of its text alone."""
    return text_hash(text, "split") < val_fraction * 2**64


def _prepare_into(
    folder: Path, options: PrepareOptions, sources: list[Source], given: Tokenizer | None, console: Console
) -> Manifest:
    counts, texts = _survey(options, sources, given is not None, console)
    total = sum(count.text_bytes for count in counts)
    model = folder / shards.TOKENIZER
    if given:
        assert options.tokenizer
        shutil.copyfile(options.tokenizer, model)
    else:
        with _stage(console, "learn", None) as advance:
            train(texts, options.vocab_size, model, options.kind)
            advance(sum(len(text.encode()) for text in texts))
    _sync(model)
    tokenizer = Tokenizer.load(model)
    round_trip = _round_trips(tokenizer, texts)
    if not round_trip:
        console.print(
            "warning: this tokenizer does not decode to exactly the text that goes in (it normalises, or lacks "
            "characters); the manifest records that"
        )

    dtype = shards.dtype_for(tokenizer.vocab_size)
    names: tuple[shards.SplitName, ...] = ("train", "val") if options.val_fraction else ("train",)
    writers = [
        SplitWriter(folder, name, options.seq_len, dtype, tokenizer.eos_id, options.shard_bytes) for name in names
    ]
    try:
        with _stage(console, "tokenise", total) as advance:
            batches = _batches(text for source in sources for _, text in read_documents(source))
            # Closed at once after an error, so that no worker outlives this block.
            with contextlib.closing(_encode_all(tokenizer, model, options, batches)) as encoded:
                for parts in encoded:
                    for writer, part in zip(writers, parts, strict=False):
                        writer.add(*part)
                    advance(sum(part.text_bytes for part in parts), sum(len(part.ids) for part in parts))
            splits = {name: writer.finish() for name, writer in zip(names, writers, strict=True)}
    finally:
        for writer in writers:
            writer.abort()
    if sum(split.text_bytes for split in splits.values()) != total:
        raise ValueError("the corpus changed while it was read; run the command again")

    trained = given is None
    manifest = Manifest(
        format="dnt-shards",
        version=1,
        dtype=dtype,
        seq_len=options.seq_len,
        tokenizer=TokenizerInfo(
            file="tokenizer.model",
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            round_trip=round_trip,
        ),
        eos_id=tokenizer.eos_id,
        options=Options(
            vocab_size=options.vocab_size if trained else None,
            kind=options.kind if trained else None,
            sample_bytes=_sample_bytes(options) if trained else None,
            val_fraction=options.val_fraction,
            shard_bytes=options.shard_bytes,
        ),
        sources=tuple(
            SourceInfo(
                name=source.name,
                documents=count.documents,
                text_bytes=count.text_bytes,
                replaced=count.replaced,
                empty=count.empty,
            )
            for source, count in zip(sources, counts, strict=True)
        ),
        splits=splits,
    )
    shards.write_manifest(folder, manifest)
    return manifest


def _survey(
    options: PrepareOptions, sources: list[Source], given: bool, console: Console
) -> tuple[list[Counts], list[str]]:
    """Read the corpus once: its counts for each source, and a sample of what is not held out."""
    counts = [Counts() for _ in sources]

    def texts(advance: Callable[[int], None]) -> Iterator[str]:
        for source, count in zip(sources, counts, strict=True):
            for _, text in read_documents(source, count):
                advance(len(text.encode()))
                if not held_out(text, options.val_fraction):
                    yield text

    with _stage(console, "read", None) as advance:
        chosen = sample(texts(advance), ROUND_TRIP_BYTES if given else _sample_bytes(options))
    documents, empty = sum(count.documents for count in counts), sum(count.empty for count in counts)
    if not documents:
        raise ValueError(f"the corpus is empty: no text in the input ({empty} empty documents); give some text")
    if not chosen:
        raise ValueError(
            f"all {documents} documents are held out, none is left to train on; use a smaller --val-fraction"
        )
    replaced = sum(count.replaced for count in counts)
    notes = f", {replaced:,} with broken UTF-8 (now U+FFFD)" if replaced else ""
    notes += f", {empty:,} empty left out" if empty else ""
    console.print(
        f"         {documents:,} documents from {len(sources):,} {'source' if len(sources) == 1 else 'sources'}{notes}",
        highlight=False,
    )
    return counts, chosen


def _sample_bytes(options: PrepareOptions) -> int:
    return options.sample_bytes or SAMPLE_BYTES[options.kind]


def _round_trips(tokenizer: Tokenizer, texts: list[str]) -> bool:
    checked = 0
    for text in texts:
        if tokenizer.decode(tokenizer.encode(text)) != text:
            return False
        checked += len(text)
        if checked > ROUND_TRIP_BYTES:
            break
    return True


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts of about BATCH_BYTES together."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_all(
    tokenizer: Tokenizer, model: Path, options: PrepareOptions, batches: Iterable[list[str]]
) -> Generator[tuple[Encoded, Encoded]]:
    """The encoded batches, in order, over `options.workers` processes, with a bounded number under way."""
    workers = options.workers or _cpus()
    if workers == 1:
        for batch in batches:
            yield _encode(tokenizer, options.val_fraction, batch)
        return
    # Never a plain fork: the process that forks may hold threads, of rich and perhaps of torch.
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (model, options.val_fraction))
    try:
        under_way: deque[Future[tuple[Encoded, Encoded]]] = deque()
        for batch in batches:
            under_way.append(pool.submit(_encode_in_worker, batch))
            if len(under_way) >= 3 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _cpus() -> int:
    # What SLURM or a container allows may be less than what the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_worker: tuple[Tokenizer, float]


def _start_worker(model: Path, val_fraction: float) -> None:
    global _worker
    # Ctrl-C reaches the whole group; the main process alone acts on it. If that is killed, its workers go too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent
    threading.Thread(target=_die_after, args=(parent,), daemon=True).start()
    _worker = Tokenizer.load(model), val_fraction


def _die_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> tuple[Encoded, Encoded]:
    return _encode(*_worker, texts)


def _encode(tokenizer: Tokenizer, val_fraction: float, texts: list[str]) -> tuple[Encoded, Encoded]:
    """The texts' ids, those to train on and those held out."""
    ids: tuple[list[Tokens], list[Tokens]] = ([], [])
    documents, text_bytes = [0, 0], [0, 0]
    dtype = shards.dtype_for(tokenizer.vocab_size)
    for text in texts:
        side = int(held_out(text, val_fraction))
        ids[side].append(np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype))
        documents[side] += 1
        text_bytes[side] += len(text.encode())
    train_part, val_part = (
        Encoded(np.concatenate([np.empty(0, dtype), *ids[side]]), documents[side], text_bytes[side]) for side in (0, 1)
    )
    return train_part, val_part


def _check_options(options: PrepareOptions) -> None:
    limits = [
        ("seq_len", options.seq_len, 1, 1_000_000),
        ("vocab_size", options.vocab_size, 1, 10_000_000),
        ("workers", options.workers, 1, 1024),
        ("shard_bytes", options.shard_bytes, 1, 1 << 40),
        ("sample_bytes", options.sample_bytes, 1, 1 << 40),
    ]
    for name, value, low, high in limits:
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name}: found {value}, expected {low} to {high}")
    if not 0 <= options.val_fraction < 1:
        raise ValueError(f"val_fraction: found {options.val_fraction}, expected 0 (no validation split) to below 1")
    if options.kind not in ("bpe", "unigram"):
        raise ValueError(f"kind: found {options.kind!r}, expected 'bpe' or 'unigram'")


@contextlib.contextmanager
def _all_or_nothing(out: Path) -> Iterator[Path]:
    """A folder to write in, whose files move to `out` at the end, the manifest last; after an error all is gone."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file, expected a folder or a new name; choose another --out")
    _refuse_a_set(out)
    partial = out / PARTIAL
    if (ours := _our_files(out)) and not partial.exists():
        raise ValueError(f"{out}: holds {ours[0].name} but no {shards.MANIFEST}; move it away or choose another --out")
    created = not out.exists()
    moved: list[Path] = []
    with contextlib.ExitStack() as stack:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((partial / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{out}: another process is preparing a set here; choose another --out") from error
        except OSError:
            _remove(partial, out if created else None)
            raise
        try:
            _refuse_a_set(out)  # another run may have ended between the first look and the lock
            # Remains of a run that was killed, even in the middle of its last moves.
            for path in (*_our_files(out), *(p for p in partial.iterdir() if p.name != "lock")):
                path.unlink()
            yield partial
            names = sorted(p.name for p in partial.iterdir() if p.name not in ("lock", shards.MANIFEST))
            for name in (*names, shards.MANIFEST):
                if name == shards.MANIFEST:
                    _sync(out)
                moved.append(out / name)
                (partial / name).rename(out / name)
            _sync(out)
        except BaseException:
            for path in reversed(moved):
                path.unlink(missing_ok=True)
            _remove(partial, out if created else None)
            raise
        _remove(partial, None)


def _refuse_a_set(out: Path) -> None:
    if (out / shards.MANIFEST).exists():
        raise ValueError(f"{out}: already holds a prepared set; choose another --out, or delete that one first")


def _our_files(out: Path) -> list[Path]:
    return [path for path in out.iterdir() if OUR_FILES.fullmatch(path.name)] if out.is_dir() else []


def _remove(partial: Path, empty: Path | None) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    if empty:
        with contextlib.suppress(OSError):
            empty.rmdir()


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Rate(ProgressColumn):
    """MB/s of text, and tokens/s where they are counted."""

    def render(self, task: Task) -> Text:
        return Text(_rate(int(task.completed), task.fields["tokens"], task.elapsed or 0.0))


class _Advance:
    """Called with the bytes, and perhaps the tokens, that went through since the last call."""

    def __init__(self, show: Callable[[int, int], None]):
        self.bytes = self.tokens = 0
        self._show = show

    def __call__(self, size: int, tokens: int = 0) -> None:
        self.bytes += size
        self.tokens += tokens
        self._show(self.bytes, self.tokens)


@contextlib.contextmanager
def _stage(console: Console, name: str, total: int | None) -> Iterator[_Advance]:
    """A progress bar on a terminal; a line when the stage ends, anywhere."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        _Rate(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(f"{name:8}", total=total, tokens=0)
    advance = _Advance(lambda size, tokens: bar.update(task, completed=size, tokens=tokens))
    start = time.monotonic()
    with bar:
        yield advance
    seconds = time.monotonic() - start
    line = f"{name:8} {advance.bytes / 1e6:,.1f} MB in {seconds:.1f} s, {_rate(advance.bytes, advance.tokens, seconds)}"
    console.print(line, highlight=False)


def _rate(size: int, tokens: int, seconds: float) -> str:
    per_second = 1 / max(seconds, 1e-3)
    text = f"{size * per_second / 1e6:,.1f} MB/s"
    return f"{text}, {tokens * per_second:,.0f} tokens/s" if tokens else text
