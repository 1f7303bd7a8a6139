"""Real runs on a real SLURM, through what ends jobs: a short `python -m benchmarks.soak`, and each
command."""

import json
import sys
from pathlib import Path

import pytest

from cluster import run_record
from dnt_scale.record import timeline
from dnt_scale.record.metrics_file import METRICS
from testbed.run import TINY_RUN, Finished, synthetic_set
from testbed.soak import soak, steps_for
from tests.helpers.slurm import command, free, no_accounting, wait_for

pytestmark = pytest.mark.usefixtures("slurm")


def dnt(*words: object) -> Finished:
    return command(sys.executable, "-m", "dnt_scale.cli", *words)


def step(run_dir: Path) -> int:
    try:
        return int(json.loads((run_dir / METRICS).read_bytes().splitlines()[-1])["step"])
    except (OSError, IndexError, ValueError):
        return 0


def test_a_run_goes_on_bitwise_through_preemption_a_killed_rank_and_a_lost_mlflow_server(
    tmp_path: Path,
) -> None:
    events = ["preempt", "mlflow", "kill-rank-1"]
    result = soak(tmp_path, events, steps_for(events))
    failed = [
        what
        for what, good in result["checks"].items()
        if not good and not what.startswith("back within")
    ]
    assert not failed, result


def test_without_accounting_every_command_answers_and_a_run_goes_on_with_fewer_nodes(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "runs" / "bare"
    overrides = [
        *TINY_RUN,
        f"data.path={synthetic_set(tmp_path / 'set')}",
        "run.name=bare",
        f"run.dir={run_dir}",
    ]
    with no_accounting():
        assert command("sacct").code != 0
        dnt("submit", *overrides, "train.steps=5000", "eval.every=0", "cluster=sandbox").ok()
        try:
            wait_for(lambda: step(run_dir) > 20, "20 steps")
            (row,) = json.loads(dnt("jobs", run_dir, "--json").ok().out)["runs"]
            assert (row["state"], row["live"]) == ("running", True)
            assert (
                dnt("submit", *overrides, "cluster=sandbox")
                .error()
                .startswith("error: run.name: bare was submitted")
            )
            assert "is running" in dnt("resubmit", run_dir).error()
            assert "is cancelled" in dnt("cancel", run_dir).ok().out
            reached = step(run_dir)
            (row,) = json.loads(dnt("jobs", run_dir, "--json").ok().out)["runs"]
            assert (row["state"], row["live"]) == ("cancelled", False)
            dnt("resubmit", run_dir, "cluster.nodes=1", f"train.steps={reached + 30}").ok()
            wait_for(lambda: ended(run_dir) == "finished", "the end of the run")
        finally:
            free()
        (row,) = json.loads(dnt("jobs", run_dir, "--json").ok().out)["runs"]
        assert (row["state"], row["live"]) == ("finished", False)
        said = dnt("logs", run_dir).ok().out
    assert [
        json.loads(line)["step"] for line in (run_dir / METRICS).read_bytes().splitlines()
    ] == list(range(1, reached + 31))
    assert (
        f"stopped at step {reached} with a checkpoint" in said
        and f"done: {reached + 30} steps" in said
    )
    starts = [event for event in timeline.read(run_dir) if event["event"] == "ready"]
    assert [event["step"] for event in starts] == [0, reached]


def ended(run_dir: Path) -> str:
    end = run_record.last_event(timeline.read(run_dir), "ended")
    return end["status"] if end and end["next"] == "none" else ""
