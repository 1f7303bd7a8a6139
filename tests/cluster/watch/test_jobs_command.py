import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from cluster import run_record
from cluster.run_record import RecordError
from cluster.slurm import Job
from cluster.watch import jobs_command, run_state
from cluster.watch.find_runs import find_runs
from dnt_scale import config
from dnt_scale.cli.main import main as dnt
from dnt_scale.record import timeline
from dnt_scale.record.metrics_file import last_metrics
from testbed.run import IDLING, start, synthetic_set, tiny
from testbed.stores import sqlite_store
from testbed.waiting import until
from tests.helpers.folders import (
    Event,
    allocated,
    end,
    ended,
    queued,
    ready,
    submission,
    submitted_run,
)

NOW = 10_000.0
WAITS = [queued(NOW - 90, "7")]
STARTS = [*WAITS, allocated(NOW - 60, "7.0")]
TRAINS = [*STARTS, ready(NOW - 50, "7.0")]
STOPPED = [*TRAINS, end(NOW - 20, "7.0", "KILLED"), ended(NOW - 19, "7.0", "stopped", "requeued")]
MOVED_ON = [
    *STOPPED[:-1],
    ended(NOW - 19, "7.0", "crashed", "resubmitted"),
    queued(NOW - 18, "8", by_user=False),
]
LONG_AGO = [{**event, "time": event["time"] - run_state.FORGETS_S} for event in TRAINS]


def slurm_job(
    word: str, job: str = "7", restarts: int = 0, reason: str = "", eligible: float = 0.0
) -> Job:
    running = word not in ("PENDING", "CANCELLED")
    return Job(
        job,
        word,
        reason,
        "node[1-2]" if running else "",
        restarts,
        eligible=eligible,
        started=NOW - 61,
    )


@pytest.mark.parametrize(
    ("events", "job", "expected"),
    [
        (WAITS, slurm_job("PENDING", reason="Priority"), "queued (Priority)"),
        (WAITS, slurm_job("RUNNING"), "starting on node[1-2]"),
        (STARTS, slurm_job("RUNNING"), "starting on node[1-2]"),
        (TRAINS, slurm_job("RUNNING"), "running on node[1-2]"),
        (TRAINS, slurm_job("SUSPENDED"), "running on node[1-2] (SLURM says SUSPENDED)"),
        ([*LONG_AGO], slurm_job("RUNNING"), "running on node[1-2] (no sign of life for 6 min)"),
        # back into the queue: by itself, by SLURM without a word of the run, and while the job
        # still ends
        (
            STOPPED,
            slurm_job("PENDING", restarts=1, eligible=NOW + 9),
            "requeued (may start in 9 s)",
        ),
        (TRAINS, slurm_job("PENDING", restarts=1, reason="Resources"), "requeued (Resources)"),
        (STOPPED, slurm_job("RUNNING"), "requeued (job 7 is still ending)"),
        (TRAINS, slurm_job("COMPLETING", restarts=1), "requeued (job 7 is still ending)"),
        (STOPPED, slurm_job("RUNNING", restarts=1), "starting on node[1-2]"),
        (MOVED_ON, slurm_job("PENDING", "8", reason="Resources"), "requeued (Resources)"),
        # over, by its own word: SLURM is not needed
        ([*TRAINS, ended(NOW, "7.0", "finished", "none", "all done")], None, "finished (all done)"),
        (
            [*TRAINS, ended(NOW, "7.0", "refused", "none", "bad")],
            slurm_job("COMPLETING"),
            "refused (bad)",
        ),
        # and on with it, by `dnt resubmit`
        (
            [*TRAINS, ended(NOW - 9, "7.0", "crashed", "none"), queued(NOW - 8, "8")],
            slurm_job("PENDING", "8", reason="Priority"),
            "queued (Priority)",
        ),
    ],
)
def test_what_a_run_is_doing(events: list[Event], job: Job | None, expected: str) -> None:
    of = "8" if any(event["attempt"] == "8" for event in events) else "7"
    found = run_state.decide_status(submission(Path("big"), of), events, job, NOW, asked=True)
    assert found.text == expected
    assert not found.unrecorded
    assert found.live == (found.state in ("queued", "requeued", "starting", "running"))


