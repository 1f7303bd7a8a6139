"""Runs whose training and sender were both killed; the parent runs of sweeps. Real MLflow, real
SQLite, real kills.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dnt_scale.record.appended import append_evaluation
from dnt_scale.record.finalize import finalize_run, finalize_sweep, send_rest
from dnt_scale.record.tracker import Tracker
from testbed.stores import PATIENCE_S, points, runs, sqlite_store
from testbed.waiting import until

pytestmark = pytest.mark.slow

TRACKED = """
import signal, sys
from pathlib import Path
from dnt_scale.record.tracker import Tracker
run_dir, uri, lines = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
tracker = Tracker.start(run_dir, uri=uri, experiment="tests", run_name=run_dir.name,
                        run_id=f"id-{run_dir.name}", params={}, tags={}, enabled=True,
                        resume_step=0)
for step in range(1, lines + 1):
    tracker.log({"step": step, "tokens": step, "train/loss": 1 / step})
print(tracker.senders[0].process.pid, flush=True)
signal.pause()
"""


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return sqlite_store(tmp_path / "runs" / "mlflow.db")


@contextlib.contextmanager
def tracked(run_dir: Path, uri: str, lines: int) -> Iterator[list[int]]:
    """A process that has written some lines, and its sender: their ids. Killed at the end, if
    they are still there.
    """
    command = [sys.executable, "-c", TRACKED, str(run_dir), uri, str(lines)]
    training = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert training.stdout is not None
    sender = int(training.stdout.readline())
    try:
        yield [training.pid, sender]
    finally:
        kill([training.pid, sender])
        training.wait()


def kill(processes: list[int]) -> None:
    # the sender first, which would say KILLED when it sees training go
    for process in reversed(processes):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def state(run_dir: Path) -> dict:
    with contextlib.suppress(FileNotFoundError):
        return json.loads((run_dir / "logs" / "mlflow.json").read_text())
    return {}


def sample(run_dir: Path, step: int, node: str = "node1") -> None:
    file = run_dir / "logs" / "system" / f"{node}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(
            json.dumps({"time": time.time(), "step": step, "cpu_percent": 50.0 + step}) + "\n"
        )


def test_a_run_that_was_killed_with_its_sender_gets_its_true_status_once(tmp_path, uri, capfd):
    run_dir = tmp_path / "runs" / "victim"
    with tracked(run_dir, uri, 50) as processes:
        sample(run_dir, 1)
        until(lambda: state(run_dir).get("sent_step") == 50 and state(run_dir).get("sent_bytes"))
        assert os.getpriority(os.PRIO_PROCESS, processes[1]) == os.nice(0) + 10
        weight = Path(f"/proc/{processes[1]}/autogroup")
        if weight.exists():  # else its niceness alone says what it may take from training
            assert weight.read_text().endswith(" nice 10\n")
        assert not finalize_run(run_dir, "FAILED")  # its sender is at work
        assert (
            "MLflow was not told that victim is FAILED: its sender is still at work"
            in capfd.readouterr().err
        )
        kill(processes)
    assert runs(uri)["victim"].info.status == "RUNNING"
    # what was written while nobody sent
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 51, "tokens": 51, "train/loss": 0.5}) + "\n")
    os.utime(run_dir / "metrics.jsonl", (2e9, 2e9))
    sample(run_dir, 51)
    sample(run_dir, 51, "node2")
    for file in ("plots/loss.png", "profile/summary.txt"):
        (run_dir / file).parent.mkdir()
        (run_dir / file).write_bytes(b"a picture, or a text")

    assert finalize_run(run_dir, "FAILED")
    run = runs(uri)["victim"]
    assert run.info.status == "FAILED"
    assert run.info.end_time == 2_000_000_000_000  # when it gave its last sign
    assert [step for step, _ in points(uri, "victim", "train/loss")] == list(range(1, 52))
    assert points(uri, "victim", "system/node1/cpu_percent") == [(1, 51.0), (51, 101.0)]
    assert points(uri, "victim", "system/node2/cpu_percent") == [(51, 101.0)]
    for file in ("plots/loss.png", "profile/summary.txt"):
        assert len(list((tmp_path / "runs" / "mlartifacts").rglob(file))) == 1

    log = (run_dir / "logs" / "mlflow.log").stat()
    before = state(run_dir)
    # nothing to do: no process is started, which would write
    assert finalize_run(run_dir, "FAILED")
    assert state(run_dir) == before
    assert (run_dir / "logs" / "mlflow.log").stat() == log
    assert finalize_run(run_dir, "KILLED")  # somebody knows better
    assert runs(uri)["victim"].info.status == "KILLED"
    assert len(points(uri, "victim", "train/loss")) == 51
    assert len(points(uri, "victim", "system/node1/cpu_percent")) == 2

    append_evaluation(run_dir, 40, {"lm_eval/own/acc": 0.25})
    assert send_rest(run_dir)
    assert points(uri, "victim", "lm_eval/own/acc") == [(40, 0.25)]
    assert runs(uri)["victim"].info.status == "KILLED"
    before = state(run_dir)
    assert send_rest(run_dir)
    assert state(run_dir) == before
    assert capfd.readouterr().err == ""


def test_a_run_that_is_not_tracked_is_finalized(tmp_path):
    assert finalize_run(tmp_path, "FAILED")
    assert finalize_sweep(tmp_path, "FAILED")
    command = [sys.executable, "-m", "dnt_scale.record.finalize", str(tmp_path)]
    assert subprocess.run([*command, "FAILED"]).returncode == 0
    assert subprocess.run([*command, "RUNNING"], capture_output=True).returncode == 2


@pytest.mark.parametrize("answers", [True, False])
def test_a_store_that_does_not_answer_is_left_alone(tmp_path, capfd, monkeypatch, answers):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    run_dir = tmp_path / "runs" / "cut-off"
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers:  # accepts, and never says a word
            server.listen()
        with tracked(run_dir, f"http://127.0.0.1:{server.getsockname()[1]}", 3) as processes:
            kill(processes)
        assert not finalize_run(run_dir, "KILLED")
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert f"MLflow was not told that cut-off is KILLED: see {run_dir}/logs/mlflow.log" in said
    assert "error" in state(run_dir)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away takes root")
def test_another_users_run_folder_does_not_say_where_ones_password_goes(tmp_path, capfd):
    run_dir = tmp_path / "theirs"
    (run_dir / "logs").mkdir(parents=True)
    order = {"key": {"uri": "http://127.0.0.1:9", "run_id": "x"}}
    (run_dir / "logs" / "tracking.json").write_text(json.dumps(order))
    shutil.chown(run_dir, "nobody")
    assert not finalize_run(run_dir, "FAILED")
    assert "it is another user's" in capfd.readouterr().err
    assert not (run_dir / "logs" / "mlflow.log").exists()


def child(run_dir: Path, uri: str, resume_step: int = 0) -> Tracker:
    return Tracker.start(
        run_dir,
        uri=uri,
        experiment="tests",
        run_name=run_dir.name,
        run_id=f"id-{run_dir.name}",
        params={},
        tags={},
        enabled=True,
        resume_step=resume_step,
    )


def test_children_that_start_at_once_share_one_parent(tmp_path, uri, monkeypatch):
    monkeypatch.setenv("DNT_PARENT", "sweep-1:learning rates")
    trackers = [child(tmp_path / "runs" / f"lr-{number}", uri) for number in range(3)]
    for tracker in trackers:
        tracker.log({"step": 1, "train/loss": 2.0})
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda tracker: tracker.finish("FINISHED", PATIENCE_S), trackers))
    found = runs(uri)
    assert sorted(found) == ["learning rates", "lr-0", "lr-1", "lr-2"]
    parent = found.pop("learning rates")
    assert parent.data.tags["dnt.run_id"] == "sweep-1"
    assert parent.info.status == "RUNNING"
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent.info.run_id}
    assert {run.info.status for run in found.values()} == {"FINISHED"}

    one = tmp_path / "runs" / "lr-2"
    assert finalize_sweep(one, "FAILED")
    assert runs(uri)["learning rates"].info.status == "FAILED"
    before = (one / "logs" / "mlflow.log").stat()
    assert finalize_sweep(tmp_path / "runs" / "lr-0", "FAILED")
    assert (one / "logs" / "mlflow.log").stat() == before

    # a child is run again, so the sweep goes on
    child(one, uri, resume_step=1).finish("FINISHED", PATIENCE_S)
    found = runs(uri)
    assert found["learning rates"].info.status == "RUNNING"
    assert found["learning rates"].info.run_id == parent.info.run_id
    assert len(found) == 4


@pytest.mark.parametrize("said", ["sweep", "sweep:", "../sweep:name", ":name"])
def test_a_wrong_parent_is_refused(tmp_path, monkeypatch, said):
    monkeypatch.setenv("DNT_PARENT", said)
    with pytest.raises(ValueError, match=r"DNT_PARENT is .*, expected ID:NAME"):
        child(tmp_path / "run", "http://127.0.0.1:9")
