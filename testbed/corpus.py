"""Real text that is on every machine, the interpreter's own library, and small sets made of it."""

import io
import sysconfig
from pathlib import Path
from typing import Any

from rich.console import Console

from data_prep.options import PrepareOptions
from data_prep.pipeline import prepare
from data_prep.shards import Manifest

TEXT = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money.\n"
)


def python_source_files(limit_bytes: int) -> list[Path]:
    """Source files of the standard library, tests left out, of `limit_bytes` together or a
    little more.
    """
    root = Path(sysconfig.get_path("stdlib"))
    chosen: list[Path] = []
    size = 0
    for path in sorted(root.rglob("*.py")):
        below = set(path.relative_to(root).parts[:-1])
        if (
            below & {"test", "tests", "idle_test", "site-packages", "dist-packages"}
            or size >= limit_bytes
        ):
            continue
        chosen.append(path)
        size += path.stat().st_size
    return chosen


def small_set(
    out: Path,
    seq_len: int = 64,
    vocab_size: int = 512,
    val_fraction: float = 0.1,
    limit_bytes: int = 1_000_000,
    workers: int = 1,
    shard_bytes: int = 200_000,
    **options: Any,
) -> Manifest:
    """Prepare a set of several shards from the standard library in `out`; a second or two for
    the default size.
    """
    settings = PrepareOptions(
        inputs=python_source_files(limit_bytes),
        out=out,
        seq_len=seq_len,
        vocab_size=vocab_size,
        val_fraction=val_fraction,
        workers=workers,
        shard_bytes=shard_bytes,
        **options,
    )
    manifest = prepare(settings, Console(quiet=True))
    assert manifest
    return manifest


def run(corpus: Path, out: Path, **options: Any) -> tuple[Manifest, str]:
    """The manifest, and what was said on the way."""
    console = Console(file=io.StringIO(), width=200)
    settings = {"vocab_size": 300, "seq_len": 32, "val_fraction": 0.2, "workers": 1, **options}
    manifest = prepare(PrepareOptions(**{"inputs": [corpus], "out": out, **settings}), console)
    return manifest, console.file.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
