"""Starts of a run as its MLflow sender sees them, without training and in this process.

The sender's own code, real MLflow and real SQLite; a process of its own would import MLflow for seconds every time.
"""

from pathlib import Path
from typing import Any

import pytest

from dnt_scale.record.files import read_json
from dnt_scale.record.metrics_file import unsent_lines
from dnt_scale.record.mlflow import sender
from dnt_scale.record.tracker import Tracker


def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``Tracker.start`` leave the sender to ``begin`` and ``start``."""
    monkeypatch.setattr(Tracker, "_start_sender", lambda self: None)


def begin(run_dir: Path, steps: int, run_id: str = "trained", **changes: Any) -> sender._Sender:
    """What training does at a start and in ``steps`` steps more, and its sender, which has sent nothing yet."""
    done = (run_dir / "metrics.jsonl").read_bytes().count(b"\n") if (run_dir / "metrics.jsonl").exists() else 0
    options: dict[str, Any] = {
        "uri": None,
        "experiment": "tests",
        "run_name": run_dir.name,
        "params": {"optim.lr": 1.0},
        "tags": {"config": f"run:\n  dir: {run_dir}\n"},
        "description": f"in {run_dir}",
    }
    tracker = Tracker.start(run_dir, run_id=run_id, enabled=True, resume_step=done, **{**options, **changes})
    for step in range(done + 1, done + steps + 1):
        tracker.log({"step": step, "time": float(step), "train/loss": 1 / step})
    tracker.finish("FINISHED")
    return sender._Sender(run_dir, read_json(run_dir / "logs" / "tracking.json"), live=True)


def start(run_dir: Path, steps: int = 2, **changes: Any) -> str:
    """One start from its first step to its end; returns the id of its MLflow run."""
    started = begin(run_dir, steps, **changes)
    assert sender._send_all(started, sender._Gone("FINISHED")) == 0
    assert unsent_lines(run_dir) == 0
    return started.mlflow_run_id


def client(run_dir: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(read_json(run_dir / "logs" / "tracking.json")["key"]["uri"])


def shown(run_dir: Path) -> tuple[str, list[int]]:
    """The name and the steps of the MLflow run that a folder fills."""
    found, mine = client(run_dir), read_json(run_dir / "logs" / "mlflow.json")["mlflow_run_id"]
    history = found.get_metric_history(mine, "train/loss")
    return found.get_run(mine).info.run_name, [point.step for point in history]