@pytest.mark.parametrize(
    ("events", "job", "attempt", "expected"),
    [
        (
            TRAINS,
            slurm_job("TIMEOUT"),
            "7.0",
            "killed (job 7 ended without a word, SLURM says TIMEOUT)",
        ),
        (
            STARTS,
            slurm_job("NODE_FAIL"),
            "7.0",
            "killed (job 7 ended without a word, SLURM says NODE_FAIL)",
        ),
        (LONG_AGO, None, "7.0", "killed (job 7 ended without a word, SLURM has forgotten it)"),
        (TRAINS, slurm_job("CANCELLED"), "7.0", "cancelled (the job was cancelled)"),
        (WAITS, slurm_job("CANCELLED"), "7.0", "cancelled (the job was cancelled)"),
        (STOPPED, slurm_job("CANCELLED", restarts=1), "7.1", "cancelled (the job was cancelled)"),
        (
            [*TRAINS, end(NOW, "7.0", "FINISHED")],
            slurm_job("FAILED"),
            "7.0",
            "finished (the token budget is spent)",
        ),
        (
            [*TRAINS, end(NOW, "7.0", "KILLED")],
            slurm_job("TIMEOUT"),
            "7.0",
            "stopped (job 7 ended without a word, SLURM says TIMEOUT)",
        ),
        # it was to go on in a new job, which never came
        (
            [*TRAINS, ended(NOW - 9, "7.0", "crashed", "resubmitted")],
            slurm_job("COMPLETED"),
            "7.0",
            "killed (job 7 ended without a word, SLURM says COMPLETED)",
        ),
    ],
)
def test_an_end_that_nobody_wrote_down(
    events: list[Event], job: Job | None, attempt: str, expected: str
) -> None:
    found = run_state.decide_status(submission(Path("big"), "7"), events, job, NOW, asked=True)
    assert (found.text, found.attempt) == (expected, attempt)
    assert found.unrecorded
    assert not found.live


def test_a_run_that_dnt_cancel_ended() -> None:
    cancelled = submission(Path("big"), "7", cancelled=True)
    assert (
        run_state.decide_status(cancelled, TRAINS, slurm_job("COMPLETING"), NOW, asked=True).state
        == "cancelling"
    )
    assert (
        run_state.decide_status(cancelled, TRAINS, slurm_job("CANCELLED"), NOW, asked=True).why
        == "dnt cancel"
    )


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (WAITS, "queued (last sign of life 90 s ago)"),
        (TRAINS, "running on node1 node2 (last sign of life 50 s ago)"),
        (STOPPED, "requeued (last sign of life 19 s ago)"),
        (MOVED_ON, "requeued (last sign of life 18 s ago)"),
    ],
)
def test_the_folder_alone(events: list[Event], expected: str) -> None:
    there = submission(Path("big"), "8" if events is MOVED_ON else "7")
    found = run_state.decide_status(there, events, None, NOW, asked=False)
    assert found.text == expected
    assert not found.unrecorded


def test_a_job_that_lives_in_another_cluster_is_not_taken_for_dead() -> None:
    found = run_state.decide_status(submission(Path("big"), "7"), TRAINS, None, NOW, asked=True)
    assert (
        found.text
        == "running on node1 node2 (SLURM here does not know job 7; last sign of life 50 s ago)"
    )
    assert not found.unrecorded


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder ``runs`` here, on a machine without SLURM and with a terminal of 100 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")
    now = time.time()
    submitted_run(
        tmp_path / "runs/big",
        [
            queued(now - 300, "7"),
            allocated(now - 290, "7.0"),
            ready(now - 280, "7.0"),
            ended(
                now - 150, "7.0", "crashed", "requeued", "exit status 137: rank 1 is gone", "node2"
            ),
            allocated(now - 100, "7.1", ("node1", "node3")),
            ready(now - 90, "7.1", 20),
        ],
        "7",
        steps=40,
    )
    done = [
        queued(9, "5"),
        allocated(10, "5.0"),
        ready(11, "5.0"),
        ended(99, "5.0", "finished", "none", "all done"),
    ]
    submitted_run(tmp_path / "runs/sweep/done", done, "5", steps=100)
    submitted_run(tmp_path / "runs/waits", [queued(now - 200, "9")], "9")
    return tmp_path / "runs"


