"""Run folders as `dnt submit` and its jobs leave them, without a job."""

import functools
import json
from pathlib import Path
from typing import Any

from cluster import run_record
from cluster.cluster_config import from_raw
from dnt_scale import config
from dnt_scale.record import timeline
from testbed.run import tiny

Event = dict[str, Any]


def submission(run_dir: Path, *jobs: str, cancelled: bool = False) -> run_record.Submission:
    return run_record.Submission(
        name=run_dir.name,
        cluster=from_raw({"nodes": 2, "time": 60}, "test"),
        jobs=list(jobs),
        logs=run_record.jobs_folder(run_dir) / "slurm",
        checkpoints=str(run_dir / "checkpoints"),
        cancelled=cancelled,
    )


def submitted_run(run_dir: Path, events: list[Event], *jobs: str, steps: int = 0) -> Path:
    """A folder with a submission of ``jobs``, a timeline, and the metrics of ``steps`` steps of
    100, one a second.
    """
    run_record.jobs_folder(run_dir).mkdir(parents=True)
    run_record.write_submission(run_dir, submission(run_dir, *jobs))
    run_record.config_file(run_dir).write_text(config_of_100_steps())
    timeline.path(run_dir).parent.mkdir()
    timeline.path(run_dir).write_text("".join(json.dumps(event) + "\n" for event in events))
    ready = next((event["time"] for event in reversed(events) if event["event"] == "ready"), 0.0)
    lines = [
        {
            "step": step,
            "tokens": 512 * step,
            "time": ready + step,
            "train/loss": 5 - step / 100,
            "tokens_per_s": 512.0,
        }
        for step in range(1, steps + 1)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


@functools.cache
def config_of_100_steps() -> str:
    return config.to_yaml(config.load(tiny(Path("set"), Path("run"), "train.steps=100")))


def queued(time: float, job: str, by_user: bool = True) -> Event:
    return {
        "event": "submitted",
        "time": time,
        "attempt": job,
        "job": job,
        "nodes": 2,
        "ranks": 2,
        "by_user": by_user,
    }


def allocated(time: float, attempt: str, nodes: tuple[str, ...] = ("node1", "node2")) -> Event:
    shape = {"nodes": list(nodes), "ranks": len(nodes)}
    return {
        "event": "allocated",
        "time": time,
        "attempt": attempt,
        **shape,
        "queued": time - 1,
        "started": time,
    }


def ready(time: float, attempt: str, step: int = 0) -> Event:
    return {"event": "ready", "time": time, "attempt": attempt, "step": step, "restored": 0.0}


def end(time: float, attempt: str, outcome: str, step: int = 9) -> Event:
    return {"event": "end", "time": time, "attempt": attempt, "outcome": outcome, "step": step}


def ended(
    time: float, attempt: str, status: str, then: str, reason: str = "why", *blamed: str
) -> Event:
    said = {"status": status, "next": then, "reason": reason, "blamed": list(blamed), "until": time}
    return {"event": "ended", "time": time, "attempt": attempt, **said}
