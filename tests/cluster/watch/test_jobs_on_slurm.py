"""`dnt jobs`, `dnt logs -f` and `dnt cancel` of a real run on a real SLURM, and ends that are found
out there."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import cluster_config, run_record
from cluster.submit.single_run import submit
from cluster.watch import run_state
from dnt_scale import config
from dnt_scale.cli.main import main as dnt
from dnt_scale.config import ConfigError
from dnt_scale.record import timeline
from dnt_scale.train.run_start import check_no_job
from testbed.run import steps_written, synthetic_set, tiny
from tests.helpers.folders import allocated, queued, ready, submitted_run
from tests.helpers.slurm import command, free, wait_for, wait_state

pytestmark = pytest.mark.usefixtures("slurm")


Submit = Callable[..., run_record.Submission]


@pytest.fixture
def submitted(tmp_path: Path) -> Iterator[Submit]:
    """Submits a run of far more steps than a test waits for, on two nodes."""
    synthetic_set(tmp_path / "set")
    jobs = []

    def submit_run(run_dir: Path, *site: str) -> run_record.Submission:
        cluster, _ = cluster_config.read_cluster(
            ["cluster=sandbox", "cluster.preflight=false", *site]
        )
        more = (
            f"run.name={run_dir.name}",
            "train.steps=100000",
            "checkpoint.every=50",
            "eval.every=0",
        )
        jobs.append(submit(config.load(tiny(tmp_path / "set", run_dir, *more)), cluster))
        return jobs[-1]

    yield submit_run
    free(*(job.job for job in jobs))


def test_a_run_from_the_queue_to_its_cancellation(
    submitted: Submit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "followed"
    job = submitted(run_dir).job
    follow = [sys.executable, "-m", "dnt_scale.cli", "logs", str(run_dir), "-f"]
    follower = subprocess.Popen(follow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: steps_written(run_dir) > 2, "the first steps")
        assert dnt(["jobs", str(tmp_path)]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "followed: running on node" in shown
        assert "of 100,000 (0%)" in shown
        assert f"{job}.0 node" in shown

        assert dnt(["cancel", str(run_dir)]) == 0
        told = capsys.readouterr().out
        step = steps_written(run_dir)
        reached = f"it reached step {step:,}, its newest checkpoint is of step {step:,}"
        assert (
            told == f"{run_dir} is cancelled; {reached}; `dnt resubmit {run_dir}` goes on with it\n"
        )
        out, err = follower.communicate(timeout=60)
    finally:
        follower.kill()
    assert follower.returncode == 0
    assert f"--- job {job} on node" in out
    assert f"stopped at step {step} with a checkpoint" in out
    assert "submitit INFO" not in out
    assert err.splitlines()[-1] == "dnt: followed: cancelled (dnt cancel)"

    assert run_record.read_submission(run_dir).cancelled
    assert dnt(["cancel", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"{run_dir} is not live: cancelled (dnt cancel)\n"
    last = timeline.read(run_dir)[-1]
    assert (last["event"], last["attempt"], last["next"]) == ("ended", f"{job}.0", "none")


def test_a_job_that_waits(
    submitted: Submit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is queued; then ended by somebody with scancel, which nobody can have written down."""
    run_dir = tmp_path / "waits"
    job = submitted(run_dir, "cluster.sbatch.begin=now+5hours").job
    dnt(["jobs", str(run_dir)])
    assert "waits: queued (may start in 5 h)" in capsys.readouterr().out
    dnt(["logs", str(run_dir)])
    assert "waits: nothing logged; queued (may start in 5 h)" in capsys.readouterr().err

    command("scancel", job).ok()
    wait_state(job, "CANCELLED")
    dnt(["jobs", str(run_dir)])
    assert "waits: cancelled (the job was cancelled)" in capsys.readouterr().out
    assert (
        timeline.read(run_dir)[-1]["event"] == "submitted"
    )  # its own word may still be on its way
    monkeypatch.setattr(run_state, "WRITTEN_AFTER_S", -5.0)
    dnt(["jobs", str(run_dir)])
    assert (timeline.read(run_dir)[-1]["event"], timeline.read(run_dir)[-1]["status"]) == (
        "ended",
        "cancelled",
    )


