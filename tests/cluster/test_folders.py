"""Jobs from working folders with odd names and contents, on a real SLURM."""

from pathlib import Path

import pytest

from cluster import run_record, slurm
from cluster.job import rank_main
from cluster.run_record import RecordError
from cluster.submit import data_prep_jobs, single_run
from dnt_scale.cli.main import main as dnt
from testbed.run import synthetic_set, tiny
from tests.helpers.slurm import free, wait_for

# what Python, submitit and our own packages would import from there
SHADOWS = (
    "queue.py",
    "types.py",
    "random.py",
    "submitit.py",
    "numpy.py",
    "cluster.py",
    "configs/__init__.py",
)


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose name SLURM's patterns and a shell would read, with files in the way of
    imports."""
    folder = tmp_path / "around" / "50%j 'x\" 100% [é]"
    for name in SHADOWS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("raise SystemExit('imported from the working folder')\n")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.usefixtures("slurm")
def test_a_run_a_sweep_and_a_set_from_an_odd_folder(
    odd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = (
        "train.steps=2",
        "eval.every=0",
        "optim.schedule.warmup_steps=0",
        "cluster=sandbox",
        "cluster.nodes=1",
    )
    ask = [
        *tiny(synthetic_set(odd.parent.parent / "set"), Path("runs/one")),
        *few,
        "cluster.preflight=false",
    ]
    (odd / "text.txt").write_text("a line of text that is told again, and again\n" * 400)
    site = ("--cluster", "sandbox", "cluster.mem_gb=null", "cluster.partition=low")
    sizes = ("--vocab-size", "280", "--seq-len", "16", "--val-fraction", "0", "--tasks", "2")
    others = set(slurm.queue())
    try:
        assert dnt(["submit", *ask, "run.name=one"]) == 0
        assert (
            dnt(
                [
                    "submit",
                    "--multirun",
                    *ask,
                    "run.name=two",
                    "run.dir=runs/two",
                    "optim.lr=0.1,0.2",
                ]
            )
            == 0
        )
        assert dnt(["data", "prepare", "text.txt", "--out", "made", *sizes, *site]) == 0
        wait_for(lambda: set(slurm.queue()) <= others, "the end of the jobs", timeout=300)
        (sweep,) = (odd / "runs").glob("two")
        runs = [
            odd / "runs" / "one",
            *sorted(place for place in sweep.iterdir() if (place / "jobs").is_dir()),
        ]
        assert len(runs) == 3
        capsys.readouterr()
        for run in runs:
            assert dnt(["logs", str(run)]) == 0
            assert "done: 2 steps" in capsys.readouterr().out, run
        assert (odd / "made" / "manifest.json").exists()
        assert [place.name for place in odd.parent.iterdir()] == [odd.name]
        logs = list(
            run_record.jobs_folder(data_prep_jobs.state_folder(odd / "made")).glob(
                "slurm/*_log.out"
            )
        )
        assert len(logs) == 4  # tokenizer, two tasks, merge
    finally:
        if ours := set(slurm.queue()) - others:
            free(*ours)


@pytest.mark.parametrize(
    ("folder", "name"),
    [("a\\b", "a backslash"), ("x/two\nlines", "a line break"), ("c:d/runs", "a colon")],
)
def test_names_that_a_job_cannot_work_with_are_refused(folder: str, name: str) -> None:
    with pytest.raises(
        RecordError, match=f"has {name} in it, which a job cannot work with; rename that folder"
    ):
        single_run.log_files(Path("/home") / folder, array=False, task="0")


@pytest.mark.parametrize("array", [True, False])
def test_slurms_own_signs_are_the_only_ones_left(array: bool) -> None:
    found = single_run.log_files(Path("/r/100%/50%j/%%t"), array=array, task="%t")
    assert found == f"/r/100%%/50%%j/%%%%t/{'%A_%a' if array else '%j'}_%t_log.out"


def test_submitit_finds_its_files_below_such_a_folder(tmp_path: Path) -> None:
    from submitit.core.utils import JobPaths

    rank_main.name_files_only()
    rank_main.name_files_only()
    folder = tmp_path / "50%j" / "%A %a %t" / "slurm"
    assert JobPaths(folder, "7_3", 1).submitted_pickle == folder / "7_3_submitted.pkl"
    assert JobPaths(folder, "7_3", 1).submission_file == folder / "7_submission.sh"
    assert JobPaths(folder, "7", 1).result_pickle == folder / "7_1_result.pkl"
    assert (
        JobPaths(folder, "7").folder == JobPaths.get_first_id_independent_folder(folder) == folder
    )
    assert JobPaths(folder).stdout == folder / "%j_%t_log.out"
