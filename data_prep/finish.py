"""From finished chunks to a published set: duplicates, statistics, shards, manifest, report."""

import dataclasses
import functools
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from rich.console import Console

from data_prep import shards
from data_prep.arrays import Array
from data_prep.chunks import Chunk, Recipe
from data_prep.corpus_stats import SPLITS, CorpusStats, DuplicateFiles, count_corpus
from data_prep.files import sha256_of, sync, write_whole
from data_prep.options import PrepareOptions, sample_bytes, workers
from data_prep.pack import Layout, StreamSlice, shard_jobs, shard_writer, tail
from data_prep.process_pool import ordered_map
from data_prep.progress import stage
from data_prep.read.documents import place_name
from data_prep.read.inputs import InputSource, unused
from data_prep.read.pieces import Unit
from data_prep.report.html_page import write_report
from data_prep.report.models import format_summary
from data_prep.report.summary import make_report
from data_prep.set_files import link_file
from data_prep.shards import (
    Manifest,
    Options,
    Shard,
    SourceInfo,
    Split,
    SplitName,
    TokenizerInfo,
)
from data_prep.tokenizer import Tokenizer
from data_prep.train_tokenizer import LOSING
from data_prep.work_folder import key, publish

REJECTS = "rejects.jsonl"
PROCESS_BYTES = 128 << 20


def finish(
    work: Path,
    options: PrepareOptions,
    base: Manifest | None,
    recipe: Recipe,
    sources: Sequence[InputSource],
    units: Sequence[Unit],
    chunks: list[list[Path]],
    console: Console,
) -> Manifest:
    """Make chunks a published set: duplicates, statistics, shards, manifest, report."""
    paths = list(itertools.chain.from_iterable(chunks))
    tokenizer = Tokenizer.load(recipe.model)
    duplicates = _deduplicate(work, options, base, paths, console)
    layout = Layout(
        options.packing,
        options.seq_len,
        tokenizer.eos_id,
        shards.dtype_for(tokenizer.vocab_size),
        options.shard_bytes,
        duplicates.keep if duplicates else None,
    )
    folder = work / f"set-{_key_of_set(work, layout, options, base, paths)}"
    folder.mkdir(exist_ok=True)
    near = np.load(duplicates.near, mmap_mode="r") if duplicates else None
    names = SPLITS if options.val_fraction else SPLITS[:1]
    rejects = folder / REJECTS
    with stage(console, "count", len(paths), "chunks") as advance:
        counted = count_corpus(sources, units, chunks, layout, near, names, rejects, advance)
    if not any(source.documents for source in counted.sources.values()) and not base:
        raise ValueError(_nothing_left(counted))
    splits = _pack(folder, layout, options, base, counted, console)
    write_whole(folder / shards.TOKENIZER, lambda beside: shutil.copyfile(recipe.model, beside))
    if duplicates:
        _write_fingerprints(folder, options, base, layout, paths)
    manifest = _make_manifest(folder, options, base, recipe, tokenizer, counted, splits)
    if counted.checked["inexact"]:
        console.print(
            "warning: this tokenizer does not decode to exactly the text that goes in (it "
            "normalises, or lacks characters); the manifest records that"
        )
    report = make_report(options, recipe, manifest, counted, duplicates, tokenizer)
    write_report(folder, report)
    _publish(folder, Path(options.out), manifest)
    console.print(format_summary(report), highlight=False, markup=False, soft_wrap=True)
    return manifest


def _key_of_set(
    work: Path,
    layout: Layout,
    options: PrepareOptions,
    base: Manifest | None,
    paths: Sequence[Path],
) -> str:
    """Return a name for all that decides the shards of a set."""
    decided = dataclasses.asdict(layout) | {"keep": layout.keep and layout.keep.name}
    chunks = [_name_below(work, path) for path in paths]
    return key(decided, _identity_of_base(options, base), chunks)


def _make_manifest(
    folder: Path,
    options: PrepareOptions,
    base: Manifest | None,
    recipe: Recipe,
    tokenizer: Tokenizer,
    counted: CorpusStats,
    splits: dict[SplitName, Split],
) -> Manifest:
    """Return the manifest of the set in `folder`, checked against itself."""
    is_exact = not counted.checked["inexact"]
    fingerprints = folder / shards.FINGERPRINTS
    return Manifest(
        format="dnt-shards",
        version=1,
        dtype=shards.dtype_for(tokenizer.vocab_size),
        seq_len=options.seq_len,
        packing=options.packing,
        tokenizer=TokenizerInfo(
            file="tokenizer.model",
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            round_trip=is_exact and (base is None or base.tokenizer.round_trip),
        ),
        eos_id=tokenizer.eos_id,
        options=base.options if base else _manifest_options(options),
        sources=(*(base.sources if base else ()), *_source_infos(options, recipe, base, counted)),
        fingerprints=sha256_of(fingerprints) if options.dedup != "none" else None,
        splits=splits,
    )


