"""`dnt logs`: what one rank of a run wrote, over all its jobs and their starts; and on as it goes.

submitit gives each rank of each job a file, JOB_RANK_log.out, to which every start of the job adds.
"""

import math
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

from cluster import run_record
from cluster.run_record import RecordError, Submission
from cluster.watch import run_state
from cluster.watch.run_state import SlurmQuery
from dnt_scale.record import timeline

POLL_S = 0.5
# After this long without a new line SLURM is asked what goes on.
QUIET_S = 3.0
START = re.compile(
    r"submitit INFO \((.*),\d+\) - Starting with JobEnvironment\(job_id=(\w+), hostname=([^,]+),"
)
NOISE = re.compile(r"submitit (INFO|WARNING \(.*\) - Bypassing signal)")


class LogReader:
    """The lines of one rank that have not been shown yet."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._read: dict[Path, int] = {}  # bytes of each file

    def show(self, submission: Submission, *, to_the_end: bool) -> bool:
        """Print new lines, with a heading at each start; what is not a whole line yet only
        ``to_the_end``.

        Returns:
            Whether there was anything.
        """
        anything = False
        for job in submission.jobs:
            file = submission.logs / f"{job}_{self._rank}_log.out"
            try:
                with file.open("rb") as log:
                    log.seek(self._read.get(file, 0))
                    data = log.read()
            except FileNotFoundError:
                continue
            if not to_the_end:
                data = data[: data.rfind(b"\n") + 1]
            self._read[file] = self._read.get(file, 0) + len(data)
            lines = data.decode(errors="replace").splitlines()
            anything = anything or bool(lines)
            for line in lines:
                print_line(line)
        sys.stdout.flush()
        return anything


def print_line(line: str) -> None:
    if start := START.match(line):
        print(f"--- job {start[2]} on {start[3]}, {start[1]} ---")
    elif not NOISE.match(line):
        print(line)


def main(run_dir: Path, rank: int, *, follow: bool) -> int:
    """Run `dnt logs` and return the exit status. With ``follow`` it goes on until the run is over,
    or Ctrl-C.

    Raises:
        RecordError: the run was never submitted, or has no such rank.
    """
    submission = run_record.read_submission(run_dir, of_any_owner=True)
    check_rank(submission, rank)
    reader = LogReader(rank)
    if follow:
        with suppress(KeyboardInterrupt):
            follow_log(run_dir, reader)
    elif not reader.show(submission, to_the_end=True):
        found, _ = run_state.read_status(run_dir, submission, SlurmQuery())
        print_note(f"{submission.name}: nothing logged; {found.text}")
    return 0


def check_rank(submission: Submission, rank: int) -> None:
    """Raise RecordError for a rank that the run has not and had not."""
    logged = {
        int(file.name.split("_")[-2])
        for job in submission.jobs
        for file in submission.logs.glob(f"{job}_*_log.out")
    }
    if rank not in logged and not 0 <= rank < submission.cluster.ranks:
        there = (
            ", ".join(map(str, sorted(logged)))
            or f"0 to {submission.cluster.ranks - 1}, once they start"
        )
        raise RecordError(
            f"--rank {rank}: {submission.name} has no log of it; there are those of {there}"
        )


def follow_log(run_dir: Path, reader: LogReader) -> None:
    """Show new lines until the run is over; say what it waits for when there are none."""
    told, heard, events, sizes = "", -math.inf, [], None
    while True:
        submission = run_record.read_submission(run_dir, of_any_owner=True)
        if reader.show(submission, to_the_end=False):
            told, heard = "", time.monotonic()
        if sizes != (sizes := [file.stat().st_size for file in timeline.files(run_dir)]):
            events = timeline.read(run_dir)
        found = run_state.decide_status(submission, events, None, time.time(), asked=False)
        if found.live and time.monotonic() - heard > QUIET_S:
            query, heard = SlurmQuery(), time.monotonic()
            found, _ = run_state.read_status(run_dir, submission, query)
            if found.live and found.state != told and (found.why or found.state != "running"):
                told = found.state
                print_note(
                    f"{submission.name}: {found.text}"
                    + (f"; {query.problem}" if query.problem else "")
                )
        if not found.live:
            time.sleep(POLL_S)
            # Show what came after the word of the end.
            reader.show(submission, to_the_end=True)
            print_note(f"{submission.name}: {found.text}")
            return
        time.sleep(POLL_S)


def print_note(line: str) -> None:
    """Print a line beside the log, which goes to stdout."""
    print(f"dnt: {line}", file=sys.stderr, flush=True)