def test_all_runs_from_their_folders_alone(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dnt(["jobs"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        *("run", "big", "waits", "sweep/done"),  # the live ones first
        *("only", "PATH;"),
    ]
    big = next(line for line in lines if line.startswith("big"))
    assert "running on node1 node3" in big
    assert "40 of 100 (40%)" in big
    assert "4.6000" in big
    assert "512" in big
    assert "0:01:00 left" in shown  # 60 steps of a second
    assert "2 starts" in shown
    assert "finished" in shown and "all done" not in shown
    assert "no SLURM here" in shown


def test_one_run_and_its_attempts(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dnt(["jobs", "big"]) == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 100 for line in shown.splitlines())
    first = next(line for line in shown.splitlines() if line.startswith("7.0"))
    assert "node1 node2" in first
    assert "crashed: exit status 137" in first
    assert first.split()[-2:] == ["requeued", "node2"]
    assert "dnt logs big" in shown
    assert "dnt resubmit" not in shown  # it is live


def test_the_same_as_data(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dnt(["jobs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    big, waits, done = found["runs"]
    assert (big["name"], big["state"], big["step"], big["total_steps"]) == (
        "big",
        "running",
        40,
        100,
    )
    assert big["left_s"] == pytest.approx(60)
    assert [attempt["name"] for attempt in big["attempts"]] == ["7.0", "7.1"]
    assert big["attempts"][0]["blamed"] == ["node2"]
    assert (waits["state"], waits["step"], waits["loss"]) == ("queued", None, None)
    assert (done["state"], done["live"]) == ("finished", False)
    assert "no SLURM here" in found["problems"][0]


def test_a_damaged_run_hides_no_other(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "waits/jobs/run.json").write_text("{")
    assert dnt(["jobs"]) == 0
    shown = capsys.readouterr().out
    assert "sweep/done" in shown
    assert "run.json: cannot be read" in " ".join(shown.split())


def test_no_such_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dnt(["jobs", "bigg"]) == 2
    assert "big, waits, sweep/done" in capsys.readouterr().err
    assert dnt(["cancel", "bigg"]) == 2
    assert dnt(["logs", "bigg"]) == 2


def test_runs_are_found_by_name_folder_and_folder_of_runs(runs: Path) -> None:
    assert find_runs(["big", "runs/waits"]) == [Path("runs/big"), Path("runs/waits")]
    assert find_runs([str(runs / "sweep")]) == [runs / "sweep/done"]
    assert len(find_runs([])) == 3


def test_a_run_with_jobs_at_work_is_not_trained_by_hand(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["model=dnt_nano", "data.path=set", "run.name=big", f"run.dir={runs}/big"]
    assert dnt(["train", *here]) == 2
    told = capsys.readouterr().err
    assert "is in use by its job: running on node1 node3" in told and "surely over, delete" in told
    (runs / "sweep/done/metrics.jsonl").unlink()  # of steps that have no checkpoint
    assert dnt(["train", *here, f"run.dir={runs}/sweep/done"]) == 2
    assert "set: no such folder" in capsys.readouterr().err


def test_steps_of_a_run_that_is_given_tokens(runs: Path) -> None:
    file = run_record.config_file(runs / "big")
    file.write_text(
        file.read_text()
        .replace("steps: 100", "steps: null")
        .replace("tokens: null", "tokens: 10000")
    )
    run = jobs_command.read_config(runs / "big")
    assert jobs_command.total_steps(run, []) is None  # the length of a row is not known yet
    assert jobs_command.total_steps(run, last_metrics(runs / "big")) == 20  # of 512 tokens


def test_steps_and_time_left_of_a_run_whose_stages_differ_in_batch() -> None:
    """A step of 100 tokens takes a second; the 10 that are left have 200 each."""
    run = config.load(
        [
            *("run.name=staged", "data.path=set", "train.tokens=4000"),
            *("train.stages.large.after_step=20", "train.stages.large.global_batch=960"),
        ]
    )
    lines = [
        {"step": step, "tokens": 100 * step, "time": 1000.0 + step, "tokens_per_s": 100.0}
        for step in range(10, 21)
    ]
    assert jobs_command.total_steps(run, lines) is None  # what a row of the stage counts is unknown
    events = [ready(1000.0, "7.0") | {"of": {"step": 30, "tokens": 4000}}]
    assert jobs_command.total_steps(run, lines, events) == 30
    assert jobs_command.seconds_left(lines, 30, "tokens", events) == 20
    assert jobs_command.seconds_left(lines, 30, "tokens", [ready(1000.0, "7.0")]) == 10


def test_the_speed_of_runs_of_another_unit(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dnt(["jobs"]) == 0
    assert "tokens/s" in capsys.readouterr().out.splitlines()[0]
    file = runs / "big" / "metrics.jsonl"
    file.write_text(file.read_text().replace("tokens_per_s", "images_per_s"))
    assert dnt(["jobs", "big"]) == 0
    assert "512\u00a0images/s" in capsys.readouterr().out
    assert dnt(["jobs"]) == 0
    assert "speed" in capsys.readouterr().out.splitlines()[0]
    assert dnt(["jobs", "--json"]) == 0
    big = json.loads(capsys.readouterr().out)["runs"][0]
    assert (big["unit"], big["units_per_s"]) == ("images", 512)


def test_a_cancel_where_there_is_no_slurm_changes_nothing(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dnt(["cancel", "waits"]) == 2
    assert "no SLURM here" in capsys.readouterr().err
    assert not run_record.read_submission(runs / "waits").cancelled


def test_a_cancel_of_a_run_that_is_over(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dnt(["cancel", "sweep/done"]) == 0
    assert capsys.readouterr().out == "sweep/done is not live: finished (all done)\n"


def test_an_end_found_out_is_written_for_good(runs: Path) -> None:
    events = timeline.read(runs / "big")
    lost = {
        "event": "lost",
        "time": time.time(),
        "attempt": "7.1",
        "message": "no answer",
        "hosts": ["node3"],
    }
    events.append(lost)
    job = Job("7", "TIMEOUT", restarts=1, ends=events[-2]["time"] + 5)
    found = run_state.decide_status(
        run_record.read_submission(runs / "big"), events, job, time.time(), asked=True
    )
    run_state.record_found_end(runs / "big", found, events, job)
    written = timeline.read(runs / "big")[-1]
    assert (written["attempt"], written["status"], written["next"]) == ("7.1", "killed", "none")
    assert written["reason"] == "job 7 ended without a word, SLURM says TIMEOUT; no answer"
    assert (written["blamed"], written["until"]) == (["node3"], job.ends)
    again = run_state.decide_status(
        run_record.read_submission(runs / "big"),
        timeline.read(runs / "big"),
        None,
        time.time(),
        asked=True,
    )
    assert (again.state, again.unrecorded) == ("killed", False)


@pytest.mark.skipif(os.getuid() != 0, reason="gives a file to another user, which takes root")
def test_a_run_of_another_user_is_shown_and_left_alone(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_state.is_ours(runs / "big")
    os.chown(runs / "big/jobs/run.json", 65534, 65534)
    assert not run_state.is_ours(runs / "big")
    assert dnt(["jobs", "big"]) == 0
    assert "running on" in capsys.readouterr().out
    assert dnt(["cancel", "big"]) == 2
    assert "belongs to another user" in capsys.readouterr().err


def test_watch_ends_with_ctrl_c(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        assert dnt(["jobs", "--watch"]) == 0
    finally:
        signal.signal(signal.SIGALRM, before)
    assert "sweep/done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(None, "-"), (0.4, "0"), (512.3, "512"), (12_345.0, "12.3k"), (1_204_000.0, "1.2M")],
)
def test_three_digits_of_a_rate(rate: float | None, expected: str) -> None:
    assert jobs_command.format_rate(rate) == expected


def test_no_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert dnt(["jobs"]) == 0
    assert "`dnt submit` does" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(RecordError, match="no job was submitted"):
        run_record.read_submission(tmp_path, of_any_owner=True)


def test_mlflow_gets_the_true_status_of_a_run_that_is_dead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time() - 2 * jobs_command.QUIET_S
    over = [
        queued(now, "7"),
        allocated(now, "7.0"),
        ended(now, "7.0", "killed", "none", "no word of it"),
    ]
    run_dir = submitted_run(tmp_path / "dead", over, "7")
    sqlite_store(tmp_path / "mlflow.db")
    training = start(
        tiny(
            synthetic_set(tmp_path / "set"), run_dir, "tracking.enabled=true", "train.steps=100000"
        ),
        env=IDLING,
    )
    until(lambda: run_state.read_mlflow_status(run_dir) == "RUNNING", 240)
    senders = [
        child
        for child in psutil.Process(training.processes[0].pid).children()
        if child.is_running()
    ]
    assert senders
    training.kill()
    for sender in senders:
        sender.kill()
    training.wait()
    timeline.path(run_dir).write_text("".join(json.dumps(event) + "\n" for event in over))

    assert dnt(["jobs", str(run_dir)]) == 0
    assert "MLflow RUNNING" in " ".join(capsys.readouterr().out.split())
    assert dnt(["jobs", str(run_dir)]) == 0
    assert "MLflow FAILED" in " ".join(capsys.readouterr().out.split())
