import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import run_record
from cluster.run_record import RecordError
from cluster.watch import logs
from tests.helpers.folders import allocated, queued, ready, submission, submitted_run

START = (
    "submitit INFO (2026-11-26 18:0{minute}:14,865) - Starting with JobEnvironment(job_id={job}, "
    "hostname={host}, "
    "local_rank=0(1), node=0(2), global_rank=0(2))\n"
    "submitit INFO (2026-11-26 18:0{minute}:14,865) - Loading pickle: "
    "/runs/big/jobs/slurm/{job}_submitted.pkl\n"
)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run of two jobs, the first of which was started twice, on a machine without SLURM."""
    monkeypatch.setenv("PATH", str(tmp_path))
    now = time.time()
    events = [queued(now - 99, "7"), allocated(now - 90, "7.0"), ready(now - 80, "7.0")]
    run_dir = submitted_run(tmp_path / "big", events, "7", "12")
    write(run_dir, "7", 0, START.format(minute=1, job=7, host="node1") + "step 1\nstep 2\n")
    write(
        run_dir,
        "7",
        0,
        "submitit WARNING (2026-11-26 18:01:15,795) - Bypassing signal SIGCONT\nsrun: got "
        "SIGCONT\n",
    )
    write(run_dir, "7", 0, START.format(minute=2, job=7, host="node2") + "step 2\n")
    write(run_dir, "12", 0, START.format(minute=3, job=12, host="node3") + "step 3\nno end of line")
    write(run_dir, "7", 1, START.format(minute=1, job=7, host="node2") + "of rank 1\n")
    yield run_dir


def write(run_dir: Path, job: str, rank: int, text: str) -> None:
    file = run_record.jobs_folder(run_dir) / "slurm" / f"{job}_{rank}_log.out"
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as log:
        log.write(text)


def test_all_jobs_of_a_rank_in_order(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert logs.main(run_dir, 0, follow=False) == 0
    assert capsys.readouterr().out.splitlines() == [
        "--- job 7 on node1, 2026-11-26 18:01:14 ---",
        "step 1",
        "step 2",
        "srun: got SIGCONT",
        "--- job 7 on node2, 2026-11-26 18:02:14 ---",
        "step 2",
        "--- job 12 on node3, 2026-11-26 18:03:14 ---",
        "step 3",
        "no end of line",
    ]


def test_another_rank(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs.main(run_dir, 1, follow=False)
    assert capsys.readouterr().out.splitlines()[1:] == ["of rank 1"]


def test_a_rank_that_the_run_has_not(run_dir: Path) -> None:
    with pytest.raises(
        RecordError, match=r"--rank 2: big has no log of it; there are those of 0, 1$"
    ):
        logs.main(run_dir, 2, follow=False)
    with pytest.raises(RecordError, match="--rank -1"):
        logs.main(run_dir, -1, follow=False)


def test_nothing_logged_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    logs.main(submitted_run(tmp_path / "new", [queued(time.time(), "7")], "7"), 1, follow=False)
    assert "new: nothing logged; queued" in capsys.readouterr().err


def test_followed_into_the_next_job_until_the_run_is_over(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rest_of_the_run() -> None:
        write(run_dir, "12", 0, " after all\n")
        run_record.record_end(run_dir, "12.0", "crashed", "resubmitted", "lost a node")
        run_record.write_submission(run_dir, submission(run_dir, "7", "12", "13"))
        time.sleep(2 * logs.POLL_S)
        write(run_dir, "13", 0, START.format(minute=4, job=13, host="node1") + "step 4\n")
        time.sleep(2 * logs.POLL_S)
        run_record.record_end(run_dir, "13.0", "finished", "none", "the token budget is spent")
        write(run_dir, "13", 0, "last words")

    writer = threading.Timer(2 * logs.POLL_S, rest_of_the_run)
    writer.start()
    assert logs.main(run_dir, 0, follow=True) == 0
    writer.join()
    told = capsys.readouterr()
    assert told.out.splitlines()[-6:] == [
        "--- job 12 on node3, 2026-11-26 18:03:14 ---",
        "step 3",
        "no end of line after all",
        "--- job 13 on node1, 2026-11-26 18:04:14 ---",
        "step 4",
        "last words",
    ]
    assert told.err.splitlines()[-1] == "dnt: big: finished (the token budget is spent)"


def test_what_it_waits_for(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 has written nothing in the second job, so it is said what the run is doing; and where
    that is from."""
    monkeypatch.setattr(logs, "QUIET_S", 0.5)
    finish = threading.Timer(
        2.0, run_record.record_end, (run_dir, "12.0", "finished", "none", "done")
    )
    finish.start()
    logs.main(run_dir, 1, follow=True)
    finish.join()
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("dnt: big: running on node1 node2 (last sign of life")
    assert "no SLURM here" in first
    assert last == "dnt: big: finished (done)"
