"""From a corpus to a set of shards: plan, learn a tokenizer, tokenise in chunks, remove duplicates,
pack, publish.

Each stage leaves its result in the work folder under a name that is a hash of all it was made from
(data_prep.work_folder). So a rerun after kill -9 goes on where it was, and the N tasks of one plan
are N processes that fill the same folder.
"""

import contextlib
import dataclasses
import hashlib
import heapq
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from data_prep import shards
from data_prep.chunks import Recipe, make_chunks
from data_prep.clean.cleaner import CleanConfig, read_rules
from data_prep.files import write_whole
from data_prep.finish import finish
from data_prep.options import PrepareOptions, checked, sample_bytes, workers
from data_prep.read.documents import Findings, LeftOut
from data_prep.read.inputs import InputSource, find_sources, plan_units
from data_prep.read.pieces import Unit, stored_bytes
from data_prep.report.markup import visible
from data_prep.report.models import format_left_out
from data_prep.shards import (
    Manifest,
)
from data_prep.tokenizer import FastPathDiffers, Tokenizer
from data_prep.train_tokenizer import TokenizerSpec, find_or_train
from data_prep.work_folder import key, spool_stdin, work_folder


def prepare(options: PrepareOptions, console: Console | None = None) -> Manifest | None:
    """Make a set of shards in `options.out`, which appears whole or not at all; progress goes to
    stderr.

    What is finished is kept through Ctrl-C, kill -9 and errors: the same call goes on from there,
    to the same bytes. Returns the manifest, or None for a task.

    Raises ValueError, in one or two lines, for: bad options or input, a folder that already holds a
    set, a corpus that is empty or smaller than one row, a vocabulary that the corpus does not
    support, a full disk.
    """
    console = console or Console(stderr=True)
    base = shards.load_manifest(options.append) if options.append else None
    options = checked(options, base)
    rules = read_rules(options.rules) if options.rules else None
    if base and rules is None and any(source.rules for source in base.sources):
        raise ValueError(
            f"clean: {options.append} was cleaned by rules; give them, or others, or --clean none"
        )
    out = Path(options.out)
    with work_folder(out, shared=options.task is not None) as work:
        inputs = [spool_stdin(work) if str(item) == "-" else item for item in options.inputs]
        sources = find_sources(inputs, out)
        units = plan_units(sources)
        model = _given_tokenizer(work, options)
        with _print_left_out_on_error(sources, console) as left_out:
            model = model or find_or_train(
                work, tokenizer_spec(options, rules), units, workers(options), console, left_out
            )
        recipe = recipe_of(options, rules, model)
        _print_reused_parts(work, recipe.folders(work, units), console)
        try:
            chunks = _make_chunks(work, options, recipe, units, console)
        except FastPathDiffers as difference:
            warning = f"warning: {difference}; kitoken is given up for SentencePiece"
            console.print(warning, highlight=False, markup=False)
            recipe = dataclasses.replace(recipe, encoder="sentencepiece")
            chunks = _make_chunks(work, options, recipe, units, console)
        if options.task:
            console.print(
                f"task {options.task[0]} of {options.task[1]} is done; when all are, the same "
                f"command without --task makes the set in {escape(visible(str(out)))}",
                highlight=False,
            )
            return None
        if plan_units(find_sources(inputs, out)) != units:
            raise ValueError("the corpus changed while it was read; run the command again")
        manifest = finish(work, options, base, recipe, sources, units, chunks, console)
    rows = ", ".join(f"{split.rows:,} {name} rows" for name, split in manifest.splits.items())
    console.print(
        f"wrote     {escape(visible(str(out)))}: {rows} of {manifest.seq_len} tokens",
        highlight=False,
    )
    return manifest


def train_tokenizer(
    options: PrepareOptions, model: Path, console: Console | None = None
) -> Tokenizer:
    """Train a tokenizer as `prepare` would with these options, and write it to `model`.

    Raises ValueError as `prepare` does, and if `model` exists.
    """
    console = console or Console(stderr=True)
    options = checked(options, None)
    rules = read_rules(options.rules) if options.rules else None
    if model.exists():
        raise ValueError(f"{model}: exists already; choose another name, or delete it first")
    with work_folder(Path(options.out)) as work:
        inputs = [spool_stdin(work) if str(item) == "-" else item for item in options.inputs]
        sources = find_sources(inputs, Path(options.out))
        left_out = found_before_reading(sources)
        learnt = find_or_train(
            work,
            tokenizer_spec(options, rules),
            plan_units(sources),
            workers(options),
            console,
            left_out,
        )
        shutil.move(learnt, model)
        shutil.rmtree(work)
    print_left_out(left_out, console)
    # A folder that an earlier run has left is not this one's to remove.
    with contextlib.suppress(OSError):
        Path(options.out).rmdir()
    return Tokenizer.load(model)