def _publish(folder: Path, out: Path, manifest: Manifest) -> None:
    """Put a whole set in place, once all of it is on disk; the manifest comes last."""
    names = [shard.file for split in manifest.splits.values() for shard in split.shards]
    others = [shards.TOKENIZER, REJECTS, "report.html", "report.json"]
    others += [shards.FINGERPRINTS] if manifest.fingerprints else []
    for name in others:  # tars are synced as they are written
        sync(folder / name)
    shards.write_manifest(folder, manifest)
    publish(out, [folder / name for name in names + others], folder / shards.MANIFEST)


def _deduplicate(
    work: Path,
    options: PrepareOptions,
    base: Manifest | None,
    paths: Sequence[Path],
    console: Console,
) -> DuplicateFiles | None:
    """Find which documents stay, where that is asked for; those of a set that is appended to come
    first of all."""
    if options.dedup == "none":
        return None
    name = key(
        options.dedup, _identity_of_base(options, base), [_name_below(work, path) for path in paths]
    )
    original, keep, near = (work / f"{what}-{name}.npy" for what in ("original", "keep", "near"))
    facts = work / f"duplicates-{name}.json"
    if facts.exists():
        return DuplicateFiles(original, keep, near, json.loads(facts.read_text()))
    from data_prep.dedup import find_duplicates

    earlier = (
        np.load(options.append / shards.FINGERPRINTS, mmap_mode="r")
        if base and options.append
        else None
    )
    parts = (Chunk(path)["fingerprints"] for path in paths)
    scratch = work / "dedup"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    with stage(console, "dedup", None, "comparisons") as advance:
        found = find_duplicates(
            itertools.chain([] if earlier is None else [earlier], parts),
            scratch,
            near=options.dedup == "near",
            progress=advance,
        )
    before = len(earlier) if earlier is not None else 0
    write_whole(original, lambda beside: _write_array(beside, found.original))
    write_whole(keep, lambda beside: _write_array(beside, found.original[before:] < 0))
    write_whole(near, lambda beside: _write_array(beside, found.is_near[before:]))
    numbers = {"before": before, "clusters": found.clusters, "largest": found.largest}
    write_whole(facts, lambda beside: beside.write_text(json.dumps(numbers)))
    shutil.rmtree(scratch)
    return DuplicateFiles(original, keep, near, json.loads(facts.read_text()))


def _pack(
    folder: Path,
    layout: Layout,
    options: PrepareOptions,
    base: Manifest | None,
    counted: CorpusStats,
    console: Console,
) -> dict[SplitName, Split]:
    """Write the shards of each split; a set that is appended to gives its own, but for the last of
    each split."""
    jobs = {}
    parts: dict[SplitName, list[StreamSlice]] = {}
    for name, new in counted.parts.items():
        before = base.splits[name] if base else None
        lead = _lead(folder, layout, options, base, name)
        parts[name] = [lead, *new]
        whole = before.shards[:-1] if before else ()
        for shard in whole:
            assert options.append
            link_file(options.append / shard.file, folder / shard.file)
        blocks = sum(len(shard.members) for shard in whole)
        jobs[name] = shard_jobs(layout, folder, name, parts[name], len(whole), blocks)
        if not jobs[name]:
            raise ValueError(_too_short(name, layout, options, counted))
    every = [job for name in jobs for job in jobs[name]]
    written: dict[SplitName, list[Shard]] = {name: [] for name in jobs}
    row_bytes = (layout.seq_len + 1) * np.dtype(layout.dtype).itemsize
    # A process takes longer to start than a small set to write.
    processes = min(
        workers(options),
        len(every),
        1 + sum(job.rows for job in every) * row_bytes // PROCESS_BYTES,
    )
    with (
        stage(console, "pack", sum(job.rows for job in every) * row_bytes) as advance,
        closing(ordered_map(functools.partial(shard_writer, layout), every, processes)) as results,
    ):
        for job, shard in zip(every, results, strict=True):
            written[job.split].append(shard)
            advance(job.rows * row_bytes)
    splits: dict[SplitName, Split] = {}
    for name, made in written.items():
        before = base.splits[name] if base else None
        totals = counted.splits[name]
        all_shards = (*(before.shards[:-1] if before else ()), *made)
        rows = sum(shard.rows for shard in all_shards)
        left = tuple(tail(layout, name, parts[name]).tolist()) if layout.packing == "concat" else ()
        splits[name] = Split(
            documents=totals.documents + (before.documents if before else 0),
            tokens=totals.tokens + (before.tokens if before else 0),
            text_bytes=totals.text_bytes + (before.text_bytes if before else 0),
            rows=rows,
            tail=left,
            shards=all_shards,
        )
    return splits


