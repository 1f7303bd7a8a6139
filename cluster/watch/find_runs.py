"""Run folders below a path, and the one that a name, a job or a folder means."""

from collections.abc import Iterator
from pathlib import Path

from cluster import run_record
from cluster.run_record import RecordError
from dnt_scale.sweep.sweep_file import is_sweep

RUNS = Path("runs")


def runs_under(folder: Path) -> Iterator[Path]:
    """Return the submitted runs in a folder and in its folders (those of a sweep)."""
    for pattern in ("*/jobs/run.json", "*/*/jobs/run.json"):
        for file in sorted(folder.glob(pattern)):
            # What --fresh moved aside is no run, see dnt_scale.train.run_start.
            if not file.parents[1].name.startswith("before-"):
                yield file.parents[1]


def find_run(word: str) -> Path:
    """Return a submitted run by its folder, or by its name in ``runs/``.

    Raises:
        RecordError: there is none.
    """
    for place in (Path(word), RUNS / word):
        if run_record.is_submitted(place):
            return place
        if is_sweep(place):
            raise RecordError(
                f"{place} is a sweep; name one of its runs, which `dnt jobs {word}` shows"
            )
    names = ", ".join(str(run.relative_to(RUNS)) for run in runs_under(RUNS)) or "none"
    raise RecordError(
        f"{word}: no job was submitted for a run in {word} or {RUNS / word}; runs in "
        f"{RUNS.absolute()}: {names}"
    )


def short_name(run_dir: Path) -> str:
    """Return what a user may call a run."""
    for runs in (RUNS, RUNS.absolute()):
        if run_dir.is_relative_to(runs):
            return str(run_dir.relative_to(runs))
    return str(run_dir)


def find_runs(words: list[str]) -> list[Path]:
    """Return the runs that are meant by run folders, names in ``runs/``, or folders of runs; none
    given: all of ``runs/``.

    Raises:
        RecordError: there is none by a word.
    """
    if not words:
        return list(runs_under(RUNS))
    found = []
    for word in words:
        found += runs_in(word) or [find_run(word)]
    return found


def runs_in(word: str) -> list[Path]:
    """Return the runs in a folder of runs or a sweep, found as in :func:`find_run`; none where it
    is a run itself."""
    for place in (Path(word), RUNS / word):
        if run_record.is_submitted(place):
            return []
        if runs := list(runs_under(place)):
            return runs
    return []