def train_tokenizer_first(options: PrepareOptions, console: Console | None = None) -> None:
    """Train the tokenizer in the work folder, where `prepare` and its tasks with the same options
    then find it.

    Raises ValueError as `prepare` does.
    """
    options = checked(options, None)
    rules = read_rules(options.rules) if options.rules else None
    with work_folder(Path(options.out)) as work:
        units = plan_units(find_sources(options.inputs))
        find_or_train(
            work,
            tokenizer_spec(options, rules),
            units,
            workers(options),
            console or Console(stderr=True),
        )


def count_units(options: PrepareOptions) -> int:
    """Return how many units the input has, once nothing that is known before it is read speaks
    against preparing it. Raises ValueError as `prepare` does."""
    checked(options, shards.load_manifest(options.append) if options.append else None)
    if options.rules:
        read_rules(options.rules)
    return len(plan_units(find_sources(options.inputs)))


def found_before_reading(sources: Sequence[InputSource]) -> LeftOut:
    """Return what the sources pass over."""
    passed, left_out = Findings(), LeftOut()
    for source in sources:
        for finding in source.passed:
            passed.add(finding)
    left_out.add(passed)
    return left_out


def print_left_out(left_out: LeftOut, console: Console) -> None:
    """Print a line of it, if there is anything to tell."""
    if line := format_left_out(left_out.counts, left_out.named):
        console.print(f"note      {visible(line)}", highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def _print_left_out_on_error(sources: Sequence[InputSource], console: Console) -> Iterator[LeftOut]:
    """Print what is left out if the block fails: it explains many an error, and there will be no
    summary to tell it."""
    left_out = found_before_reading(sources)
    try:
        yield left_out
    except ValueError:
        print_left_out(left_out, console)
        raise


def _given_tokenizer(work: Path, options: PrepareOptions) -> Path | None:
    """Copy the tokenizer that was given: the file itself may change while the set is made."""
    if options.tokenizer is None:
        return None
    model = options.tokenizer.read_bytes()
    copy = work / f"given-{key(hashlib.sha256(model).hexdigest())}.model"
    write_whole(copy, lambda beside: beside.write_bytes(model))
    return copy


def tokenizer_spec(options: PrepareOptions, rules: CleanConfig | None) -> TokenizerSpec:
    """Return what decides the tokenizer that is trained."""
    return TokenizerSpec(
        options.kind,
        options.vocab_size,
        sample_bytes(options),
        options.text_field,
        options.val_fraction,
        rules,
        options.strict,
    )


def recipe_of(options: PrepareOptions, rules: CleanConfig | None, model: Path) -> Recipe:
    """Return what decides the chunks."""
    return Recipe(
        model,
        options.encoder,
        options.text_field,
        options.val_fraction,
        rules,
        options.dedup,
        options.strict,
    )


def units_of_task(units: Sequence[Unit], task: int, tasks: int) -> list[int]:
    """Return which units are in one of `tasks` parts of about equal size, the same for every task
    that asks."""
    parts: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(tasks)]
    # Some web servers do not tell how large their files are.
    sizes = [max(1, stored_bytes(unit)) for unit in units]
    for number in sorted(range(len(units)), key=lambda number: -sizes[number]):
        size, part, numbers = heapq.heappop(parts)
        numbers.append(number)
        heapq.heappush(parts, (size + sizes[number], part, numbers))
    [mine] = (numbers for _, part, numbers in parts if part == task)
    return sorted(mine)


def _make_chunks(
    work: Path, options: PrepareOptions, recipe: Recipe, units: Sequence[Unit], console: Console
) -> list[list[Path]]:
    """Make the chunks of all units, or of the task's."""
    mine = units_of_task(units, *options.task) if options.task else list(range(len(units)))
    folders = recipe.folders(work, units)
    return make_chunks(
        recipe, [units[i] for i in mine], [folders[i] for i in mine], workers(options), console
    )


def _print_reused_parts(work: Path, folders: Sequence[Path], console: Console) -> None:
    """Print how many finished parts in the work folder are reused, and that others do not fit."""
    there = {folder for folder in (work / "chunks").glob("*") if any(folder.glob("*.npz"))}
    if reused := sum(len(list(folder.glob("*.npz"))) for folder in there.intersection(folders)):
        console.print(
            f"reusing {reused:,} finished parts of an earlier run or of tasks",
            highlight=False,
        )
    if others := there.difference(folders):
        console.print(
            f"warning: finished parts of {len(others):,} units in {work} are of another input, "
            "other options or other library versions, and are not used; if that is not meant, "
            "stop and give the same options",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