def _lead(
    folder: Path, layout: Layout, options: PrepareOptions, base: Manifest | None, name: SplitName
) -> StreamSlice:
    """Write what a split's stream begins with: eos, or the last shard and the tail of the set that
    is appended to."""
    dtype = np.dtype(layout.dtype)
    lead = np.array([layout.eos_id] if layout.packing == "concat" else [], dtype)
    if base and options.append:
        before = base.splits[name]
        tokens = shards.shard_stream(options.append, base, before.shards[-1])
        lead = np.concatenate([*tokens, np.array(before.tail, dtype)])
    path = folder / f"lead-{name}.npy"
    write_whole(path, lambda beside: _write_array(beside, lead))
    return StreamSlice(path, 0, len(lead))


def _write_fingerprints(
    folder: Path,
    options: PrepareOptions,
    base: Manifest | None,
    layout: Layout,
    paths: Sequence[Path],
) -> None:
    """Write the fingerprints of all documents of the set, for what may be appended to it."""
    from data_prep.dedup import FINGERPRINT

    assert layout.keep
    keep = np.load(layout.keep, mmap_mode="r")
    earlier = (
        np.load(options.append / shards.FINGERPRINTS, mmap_mode="r")
        if base and options.append
        else []
    )

    def write(path: Path) -> None:
        total = len(earlier) + int(np.count_nonzero(keep))
        array = np.lib.format.open_memmap(path, mode="w+", dtype=FINGERPRINT, shape=(total,))
        array[: len(earlier)] = earlier
        at, first = len(earlier), 0
        for chunk in paths:
            new = Chunk(chunk)["fingerprints"]
            stay = new[keep[first : first + len(new)]]
            array[at : at + len(stay)] = stay
            at, first = at + len(stay), first + len(new)
        array.flush()

    write_whole(folder / shards.FINGERPRINTS, write)


def _manifest_options(options: PrepareOptions) -> Options:
    trained = options.tokenizer is None
    return Options(
        vocab_size=options.vocab_size if trained else None,
        kind=options.kind if trained else None,
        sample_bytes=sample_bytes(options) if trained else None,
        val_fraction=options.val_fraction,
        shard_bytes=options.shard_bytes,
        dedup=options.dedup,
    )


def _source_infos(
    options: PrepareOptions, recipe: Recipe, base: Manifest | None, counted: CorpusStats
) -> Iterator[SourceInfo]:
    rules = recipe.rules.fingerprint() if recipe.rules else None
    used = {source.name: 1 for source in base.sources} if base else {}
    for name, source in counted.sources.items():
        yield SourceInfo(
            name=unused(name, used),
            text_field=options.text_field,
            documents=source.documents,
            text_bytes=source.text_bytes,
            replaced=source.findings["broken_utf8"] + source.findings["lone_surrogate"],
            empty=source.findings["empty"],
            dropped=source.dropped,
            duplicates=source.exact + source.near,
            rules=rules,
        )


def _nothing_left(counted: CorpusStats) -> str:
    sources = counted.sources.values()
    read, empty = (
        sum(source.read for source in sources),
        sum(source.findings["empty"] for source in sources),
    )
    dropped = sum((Counter(source.dropped) for source in sources), Counter[str]())
    if not read:
        lost = next((record for record in counted.rejects if record["kind"] in LOSING), None)
        found = (
            f"{place_name(lost['file'], lost['line'])}: {lost['detail']}"
            if lost
            else f"{empty} empty documents"
        )
        return (
            f"the corpus is empty: no text in the input ({found}); name another --text-field, or "
            f"give some text"
        )
    by_rule = ", ".join(f"{count:,} dropped by {rule}" for rule, count in dropped.items())
    return (
        f"none of the {read:,} documents is left ({by_rule}); use other --clean rules or more text"
    )


def _too_short(
    name: SplitName, layout: Layout, options: PrepareOptions, counted: CorpusStats
) -> str:
    """Say that a split has not one whole row, and what may help."""
    totals, documents = (
        counted.splits[name],
        sum(total.documents for total in counted.splits.values()),
    )
    found = (
        f"the {name} split has {totals.tokens} tokens in {totals.documents} documents of "
        f"{documents:,}"
    )
    another = (
        "a smaller"
        if name == "train"
        else f"a larger (such as {min(0.5, max(0.01, 4 / max(documents, 1))):.2g}, or 0)"
    )
    advice = [] if options.val_fraction == 0 else [f"{another} --val-fraction"]
    if totals.documents:
        advice = ["more text", "a smaller --seq-len", *advice]
    return f"{found}, but one row needs {layout.seq_len}; give {', or '.join(advice)}"


def _identity_of_base(options: PrepareOptions, base: Manifest | None) -> str | None:
    return shards.manifest_sha256(options.append) if base and options.append else None


def _name_below(work: Path, path: Path) -> str:
    return path.relative_to(work).as_posix()


def _write_array(path: Path, array: Array) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