def test_a_job_that_waits_is_cancelled(
    submitted: Submit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = submitted(tmp_path / "waits", "cluster.sbatch.begin=now+5hours").job
    assert dnt(["cancel", str(tmp_path / "waits")]) == 0
    assert "waits is cancelled; it had not begun; `dnt resubmit" in capsys.readouterr().out
    assert wait_state(job, "CANCELLED")
    assert timeline.read(tmp_path / "waits")[-1]["reason"] == "dnt cancel"


def test_a_run_of_another_cluster_is_left_alone(
    submitted: Submit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "elsewhere"
    submitted(run_dir, "cluster.sbatch.begin=now+5hours")
    run_record.update_submission(run_dir, lambda now: now.model_copy(update={"slurm": "elsewhere"}))
    for what in ("resubmit", "cancel"):
        assert dnt([what, str(run_dir)]) == 2
        assert "its jobs are with the SLURM elsewhere, this one is" in " ".join(
            capsys.readouterr().err.split()
        )
    assert (
        timeline.read(run_dir)[-1]["event"] == "submitted"
        and not run_record.read_submission(run_dir).cancelled
    )
    run_record.record_end(
        run_dir, f"{run_record.read_submission(run_dir).job}.0", "crashed", "none", "over there"
    )
    command("scancel", run_record.read_submission(run_dir).job).ok()
    assert dnt(["resubmit", str(run_dir), "--dry-run"]) == 0  # what is over there may go on here


@pytest.fixture(params=["sacct", "no sacct"])
def accounting(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM's commands as they are, and as on a site without accounting."""
    if request.param == "no sacct":
        (tmp_path / "bin").mkdir()
        for name in ("scontrol", "scancel", "squeue"):
            (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.mark.usefixtures("accounting")
@pytest.mark.parametrize("mine", [True, False])
def test_a_job_that_slurm_has_forgotten(
    tmp_path: Path, mine: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.time() - 2 * run_state.FORGETS_S
    events = [queued(began, "39999999"), allocated(began, "39999999.0"), ready(began, "39999999.0")]
    run_dir = submitted_run(tmp_path / "gone", events, "39999999", steps=5)
    if not mine:
        os.chown(run_record.jobs_folder(run_dir) / "run.json", 65534, 65534)
    with pytest.raises(
        ConfigError, match=rf"in use by job 39999999, .* `dnt jobs {run_dir}` finds that out"
    ):
        check_no_job(run_dir)  # of training that does not ask SLURM; the advice is followed here
    assert dnt(["jobs", str(run_dir)]) == 0
    if mine:
        check_no_job(run_dir)
    shown = " ".join(capsys.readouterr().out.split())
    assert "gone: killed (job 39999999 ended without a word, SLURM has forgotten it)" in shown
    assert f"`dnt resubmit {run_dir}` goes on with it" in shown
    assert timeline.read(run_dir)[-1]["event"] == ("ended" if mine else "ready")


def test_another_run_has_the_job_number_now(
    submitted: Submit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SLURM was set up anew since, and began to count anew."""
    job = submitted(tmp_path / "new", "cluster.sbatch.begin=now+5hours").job
    began = time.time() - 2 * run_state.FORGETS_S
    old = submitted_run(tmp_path / "old", [queued(began, job), allocated(began, f"{job}.0")], job)
    assert dnt(["cancel", str(old)]) == 0
    assert "old is not live: killed" in capsys.readouterr().out
    dnt(["jobs", str(tmp_path / "new")])
    assert "new: queued" in capsys.readouterr().out
