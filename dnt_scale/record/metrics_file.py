"""RUN/metrics.jsonl, one JSON object a step: what a resume keeps of it, and what is yet to send."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from dnt_scale.record.files import replace_file

METRICS = "metrics.jsonl"
DIAGNOSTICS = "diagnostics.jsonl"  # Lines of train/hooks/diagnose.py; a resume cuts both alike.
TAIL_BYTES = 1 << 20  # Read of it for those who want the last lines.
NOT_METRICS = ("step", "time")


class Point(NamedTuple):
    """One value of one metric."""

    step: int
    name: str
    value: float
    time_ms: int  # Since 1970.


def _step_of(line: bytes) -> tuple[int, dict[str, Any]] | None:
    """Return the step and content of one line, or None when the line is not a whole record."""
    try:
        record = orjson.loads(line)
        return int(record["step"]), record
    except (ValueError, KeyError, TypeError):
        return None


def drop_after(path: Path, resume_step: int) -> None:
    """Drop what a run resumed at ``resume_step`` will write again, and lines that are not whole.

    A run that starts at step 0 writes every line again, the validation at step 0 included, so
    nothing is kept. The file is replaced in one piece, and left alone when nothing has to go.

    Raises:
        OSError: it cannot be read or replaced.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    kept = bytearray()
    for line in data.splitlines():
        found = _step_of(line)
        if found is not None and 0 < resume_step >= found[0]:
            kept += line + b"\n"
    if kept != data:
        replace_file(path, bytes(kept))


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file of JSON lines, in order; none where there is no such file.

    Raises:
        OSError: it cannot be read.
    """
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # A line that training is writing just now.
            records.append(orjson.loads(line))
    return records


def last_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the last whole lines of metrics.jsonl, some thousands; empty where there is none."""
    try:
        with (run_dir / METRICS).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            data = file.read()
    except OSError:
        return []
    found = []
    for line in data.split(b"\n")[size > TAIL_BYTES : -1]:
        with contextlib.suppress(ValueError):
            found.append(orjson.loads(line))
    return [line for line in found if isinstance(line, dict) and {"step", "time"} <= line.keys()]


def unsent_points(
    line: bytes,
    sent_step: int,
    sent_names: Iterable[str],
    now_ms: int,
) -> list[Point] | None:
    """Return what a backend still lacks of one line; None when the line is not a whole record.

    Steps redone after a resume are there already, with the same values: none is sent twice.

    Args:
        sent_step: the last step sent, and ``sent_names`` the metrics sent of it.
        now_ms: the time of a line that has none.
    """
    found = _step_of(line)
    if found is None:
        return None
    step, record = found
    at = record.get("time")
    time_ms = int(at * 1000) if isinstance(at, int | float) else now_ms
    return [
        Point(step, name, float(value), time_ms)
        for name, value in record.items()
        if isinstance(value, int | float)
        and name not in NOT_METRICS
        and (step > sent_step or (step == sent_step and name not in sent_names))
    ]


def unit_of(records: Iterable[dict[str, Any]]) -> str:
    """Return what a run's rows are counted in: what its records tell the speed of,
    ``NAME_per_s``; else tokens.
    """
    names = (
        name.removesuffix("_per_s")
        for record in records
        for name in record
        if name.endswith("_per_s")
    )
    return next(names, "tokens")
