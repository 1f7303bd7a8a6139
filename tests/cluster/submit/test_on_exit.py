"""What is decided when a job's ranks have ended: every case as a row, and what is read to decide
it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import run_record
from cluster.job.rank_main import reason_not_to_train
from cluster.submit.on_exit import Decision, Facts, decide, find_failed_host, find_killed_host
from cluster.watch import run_state
from dnt_scale.record import timeline
from tests.helpers.folders import submission, submitted_run

QUIET = Facts(
    outcome=None,
    exits=frozenset(),
    all_ended=False,
    srun=0,
    cancelled=False,
    slurm_ends_it=False,
    slurm_requeues_it=False,
    out_of_time=False,
    nearly_over=False,
    stepped=True,
    node_down=False,
    preempted=False,
    crashes=1,
    max_crashes=3,
)
TERM = 128 + signal.SIGTERM
USR1 = 128 + signal.SIGUSR1


def decided(**facts: object) -> Decision:
    return decide(Facts(**{**QUIET.__dict__, **facts}))


@pytest.mark.parametrize(
    ("facts", "status", "goes_on"),
    [
        ({"outcome": "FINISHED", "exits": frozenset({0}), "all_ended": True}, "finished", False),
        # a signal that comes after the last step changes nothing
        (
            {"outcome": "FINISHED", "exits": frozenset({TERM}), "slurm_ends_it": True},
            "finished",
            False,
        ),
        ({"outcome": "KILLED", "exits": frozenset({USR1}), "all_ended": True}, "stopped", True),
        # a signal before the first step: no last word of training, but all ranks ended by
        # themselves
        ({"exits": frozenset({TERM}), "all_ended": True}, "stopped", True),
        # again and again it would be stopped before its first step: that is bounded, unless others
        # preempt it
        (
            {"exits": frozenset({USR1}), "all_ended": True, "nearly_over": True, "stepped": False},
            "crashed",
            True,
        ),
        (
            {
                "exits": frozenset({USR1}),
                "all_ended": True,
                "nearly_over": True,
                "stepped": False,
                "crashes": 3,
            },
            "crashed",
            False,
        ),
        (
            {
                "exits": frozenset({USR1}),
                "all_ended": True,
                "nearly_over": True,
                "stepped": False,
                "preempted": True,
            },
            "stopped",
            True,
        ),
        # one rank was killed, srun sent SIGTERM to the other
        ({"exits": frozenset({TERM}), "all_ended": False, "srun": 137}, "crashed", True),
        ({"exits": frozenset({1}), "all_ended": True, "srun": 1}, "crashed", True),
        # a rank failed, and srun ended the other with SIGTERM
        ({"exits": frozenset({1, TERM}), "all_ended": True, "srun": 1}, "crashed", True),
        # a node is down, at a site that does not requeue
        (
            {"exits": frozenset({1}), "slurm_ends_it": True, "node_down": True, "srun": 1},
            "crashed",
            True,
        ),
        ({"srun": 137}, "crashed", True),
        ({"srun": 137, "crashes": 3}, "crashed", False),
        (
            {"outcome": "FAILED", "exits": frozenset({2}), "all_ended": True, "srun": 2},
            "refused",
            False,
        ),
        # the first rank refused, the others miss it
        ({"exits": frozenset({1, 2}), "all_ended": True, "srun": 2}, "refused", False),
        ({"outcome": "KILLED", "exits": frozenset({TERM}), "cancelled": True}, "cancelled", False),
        # scancel by hand: SLURM ends the job and says nothing more
        (
            {"outcome": "KILLED", "exits": frozenset({TERM}), "slurm_ends_it": True},
            "cancelled",
            False,
        ),
        # scontrol requeue by hand, or preemption that requeues
        (
            {
                "outcome": "KILLED",
                "exits": frozenset({TERM}),
                "slurm_ends_it": True,
                "slurm_requeues_it": True,
            },
            "stopped",
            True,
        ),
        ({"slurm_ends_it": True, "slurm_requeues_it": True}, "killed", True),
        # the time is up, or a partition whose preemption cancels: a new job goes on
        (
            {
                "outcome": "KILLED",
                "exits": frozenset({TERM}),
                "slurm_ends_it": True,
                "out_of_time": True,
            },
            "stopped",
            True,
        ),
        (
            {
                "outcome": "KILLED",
                "exits": frozenset({TERM}),
                "slurm_ends_it": True,
                "preempted": True,
            },
            "stopped",
            True,
        ),
    ],
)
def test_decision(facts: dict[str, object], status: str, goes_on: bool) -> None:
    decision = decided(**facts)
    assert (decision.status, decision.goes_on) == (status, goes_on), decision


LOG = """\
submitit INFO (2026-11-26 17:57:36,837) - Starting with JobEnvironment(job_id=11, hostname=node1)
srun: error: node3: task 1: Killed
dnt: attempt 11.0 crashed (exit status 137); this job is requeued
submitit INFO (2026-11-26 17:58:41,415) - Starting with JobEnvironment(job_id=11, hostname=node1)
step 3/9  loss 5.1
"""


@pytest.mark.parametrize(
    ("line", "hosts"),
    [
        ("srun: error: node2: task 1: Killed", ["node2"]),
        ("srun: error: gpu-07: tasks 8-15: Segmentation fault (core dumped)", ["gpu-07"]),
        ("srun: error: Node failure on node4", ["node4"]),
        ("srun: error: node2: task 1: Exited with exit code 1", []),
        ("", []),
    ],
)
def test_srun_tells_whose_rank_was_killed_first(
    tmp_path: Path, line: str, hosts: list[str]
) -> None:
    log = tmp_path / "11_0_log.out"
    log.write_text(f"{LOG}{line}\nsrun: error: node1: task 0: Killed\n" if line else LOG)
    found, words = find_killed_host(log)
    assert found == hosts
    assert words == (line.removeprefix("srun: error: ") if hosts else "")


def test_a_long_log_is_read_from_its_end(tmp_path: Path) -> None:
    log = tmp_path / "11_0_log.out"
    log.write_text(LOG + "step 4/9  loss 5.0\n" * 100_000 + "srun: error: node2: task 1: Killed\n")
    assert find_killed_host(log)[0] == ["node2"]


def test_a_node_whose_rank_alone_failed_is_blamed() -> None:
    assert find_failed_host({0: ("node1", 143), 1: ("node2", 1)})[0] == ["node2"]
    assert (
        find_failed_host({0: ("node1", 1), 1: ("node2", 1)})[0] == []
    )  # a fault of the code, or of the network
    assert find_failed_host({0: ("node1", 1), 1: ("node1", 1)})[0] == []
    assert find_failed_host({0: ("node1", 143), 1: ("node2", 143)})[0] == []


def ended(
    run_dir: Path,
    attempt: str,
    status: run_record.EndStatus,
    began: int | None,
    blamed: tuple[str, ...] = (),
) -> None:
    timeline.append(run_dir, "allocated", attempt=attempt, ranks=2)
    if began is not None:
        timeline.append(run_dir, "ready", attempt=attempt, step=began)
    run_record.record_end(run_dir, attempt, status, "requeued", "", blamed)


def test_crashes_count_while_no_checkpoint_moves_on(tmp_path: Path) -> None:
    def crashes() -> int:
        return run_record.crashes_in_a_row(timeline.read(tmp_path))

    assert crashes() == 0
    ended(tmp_path, "7.0", "crashed", 0)
    ended(tmp_path, "7.1", "crashed", 0)
    assert crashes() == 2
    ended(tmp_path, "7.2", "killed", 200)  # 7.1 had come to a checkpoint
    assert crashes() == 1
    ended(tmp_path, "7.3", "crashed", None)  # before its first step
    assert crashes() == 2
    ended(tmp_path, "7.4", "stopped", 200)
    assert crashes() == 0
    ended(tmp_path, "7.5", "crashed", 200)
    timeline.append(tmp_path, "submitted", attempt="8", by_user=True)
    assert crashes() == 0


def test_a_crash_after_a_new_checkpoint_does_not_count(tmp_path: Path) -> None:
    for attempt in ("7.0", "7.1", "7.2"):
        ended(tmp_path, attempt, "crashed", 0)
    events = timeline.read(tmp_path)
    assert run_record.crashes_in_a_row(events, newest=0) == 3
    assert run_record.crashes_in_a_row(events, newest=100) == 0


def test_an_end_that_two_found_out_counts_once(tmp_path: Path) -> None:
    ended(tmp_path, "7.0", "killed", 0, ("node1",))
    run_record.record_end(tmp_path, "7.0", "killed", "none", "", ["node1"])
    events = timeline.read(tmp_path)
    assert run_record.crashes_in_a_row(events) == 1
    assert run_record.unreliable_hosts(events, time.time(), 2) == []


def test_nodes_that_fail_repeatedly_within_a_day(tmp_path: Path) -> None:
    for number, host in enumerate(["node1", "node2", "node2"]):
        ended(tmp_path, f"7.{number}", "crashed", 0, (host,))
    events = timeline.read(tmp_path)
    assert run_record.unreliable_hosts(events, time.time(), 2) == ["node2"]
    assert run_record.unreliable_hosts(events, time.time(), 1) == ["node1", "node2"]
    assert run_record.unreliable_hosts(events, time.time() + run_record.DAY_S + 1, 1) == []


def test_nodes_are_left_out_only_where_slurm_says_that_enough_remain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no SLURM answers
    ended(tmp_path, "7.0", "crashed", 0, ("node2",))
    events = timeline.read(tmp_path)
    site = submission(tmp_path).cluster.model_copy(update={"exclude_after": 1})
    assert run_state.nodes_to_leave_out(site, events, ["node9"]) == ["node9"]
    assert (
        run_state.nodes_to_leave_out(site.model_copy(update={"nodelist": "node[1-2]"}), events, [])
        == []
    )
    assert run_state.nodes_to_leave_out(site, events, ["node2"]) == ["node2"]


def test_a_job_that_slurm_starts_after_too_many_crashes_says_so(tmp_path: Path) -> None:
    run_dir = submitted_run(tmp_path / "run", [], "7")
    assert reason_not_to_train(run_dir, run_record.read_submission(run_dir), "7") is None
    for number in range(3):
        ended(run_dir, f"7.{number}", "killed", 0)
    found = reason_not_to_train(run_dir, run_record.read_submission(run_dir), "7")
    assert found == ("crashed", "3 crashes in a row without a new checkpoint (cluster.max_crashes)")

    run_record.record_end(run_dir, "7.3", found[0], "none", found[1])
    before = timeline.read(run_dir)
    job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "3", "PATH": str(tmp_path)}
    after = subprocess.run(
        [sys.executable, "-m", "cluster.submit.on_exit", str(run_dir), "0"],
        env={**os.environ, **job},
    )
    assert after.returncode == 0
    assert timeline.read(run_dir) == before  # what it said stands


def test_the_job_that_began_last_is_the_newest(tmp_path: Path) -> None:
    """A requeue that took effect though its answer was lost: the new job came first into
    run.json."""
    assert submission(tmp_path, "7", "8").with_job("7").jobs == ["8", "7"]


def test_the_newest_checkpoint_wherever_they_lie(tmp_path: Path) -> None:
    (tmp_path / "elsewhere/step-00000040").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000020").mkdir(parents=True)
    for strange in ("step-00000030.bak2", "step-99", "step-00000020-2"):
        (tmp_path / "checkpoints" / strange).mkdir()
    run = submission(tmp_path)
    assert run_record.newest_checkpoint(run) == 20
    assert (
        run_record.newest_checkpoint(
            run.model_copy(update={"checkpoints": str(tmp_path / "elsewhere")})
        )
        == 40
    )
    assert (
        run_record.newest_checkpoint(run.model_copy(update={"checkpoints": "s3://bucket/run"}))
        is None
    )


def test_an_attempt_that_could_not_say_how_it_ended(tmp_path: Path) -> None:
    timeline.append(tmp_path, "allocated", attempt="7.0", ranks=2)
    timeline.append(tmp_path, "lost", attempt="7.0", message="rank 1 (node2) died", hosts=["node2"])
    timeline.append(tmp_path, "allocated", attempt="7.1", ranks=2)
    timeline.append(tmp_path, "end", attempt="7.1", outcome="KILLED", step=5)
    assert run_record.open_attempts(timeline.read(tmp_path)) == ["7.0", "7.1"]
    for attempt in ("7.0", "7.1"):
        run_record.record_silent_end(tmp_path, timeline.read(tmp_path), attempt, then="requeued")
    killed, stopped = timeline.read(tmp_path)[-2:]
    assert (killed["status"], killed["blamed"], killed["reason"]) == (
        "killed",
        ["node2"],
        "rank 1 (node2) died",
    )
    assert (
        killed["until"] == timeline.read(tmp_path)[1]["time"]
    )  # its last sign, not when it was found out
    assert (stopped["status"], stopped["blamed"]) == ("stopped", [])
    assert run_record.open_attempts(timeline.read(tmp_path)) == []


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_folder_that_others_may_write_to_is_not_run(tmp_path: Path, mode: int) -> None:
    jobs = tmp_path / "jobs"
    jobs.mkdir(mode=0o700)
    (jobs / "run.json").write_text("{}")
    jobs.chmod(mode)
    with pytest.raises(run_record.RecordError, match="may be written by others"):
        run_record.read_submission(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_folder_of_another_user_is_not_run(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    jobs.mkdir(mode=0o700)
    (jobs / "run.json").write_text("{}")
    os.chown(jobs, 65534, 65534)
    with pytest.raises(run_record.RecordError, match="belongs to another user"):
        run_record.read_submission(tmp_path)
