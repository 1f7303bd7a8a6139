"""`dnt submit --multirun`: a sweep on a real SLURM, preempted, cancelled,
resumed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import run_record, sweep_jobs
from cluster.run_record import Submission
from cluster.watch.jobs_command import RunSummary, format_results
from dnt_scale.cli.main import main as dnt
from dnt_scale.config import ConfigError
from dnt_scale.record import timeline
from dnt_scale.sweep import sweep_file
from dnt_scale.sweep.sweep_file import Sweep, SweepRun
from testbed.run import metrics, start, steps_written, synthetic_set, tiny
from testbed.stores import runs as mlflow_runs
from testbed.stores import sqlite_store
from tests.helpers.slurm import command, free, state, submit, wait_for

# --- what is on disk ------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A sweep of two, which nothing was told of yet."""
    folder = tmp_path / "lrs"
    for name in ("0-lr_1", "1-lr_3"):
        (folder / name).mkdir(parents=True)
    runs = [
        SweepRun(name="0-lr_1", values={"optim.lr": "1"}),
        SweepRun(name="1-lr_3", values={"optim.lr": "3"}),
    ]
    sweep_file.write_sweep(folder, Sweep(name="lrs", id="abc", runs=runs))
    return folder


def test_a_task_finds_its_run(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert sweep_jobs.run_of_task(two) == two / "1-lr_3"
    assert sweep_jobs.run_of_task(two / "0-lr_1") == two / "0-lr_1"  # resumed by a job of its own


@pytest.mark.parametrize(
    ("one", "other", "whole"),
    [
        ("finished", "finished", "FINISHED"),
        ("finished", "refused", "FAILED"),
        ("finished", "cancelled", "KILLED"),
        ("finished", None, None),
    ],
)
def test_the_end_of_a_sweep_is_that_of_all_its_runs(
    two: Path, one: str, other: str | None, whole: str | None
) -> None:
    for name, status in (("0-lr_1", one), ("1-lr_3", other)):
        run_record.record_end(two / name, "7_0.0", "stopped", "requeued", "preempted")
        if status:
            run_record.record_end(two / name, "7_0.1", status, "none", "")  # type: ignore[arg-type]
    assert sweep_jobs.outcome(two) == whole


def test_a_damaged_sweep_is_named(two: Path) -> None:
    (two / sweep_file.FILE).write_text("{")
    with pytest.raises(ConfigError, match=r"sweep\.json: cannot be read"):
        sweep_file.read_sweep(two)


def test_results_begin_with_the_lowest_validation_loss(two: Path) -> None:
    runs = [
        RunSummary(two / name, name, "running", "", "", True, step=1000, loss=loss, val_loss=val)
        for name, loss, val in (("0-lr_1", 2.0, None), ("1-lr_3", 3.0, 2.5))
    ]
    [table] = format_results(runs)
    assert [column.header for column in table.columns] == [
        "run",
        "optim.lr",
        "step",
        "train/loss",
        "val/loss",
        "state",
    ]
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("1-lr_3", "3", "1,000", "3.0000", "2.5000", "running"),
        ("0-lr_1", "1", "1,000", "2.0000", "-", "running"),
    ]


# --- on SLURM -------------------------------------------------------------------------------------

LRS = ("0.03", "0.1", "0.2", "0.3")
SITE = ("cluster=sandbox", "cluster.partition=low", "cluster.nodes=1", "cluster.nodelist=node1")
SITE += ("cluster.cpus_per_rank=2", "cluster.mem_gb=null", "cluster.preflight=false")


def small(data: Path, run_dir: Path, *more: str) -> list[str]:
    """Some seconds of training in quick steps."""
    quick = ("train.steps=200", "train.global_batch=2", "eval.every=100", "checkpoint.every=100")
    return tiny(data, run_dir, *quick, *more)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return synthetic_set(tmp_path / "set")


def submissions(folder: Path) -> list[Submission]:
    return [
        run_record.read_submission(folder / run.name) for run in sweep_file.read_sweep(folder).runs
    ]


