"""Whole training runs and what MLflow shows of them meanwhile: status, system metrics, goodput;
and no password.
"""

import json
import shlex
import signal
import socket
from pathlib import Path

from testbed.run import IDLING, start, steps_written, tiny
from testbed.stores import PASSWORD, points, runs, sqlite_store
from testbed.waiting import until


def test_a_run_that_is_stopped_and_goes_on(corpus, tmp_path):
    uri = sqlite_store(tmp_path / "mlflow.db")
    run_dir = tmp_path / "runs" / "tiny"
    system = run_dir / "logs" / "system" / f"{socket.gethostname()}.jsonl"
    overrides = [
        "train.steps=100000",
        "checkpoint.every=0",
        "eval.every=0",
        "tracking.enabled=true",
    ]
    overrides += [f"tracking.uri={uri}", "tracking.system_every_s=0.2"]
    env = {
        **IDLING,
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "PGPASSWORD": PASSWORD,
    }

    def until_mlflow_says(status: str) -> None:
        until(lambda: "tiny" in (found := runs(uri)) and found["tiny"].info.status == status)

    training = start(tiny(corpus, run_dir, *overrides), ranks=2, env=env)
    try:
        until_mlflow_says("RUNNING")
        until(lambda: steps_written(run_dir) > 5 and system.exists())
        assert PASSWORD.encode() not in command_lines()
        training.kill(signal.SIGUSR1)
        assert training.wait().code == 128 + signal.SIGUSR1
        until_mlflow_says("KILLED")

        training = start(tiny(corpus, run_dir, *overrides), ranks=2, env=env)
        until_mlflow_says("RUNNING")
        training.kill(signal.SIGTERM)
        assert training.wait().code == 128 + signal.SIGTERM
    finally:
        training.kill()
    last = steps_written(run_dir)
    start(
        tiny(corpus, run_dir, *overrides, f"train.steps={last + 1}"), ranks=2, env=env
    ).wait().ok()
    until_mlflow_says("FINISHED")

    assert [step for step, _ in points(uri, "tiny", "train/loss")] == list(range(1, last + 2))
    samples = [json.loads(line) for line in system.read_text().splitlines()]
    assert [sample["step"] for sample in samples] == sorted(sample["step"] for sample in samples)
    for name in ("cpu_percent", "memory_used_gb", "memory_percent", "disk_free_gb"):
        sent = points(uri, "tiny", f"system/{socket.gethostname()}/{name}")
        assert sent == [(sample["step"], sample[name]) for sample in samples]
        assert max(value for _, value in sent) > 0
    note = runs(uri)["tiny"].data.tags["mlflow.note.content"]
    assert f"folder `{run_dir}`" in note
    # as a shell reads it, lines that go on included
    how = shlex.split(note.partition("To go on with it:")[2])
    assert how[:2] == ["cd", str(Path.cwd())]
    last_start = [*tiny(corpus, run_dir, *overrides), f"train.steps={last + 1}"]
    assert [word for word in how[2:] if word != "\n"] == [
        "srun",
        "--ntasks=2",
        "python",
        "-m",
        "dnt_scale.train",
        *last_start,
    ]
    shown = runs(uri)["tiny"].data.metrics
    assert shown["goodput/attempts"] == 3
    assert 0 < shown["goodput/total"] < 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if PASSWORD.encode() in path.read_bytes()] == []


def command_lines() -> bytes:
    """Of every process, as `ps` shows them."""
    found = b""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found += (process / "cmdline").read_bytes()
        except OSError:  # ended meanwhile
            continue
    return found
