"""Starts of a run as a sender of its sees them, without training and in this process.

The sender's own code, real MLflow and real SQLite; a process of its own would import MLflow for
seconds every time.
"""

from pathlib import Path
from typing import Any

import pytest

from dnt_scale.record.files import read_json
from dnt_scale.record.sender import Sender, send_all
from dnt_scale.record.sender_files import read_order, unsent_lines
from dnt_scale.record.tracker import Tracker
from dnt_scale.record.training_process import EndedTraining


def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``Tracker.start`` leave the sender to ``begin`` and ``start``."""
    monkeypatch.setattr(Tracker, "_start_senders", lambda self, order: None)


def begin(run_dir: Path, steps: int, run_id: str = "trained", **changes: Any) -> Sender:
    """What training does at a start and in ``steps`` steps more, and its sender, which has sent
    nothing yet.
    """
    done = (
        (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
        if (run_dir / "metrics.jsonl").exists()
        else 0
    )
    options: dict[str, Any] = {
        "uri": None,
        "experiment": "tests",
        "run_name": run_dir.name,
        "params": {"optim.lr": 1.0},
        "tags": {"config": f"run:\n  dir: {run_dir}\n"},
        "description": f"in {run_dir}",
    }
    tracker = Tracker.start(
        run_dir, run_id=run_id, enabled=True, resume_step=done, **{**options, **changes}
    )
    for step in range(done + 1, done + steps + 1):
        tracker.log({"step": step, "time": float(step), "train/loss": 1 / step})
    tracker.finish("FINISHED")
    order = read_order(run_dir)
    return Sender(run_dir, order, order["backends"][0], live=True)


def start(run_dir: Path, steps: int = 2, **changes: Any) -> str:
    """One start from its first step to its end; returns the id of its MLflow run."""
    started = begin(run_dir, steps, **changes)
    assert send_all(started, EndedTraining("FINISHED")) == 0
    assert unsent_lines(run_dir) == 0
    return mlflow_run_of(started)


def mlflow_run_of(sender: Sender) -> str:
    """The id of the MLflow run that a sender fills; "" where it sends to another backend."""
    return str(sender.sent.own.get("mlflow_run_id", ""))


def client(run_dir: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(read_json(run_dir / "logs" / "tracking.json")["key"]["uri"])


def shown(run_dir: Path) -> tuple[str, list[int]]:
    """The name and the steps of the MLflow run that a folder fills."""
    found, mine = client(run_dir), read_json(run_dir / "logs" / "mlflow.json")["mlflow_run_id"]
    history = found.get_metric_history(mine, "train/loss")
    return found.get_run(mine).info.run_name, [point.step for point in history]
