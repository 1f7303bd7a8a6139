"""What a person asks of a set or of a plan: `dnt data info`, `verify`, and `prepare --dry-run`."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep import shards
from data_prep.clean.cleaner import read_rules
from data_prep.options import PrepareOptions, checked, sample_bytes, workers
from data_prep.pipeline import found_before_reading, print_left_out, recipe_of, units_of_task
from data_prep.progress import stage
from data_prep.read.documents import Findings
from data_prep.read.inputs import find_sources, plan_units
from data_prep.read.pieces import Unit, first_findings, stored_bytes
from data_prep.read.streams import is_url
from data_prep.report.markup import visible
from data_prep.shards import PARTIAL
from data_prep.verify import verify as verify_set


def verify_with_progress(folder: Path, console: Console | None = None) -> list[str]:
    """Run `verify.verify` with a progress line on stderr, and return the problems, a line each, or
    []."""
    console = console or Console(stderr=True)
    total = sum(path.stat().st_size for path in Path(folder).glob("*.tar"))
    with stage(console, "verify", total) as advance:
        return verify_set(folder, advance)


def print_info(folder: Path, console: Console | None = None) -> None:
    """Print a table of what a set holds, on stdout. Raises ValueError as `load_manifest` does."""
    folder = Path(folder)
    manifest = shards.load_manifest(folder)
    table = _table(
        "split",
        "documents",
        "text MB",
        "tokens",
        "rows",
        "shards",
        "MB",
        "B/token",
        title=escape(visible(str(folder))),
    )
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
    exact = (
        "decodes to exactly the text"
        if tokenizer.round_trip
        else "does NOT decode to exactly the text"
    )
    lines = [
        f"row        {manifest.seq_len} + 1 tokens of {manifest.dtype}, "
        f"packed by {manifest.packing}",
        f"tokenizer  {tokenizer.vocab_size:,} pieces ({origin}); {exact}",
        f"manifest   sha256 {shards.manifest_sha256(folder)}",
    ]
    for source in manifest.sources[:20]:
        notes = f", {source.replaced:,} with broken UTF-8" if source.replaced else ""
        notes += f", {source.empty:,} empty left out" if source.empty else ""
        notes += "".join(f", {count:,} dropped by {rule}" for rule, count in source.dropped.items())
        notes += f", {source.duplicates:,} duplicates left out" if source.duplicates else ""
        kept = f"{source.documents:,} documents, {source.text_bytes / 1e6:,.1f} MB"
        lines.append(f"source     {visible(source.name)}: {kept}{notes}")
    if more := len(manifest.sources) - 20:
        lines += [f"           and {more:,} more"] if more > 0 else []
    console = console or Console()
    console.print(table)
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def print_plan(options: PrepareOptions, console: Console | None = None) -> None:
    """Print what `prepare` would do, on stdout, and write nothing. Raises ValueError for options
    and input."""
    if (options.out / shards.MANIFEST).exists():
        raise ValueError(
            f"{options.out}: already holds a prepared set; choose another --out, or delete that "
            "one first"
        )
    base = shards.load_manifest(options.append) if options.append else None
    options = checked(options, base)
    inputs = [item for item in options.inputs if str(item) != "-"]
    sources = find_sources(inputs, options.out) if inputs else []
    units = plan_units(sources)
    table = _table("source", "files", "stored MB", "units", title="input")
    for source in sources:
        here = [unit for unit in units if unit.source == source.name]
        stored = sum(map(stored_bytes, here)) / 1e6
        table.add_row(
            escape(source.name), f"{len(source.files):,}", f"{stored:,.1f}", f"{len(here):,}"
        )
    tokenizer = visible(str(options.tokenizer)) if options.tokenizer else None
    learned = (
        f"train {options.kind} of {options.vocab_size:,} pieces on "
        f"{sample_bytes(options) / 1e6:,.0f} MB"
    )
    rules = read_rules(options.rules) if options.rules else None
    lines = [
        f"tokenizer  {tokenizer or learned}; encoded by {options.encoder}",
        f"clean      {', '.join(name for name, _ in rules.rules) if rules else 'none'}",
        f"dedup      {options.dedup}",
        f"pack       {options.packing}, rows of {options.seq_len} + 1 tokens, "
        f"{options.val_fraction:.2%} held out",
        f"work       {workers(options)} processes in {visible(str(options.out / PARTIAL))}",
    ]
    if options.tokenizer:
        recipe = recipe_of(options, rules, options.tokenizer)
        folders = recipe.folders(options.out / PARTIAL, units)
        done = sum((folder / "whole.json").exists() for folder in folders)
        lines += [f"done       {done:,} of {len(units):,} units by an earlier run"] if done else []
    if options.task:
        mine = [units[i] for i in units_of_task(units, *options.task)]
        lines.append(
            f"task       {options.task[0]} of {options.task[1]}: {len(mine):,} units, "
            f"{sum(map(stored_bytes, mine)) / 1e6:,.1f} MB stored"
        )
    console = console or Console()
    console.print(table)
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    left_out = found_before_reading(sources)
    left_out.add(_by_their_beginnings(units, options.text_field))
    print_left_out(left_out, console)
    console.print("nothing was written")


def _by_their_beginnings(units: Sequence[Unit], text_field: str) -> Findings:
    """Find which files are hardly the text that was meant, as far as their first bytes tell. URLs
    are not fetched."""
    findings = Findings()
    for unit in units:
        for file in unit.files:
            for finding in (
                () if unit.start or is_url(file.path) else first_findings(file, text_field)
            ):
                findings.add(finding)
    return findings


def _table(*columns: str, title: str) -> Table:
    table = Table(*columns, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    return table
