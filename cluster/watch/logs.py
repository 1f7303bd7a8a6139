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
from cluster.run_record import LedgerError, Submission
from cluster.watch import run_state
from cluster.watch.run_state import Asking
from dnt_scale.record import timeline

POLL_S = 0.5
QUIET_S = 3.0  # without a new line, until SLURM is asked what goes on
START = re.compile(r"submitit INFO \((.*),\d+\) - Starting with JobEnvironment\(job_id=(\w+), hostname=([^,]+),")
NOISE = re.compile(r"submitit (INFO|WARNING \(.*\) - Bypassing signal)")


class Reader:
    """The lines of one rank that have not been shown yet."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._read: dict[Path, int] = {}  # bytes of each file

    def show(self, submission: Submission, *, to_the_end: bool) -> bool:
        """Print new lines, with a heading at each start; what is not a whole line yet only ``to_the_end``.

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
                show_line(line)
        sys.stdout.flush()
        return anything


def show_line(line: str) -> None:
    if start := START.match(line):
        print(f"--- job {start[2]} on {start[3]}, {start[1]} ---")
    elif not NOISE.match(line):
        print(line)


def main(run_dir: Path, rank: int, *, follow: bool) -> int:
    """`dnt logs`; returns the exit status. With ``follow`` until the run is over, or Ctrl-C.

    Raises:
        LedgerError: the run was never submitted, or has no such rank.
    """
    submission = run_record.load(run_dir, to_look=True)
    check_rank(submission, rank)
    reader = Reader(rank)
    if follow:
        with suppress(KeyboardInterrupt):
            following(run_dir, reader)
    elif not reader.show(submission, to_the_end=True):
        found, _ = run_state.look(run_dir, submission, Asking())
        tell(f"{submission.name}: nothing logged; {found.in_words}")
    return 0


def check_rank(submission: Submission, rank: int) -> None:
    """Raises LedgerError for a rank that the run has not and had not."""
    logged = {
        int(file.name.split("_")[-2]) for job in submission.jobs for file in submission.logs.glob(f"{job}_*_log.out")
    }
    if rank not in logged and not 0 <= rank < submission.cluster.ranks:
        there = ", ".join(map(str, sorted(logged))) or f"0 to {submission.cluster.ranks - 1}, once they start"
        raise LedgerError(f"--rank {rank}: {submission.name} has no log of it; there are those of {there}")


def following(run_dir: Path, reader: Reader) -> None:
    """Show new lines until the run is over; say what it waits for when there are none."""
    told, heard, events, sizes = "", -math.inf, [], None
    while True:
        submission = run_record.load(run_dir, to_look=True)
        if reader.show(submission, to_the_end=False):
            told, heard = "", time.monotonic()
        if sizes != (sizes := [file.stat().st_size for file in timeline.files(run_dir)]):
            events = timeline.read(run_dir)
        found = run_state.standing(submission, events, None, time.time(), asked=False)
        if found.live and time.monotonic() - heard > QUIET_S:
            asking, heard = Asking(), time.monotonic()
            found, _ = run_state.look(run_dir, submission, asking)
            if found.live and found.state != told and (found.why or found.state != "running"):
                told = found.state
                tell(f"{submission.name}: {found.in_words}" + (f"; {asking.problem}" if asking.problem else ""))
        if not found.live:
            time.sleep(POLL_S)
            reader.show(submission, to_the_end=True)  # what came after the word of the end
            tell(f"{submission.name}: {found.in_words}")
            return
        time.sleep(POLL_S)


def tell(line: str) -> None:
    """Beside the log, which goes to stdout."""
    print(f"dnt: {line}", file=sys.stderr, flush=True)
