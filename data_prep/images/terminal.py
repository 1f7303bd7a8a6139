"""What a person asks of an image set: `dnt data info` and `verify`."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.images.findings import KINDS
from data_prep.images.shards import load_manifest, manifest_sha256
from data_prep.images.verify import verify
from data_prep.progress import stage
from data_prep.report.markup import visible

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
    options, stats = manifest.options, manifest.statistics
    stored_as = [f"shorter side at most {options.resize_shorter}"] if options.resize_shorter else []
    stored_as += [f"{options.reencode} of quality {options.quality}"] if options.reencode else []
    lines = [
        f"stored     {', '.join(stored_as) or 'as they came'}",
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
