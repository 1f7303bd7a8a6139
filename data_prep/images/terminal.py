"""What a person asks of an image set or of a plan: `dnt data info`, `verify`, and `images
--dry-run`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.images.chunks import recipe_of
from data_prep.images.findings import KINDS
from data_prep.images.inputs import ImageInput, all_units, find_inputs
from data_prep.images.options import ImageOptions, checked
from data_prep.images.shards import ImageSetOptions, load_manifest, manifest_sha256
from data_prep.images.verify import verify
from data_prep.pipeline import units_of_task
from data_prep.progress import stage
from data_prep.read.pieces import stored_bytes
from data_prep.report.markup import visible
from data_prep.set_files import MANIFEST, PARTIAL

MOST_CLASSES = 20


def verify_with_progress(folder: Path, console: Console | None = None) -> list[str]:
    """Run `verify` with a progress line on stderr, and return the problems, a line each, or []."""
    console = console or Console(stderr=True)
    total = sum(path.stat().st_size for path in Path(folder).glob("*.tar"))
    with stage(console, "verify", total) as advance:
        return verify(folder, advance)


def print_info(folder: Path, console: Console | None = None) -> None:
    """Print what an image set holds, on stdout. Raises ValueError as `load_manifest` does."""
    manifest = load_manifest(Path(folder))
    table = Table("split", "images", "image MB", "shards", "MB", title=escape(visible(str(folder))))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, split in manifest.splits.items():
        stored = sum(shard.bytes for shard in split.shards)
        table.add_row(
            name,
            f"{split.images:,}",
            f"{split.image_bytes / 1e6:,.1f}",
            f"{len(split.shards):,}",
            f"{stored / 1e6:,.1f}",
        )
    stats = manifest.statistics
    lines = [
        f"stored     {_stored_as(manifest.options)}",
        f"mean       {', '.join(f'{value:.4f}' for value in stats.mean)}",
        f"deviation  {', '.join(f'{value:.4f}' for value in stats.std)}",
        f"manifest   sha256 {manifest_sha256(Path(folder))}",
    ]
    for source in manifest.sources:
        notes = "".join(
            f", {count:,} {kind} {KINDS[kind][0]}" for kind, count in source.findings.items()
        )
        notes += f", {source.duplicates:,} duplicates left out" if source.duplicates else ""
        lines.append(f"source     {visible(source.name)}: {source.images:,} images{notes}")
    for label, each in enumerate(manifest.classes[:MOST_CLASSES]):
        counts = ", ".join(f"{count:,} {split}" for split, count in each.images.items())
        lines.append(f"class {label:<4} {visible(each.name)}: {counts}")
    if (more := len(manifest.classes) - MOST_CLASSES) > 0:
        lines.append(f"           and {more:,} more classes")
    console = console or Console()
    console.print(table)
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def print_plan(options: ImageOptions, console: Console | None = None) -> None:
    """Print what `prepare_images` would do, on stdout, and write nothing. Raises ValueError for
    options and input."""
    if (options.out / MANIFEST).exists():
        raise ValueError(
            f"{options.out}: already holds a prepared set; choose another --out, or delete that "
            "one first"
        )
    options = checked(options, load_manifest(options.append) if options.append else None)
    recipe = recipe_of(options)
    inputs = find_inputs(options.inputs, None if options.val_list else options.val)
    units = all_units(inputs)
    table = Table("input", "split", "files", "stored MB", "units", title="input")
    for column in table.columns[2:]:
        column.justify = "right"
    for each in inputs:
        table.add_row(
            escape(each.name),
            each.split or "train, val",
            f"{sum(len(unit.files) for unit in each.units):,}",
            f"{sum(map(stored_bytes, each.units)) / 1e6:,.1f}",
            f"{len(each.units):,}",
        )
    val = f"{options.val_fraction:.2%} held out" if options.val is None else str(options.val)
    lines = [
        f"store      {_stored_as(options)}",
        f"dedup      {options.dedup}",
        f"val        {visible(val)}",
        f"work       {options.processes} processes in {visible(str(options.out / PARTIAL))}",
    ]
    folders = recipe.folders(options.out / PARTIAL, units)
    done = sum((folder / "whole.json").exists() for folder in folders)
    lines += [f"done       {done:,} of {len(units):,} units by an earlier run"] if done else []
    if options.task:
        mine = [units[number] for number in units_of_task(units, *options.task)]
        lines.append(
            f"task       {options.task[0]} of {options.task[1]}: {len(mine):,} units, "
            f"{sum(map(stored_bytes, mine)) / 1e6:,.1f} MB stored"
        )
    console = console or Console()
    console.print(table)
    lines += _passed_over(inputs)
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    console.print("nothing was written")


def _passed_over(inputs: Sequence[ImageInput]) -> list[str]:
    """Return a line on what of the input is not read, if there is any."""
    counts = Counter(finding.kind for each in inputs for finding in each.passed)
    found = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
    return [f"passed     {found}"] if found else []


def _stored_as(options: ImageOptions | ImageSetOptions) -> str:
    """Return what is made of images that are as they should be."""
    found = [f"shorter side at most {options.resize_shorter}"] if options.resize_shorter else []
    found += [f"{options.reencode} of quality {options.quality}"] if options.reencode else []
    return ", ".join(found) or "as they came"
