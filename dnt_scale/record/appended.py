"""Lines that others than training's steps append to a run folder, for the senders.

``RUN/logs/system/NODE.jsonl``, samples of a machine (:mod:`dnt_scale.record.system_metrics`), as
the metrics ``system/NODE/...``; and ``RUN/lm_eval.jsonl``, what was found of a checkpoint
(:mod:`dnt_scale.tools.harness`). Each line has ``step`` and ``time`` (seconds since 1970).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import orjson

from dnt_scale.record import system_metrics
from dnt_scale.record.files import replace_file
from dnt_scale.record.metrics_file import NOT_METRICS, Point

EVALUATIONS = "lm_eval.jsonl"
EVALUATIONS_FOLDER = "lm_eval"  # What stands behind these lines, by step.


class Appended(NamedTuple):
    """A file of such lines."""

    key: str  # What the senders know it by.
    path: Path
    prefix: str  # Of its metrics.


def files(run_dir: Path) -> Iterator[Appended]:
    """Give the files that are there."""
    for path in sorted(system_metrics.folder(run_dir).glob("*.jsonl")):
        yield Appended(path.stem, path, f"system/{path.stem}/")
    if (path := run_dir / EVALUATIONS).exists():
        yield Appended(EVALUATIONS, path, "")


def append_evaluation(run_dir: Path, step: int, metrics: dict[str, float]) -> None:
    """Add a line of what was found of a checkpoint, with one write. Raises OSError."""
    line = {"step": step, "time": round(time.time(), 3), **metrics}
    with (run_dir / EVALUATIONS).open("ab", buffering=0) as out:
        out.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))


def set_evaluations_aside(run_dir: Path, step: int, aside: Path) -> None:
    """Move what was found of checkpoints after a step into a folder: the files of these steps, and
    a copy of all lines. Raises OSError.
    """
    file, folder = run_dir / EVALUATIONS, run_dir / EVALUATIONS_FOLDER
    if file.exists():
        shutil.copy2(file, aside / EVALUATIONS)
        lines = file.read_bytes().splitlines(keepends=True)
        replace_file(file, b"".join(line for line in lines if _step_of_line(line) <= step))
    for path in sorted(folder.glob("step-*.json")):
        digits = path.stem.removeprefix("step-")
        if digits.isdecimal() and int(digits) > step:
            (aside / EVALUATIONS_FOLDER).mkdir(exist_ok=True)
            path.rename(aside / EVALUATIONS_FOLDER / path.name)


def _step_of_line(line: bytes) -> int:
    """Return the step that a line is of; 0 where it is none."""
    found = _points("", line)
    return found[0].step if found else 0


def read_new(
    run_dir: Path,
    taken: dict[str, int],
    at_most: int,
) -> tuple[list[Point], dict[str, int]]:
    """Read whole lines after the bytes ``taken`` of each file.

    Args:
        at_most: how many points make it stop, or a line later.

    Returns:
        The points, and the bytes taken with them; the same as before when there is nothing new.
    """
    points: list[Point] = []
    after = dict(taken)
    for key, path, prefix in files(run_dir):
        start = after.get(key, 0)
        if len(points) >= at_most or path.stat().st_size <= start:
            continue
        with path.open("rb") as lines:
            lines.seek(start)
            for line in lines:
                if len(points) >= at_most or not line.endswith(b"\n"):
                    break
                points += _points(prefix, line)
                start += len(line)
        after[key] = start
    return points, after


def _points(prefix: str, line: bytes) -> list[Point]:
    """Return the points of one line; none when it is not a whole one."""
    try:
        sample = orjson.loads(line)
        step, time_ms = int(sample["step"]), int(sample["time"] * 1000)
        return [
            Point(step, f"{prefix}{name}", float(value), time_ms)
            for name, value in sample.items()
            if name not in NOT_METRICS
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