@pytest.fixture
def lrs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a sweep; its jobs end with the test."""
    monkeypatch.setenv(
        "OMP_NUM_THREADS", "1"
    )  # for the jobs, which have two CPUs each only to fill a node
    folder = tmp_path / "runs" / "lrs"
    yield folder
    if sweep_file.is_sweep(folder):
        free(
            *(
                job.partition("_")[0]
                for submission in submissions(folder)
                for job in submission.jobs
            )
        )


@pytest.mark.usefixtures("slurm")
def test_a_sweep_of_which_two_are_preempted(
    lrs: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends with the table and the metrics of the same runs without SLURM, and as one family in
    MLflow."""
    overrides = small(
        data, lrs, "run.name=lrs", f"optim.lr={','.join(LRS)}", "tracking.enabled=true"
    )
    uri = sqlite_store(lrs.parent / "mlflow.db")
    assert dnt(["submit", "--multirun", *overrides, *SITE]) == 0
    array = submissions(lrs)[0].job.partition("_")[0]
    assert [submission.jobs for submission in submissions(lrs)] == [
        [f"{array}_{task}"] for task in range(4)
    ]
    places = [lrs / submission.name for submission in submissions(lrs)]
    assert {place.stat().st_mode & 0o777 for place in (lrs, *places)} == {0o700}
    assert {(place / "jobs" / "code").readlink() for place in places} == {Path("../../jobs/code")}

    wait_for(
        lambda: all(steps_written(place) > 0 for place in places), "the first steps", timeout=300.0
    )
    greedy = submit("sleep 3600", "--partition=high", "--nodelist=node1", "--cpus-per-task=4")
    alone = [lrs.parent / "alone" / lr for lr in LRS]
    try:
        wait_for(lambda: state(greedy) == "RUNNING", "two of four to make room")
        others = [
            start(small(data, folder, f"optim.lr={lr}"))
            for folder, lr in zip(alone, LRS, strict=True)
        ]
    finally:
        free(greedy)
    wait_for(lambda: sweep_jobs.outcome(lrs), "the end of the sweep", timeout=900.0)
    assert [other.wait().code for other in others] == [0] * 4
    assert [metrics(place) for place in places] == [metrics(folder) for folder in alone]
    assert sum(starts(place) > 1 for place in places) >= 2
    for place in places:
        ends = [
            (event["status"], event["next"])
            for event in timeline.read(place)
            if event["event"] == "ended"
        ]
        assert ends == [*[("stopped", "requeued")] * (starts(place) - 1), ("finished", "none")]

    capsys.readouterr()
    assert dnt(["jobs", str(lrs)]) == 0
    table = capsys.readouterr().out.partition("lowest val/loss first")[2].splitlines()[2:]
    best = [
        (row["val/loss"], lr)
        for folder, lr in zip(alone, LRS, strict=True)
        for row in metrics(folder)[-1:]
    ]
    rows = [line.split() for line in table]
    assert [(row[1], row[4], row[5]) for row in rows] == [
        (lr, f"{loss:.4f}", "finished") for loss, lr in sorted(best)
    ]

    expected = {"lrs", *(place.name for place in places)}

    def all_is_told() -> bool:
        """A sender may still be at work; where it was killed with its job, `dnt jobs` sends."""
        assert dnt(["jobs", str(lrs)]) == 0
        found = mlflow_runs(uri)
        return set(found) == expected and found["lrs"].info.status == "FINISHED"

    wait_for(all_is_told, "all runs, and the parent's end, in MLflow")
    family = mlflow_runs(uri)
    parent = family.pop("lrs").info.run_id
    assert {child.data.tags["mlflow.parentRunId"] for child in family.values()} == {parent}
    assert {child.info.status for child in family.values()} == {"FINISHED"}


def starts(run_dir: Path) -> int:
    return sum(event["event"] == "allocated" for event in timeline.read(run_dir))


@pytest.mark.usefixtures("slurm")
def test_a_sweep_is_cancelled_and_one_of_it_goes_on(
    lrs: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = small(
        data,
        lrs,
        "run.name=lrs",
        "optim.lr=0.1,0.3",
        "train.steps=3",
        "cluster.sbatch.begin=now+5hours",
    )
    assert dnt(["submit", "--multirun", *overrides, *SITE]) == 0
    for again in (["--multirun", *overrides], small(data, lrs, "run.name=lrs")):
        assert dnt(["submit", *again, *SITE]) == 2
    refused = capsys.readouterr().err.splitlines()
    assert "run.name: lrs was submitted before; `dnt jobs" in refused[0]
    assert "run.name: lrs is a sweep, see `dnt jobs" in refused[1]

    assert dnt(["cancel", str(lrs)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(";")[0] for line in told] == [
        f"{lrs}/{name} is cancelled" for name in ("0-lr_0.1", "1-lr_0.3")
    ]
    assert sweep_jobs.outcome(lrs) == "KILLED"
    assert command("squeue", "--noheader", "--name=dnt-lrs").out == ""

    run_dir = lrs / "1-lr_0.3"
    assert dnt(["resubmit", str(run_dir), "cluster.sbatch.begin=now"]) == 0
    wait_for(lambda: sweep_jobs.outcome(lrs) is None or steps_written(run_dir) == 3, "the new job")
    wait_for(lambda: sweep_jobs.outcome(lrs), "its end")
    assert steps_written(run_dir) == 3
    first, second = run_record.read_submission(run_dir).jobs
    assert first.endswith("_1")
    assert "_" not in second


@pytest.mark.usefixtures("slurm")
def test_nothing_is_queued_when_one_combination_is_wrong(
    lrs: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = small(
        data, lrs, "run.name=lrs", "train.global_batch=4,5", "cluster.ranks_per_node=2"
    )
    assert dnt(["submit", "--multirun", *overrides, *SITE]) == 2
    said = capsys.readouterr().err
    assert "train.global_batch" in said
    assert len(said.splitlines()) == 1
    assert dnt(["submit", "--multirun", *overrides, *SITE[1:]]) == 2
    assert "cluster: say which" in capsys.readouterr().err
    assert not lrs.exists()


@pytest.mark.usefixtures("slurm")
def test_a_dry_run_shows_the_array_and_leaves_nothing(
    lrs: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = small(
        data, lrs, "run.name=lrs", "optim.lr=0.1,0.3", "cluster.sweep_parallel=1", "--dry-run"
    )
    assert dnt(["submit", "--multirun", *overrides, *SITE]) == 0
    shown = capsys.readouterr().out
    assert "sweep        2 runs as one array, 1 at a time" in shown
    assert "1-lr_0.3  optim.lr=0.3" in shown
    assert "#SBATCH --array=0-1%1" in shown
    assert f'-m cluster.submit.on_exit {lrs} "$status"' in shown
    assert not lrs.exists()
