"""`dnt data images`, killed by kill -9 at random moments and started again: is the set the same, to
the byte, as that of a run that nobody killed?

    python -m benchmarks.image_kills --folder /tmp/kills

INPUT is, unless it is given, a folder of --images small JPEGs and PNGs, of which some are copies,
damaged or converted. A kill hits the process, one of its workers, or all of them, at a moment
within the processor time that a whole run took. Whenever a run comes to its end, its set is
compared and removed, and the next one begins anew. FOLDER keeps the input and the first set.
"""

import argparse
import datetime
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_prep.images.shards import load_manifest
from data_prep.images.verify import verify
from dnt_scale.record.files import git_commit
from testbed.corpus import contents
from testbed.images import CLASSES, drawn, encoded
from testbed.random_kills import NEVER, Kill, kill_at_random, run_until

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for input and sets")
    parser.add_argument("--input", type=Path, help="of images, instead of drawn ones")
    parser.add_argument("--images", type=int, default=20_000, help="that are drawn")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()

    source = options.input or draw_folders(options.folder / "in", options.images)
    whole, killed = options.folder / "whole" / "set", options.folder / "killed" / "set"
    first = run_until(command(source, whole, options.workers), NEVER, "main", ENVIRONMENT)
    if first.status:
        raise SystemExit(f"{source}: a run that nobody killed failed; see what it says")
    problems = verify(whole)
    assert not problems, problems
    expected = contents(whole)
    compared = 0

    def finished() -> None:
        nonlocal compared
        assert contents(killed) == expected, f"{killed} differs from {whole}"
        shutil.rmtree(killed)
        compared += 1

    kills = kill_at_random(
        command(source, killed, options.workers),
        killed,
        options.kills,
        first.seconds,
        options.seed,
        finished,
        ENVIRONMENT,
    )
    splits = load_manifest(whole).splits
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "input": str(options.input.name if options.input else "drawn"),
        "images": {name: split.images for name, split in splits.items()},
        "workers": options.workers,
        "cpu_s_of_a_whole_run": first.seconds,
        "kills": [kill._asdict() for kill in kills],
        "sets_compared": compared,
    }
    show(result, kills)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def command(source: Path, out: Path, workers: int) -> list[str]:
    words = ["data", "images", str(source), "--out", str(out), "--workers", str(workers)]
    words += ["--dedup", "exact", "--shard-mb", "2"]
    return [sys.executable, "-m", "dnt_scale.cli", *words]


def draw_folders(folder: Path, images: int) -> Path:
    """Write images of 32 pixels in class folders, a hundred at a time out of one drawing: every
    fiftieth is a copy of the one before, every sixtieth cut short, every seventieth a GIF."""
    if folder.exists():
        return folder
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for number in range(images):
        label = number % len(CLASSES)
        if number % 100 < len(CLASSES):
            large = drawn(label, number, side=64)
        at = number % 32
        image = large.crop((at, 31 - at, at + 32, 63 - at))
        if number % 50 and number % 70:
            image.putpixel((0, 0), (number % 256, number // 256 % 256, 0))
        suffix = "gif" if number % 70 == 0 else ("png", "jpg")[number % 2]
        data = encoded(image, suffix)
        data = data[:200] if number % 60 == 0 else data
        (folder / CLASSES[label] / f"{number:06}.{suffix}").write_bytes(data)
    return folder


def show(result: dict[str, Any], kills: list[Kill]) -> None:
    table = Table(title=f"{sum(result['images'].values()):,} images, {result['workers']} workers")
    for column in ("killed", "kills", "from CPU s", "to CPU s"):
        table.add_column(column, justify="right")
    for who, count in sorted(Counter(kill.who for kill in kills).items()):
        moments = [kill.seconds for kill in kills if kill.who == who]
        table.add_row(who, str(count), f"{min(moments):.1f}", f"{max(moments):.1f}")
    Console(width=100).print(table)
    stages = Counter(stage_of(kill.left) for kill in kills)
    found = ", ".join(f"{count} {stage}" for stage, count in sorted(stages.items()))
    print(
        f"a whole run takes {result['cpu_s_of_a_whole_run']:.1f} s of processor time; kills by "
        f"what they left: {found}; {result['sets_compared']} sets compared, none differs"
    )


def stage_of(left: dict[str, int]) -> str:
    """Return how far a run was, by the files that it left."""
    if left.get(".tar"):
        return "with tars"
    if left.get(".jsonl"):
        return "with all chunks, while they were counted"
    return "with some chunks" if left.get(".npz") else "with none"


if __name__ == "__main__":
    main()
