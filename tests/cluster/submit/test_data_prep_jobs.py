"""`dnt data prepare --cluster` and `dnt data images --cluster` on a real SLURM: the bytes of a run
here, and what they say before and after."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import slurm
from cluster.submit import data_prep_jobs
from cluster.submit.data_prep_jobs import PrepareOrder
from data_prep.images.options import ImageOptions
from data_prep.images.pipeline import prepare_images
from data_prep.options import PrepareOptions
from data_prep.pipeline import prepare as prepare_here
from dnt_scale.cli.data import rules_file
from dnt_scale.cli.main import main as dnt
from testbed.corpus import contents, python_source_files
from testbed.images import class_folders
from tests.helpers.slurm import command, free, wait_for

SITE = ("--cluster", "sandbox", "cluster.partition=low", "cluster.mem_gb=null")
OPTIONS = (
    "--vocab-size",
    "400",
    "--seq-len",
    "64",
    "--val-fraction",
    "0.1",
    "--clean",
    "light",
    "--dedup",
    "near",
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that paths are seen from, with a corpus in `books`."""
    (tmp_path / "books").mkdir()
    for number, file in enumerate(python_source_files(300_000)):
        shutil.copy(file, tmp_path / "books" / f"{number}.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def jobs(here: Path) -> Iterator[Path]:
    """The folder of what is known of the jobs for data/set; they end with the test."""
    folder = data_prep_jobs.state_folder(here / "data" / "set")
    yield folder
    if (folder / "prepare.json").exists():
        free(
            *data_prep_jobs.format_job_ids(
                list(data_prep_jobs.read_order(folder).jobs.values())
            ).split()
        )


def ask(*more: str, inputs: tuple[str, ...] = ("books",), site: tuple[str, ...] = SITE) -> int:
    return dnt(["data", "prepare", *inputs, "--out", "data/set", *OPTIONS, *more, *site])


def ask_for_images(*more: str) -> int:
    return dnt(["data", "images", "photos", "--out", "data/set", "--val", "0.2", *more, *SITE])


def wait_for_jobs(folder: Path) -> None:
    ours = set(data_prep_jobs.read_order(folder).jobs.values())
    wait_for(lambda: not ours & slurm.queue().keys(), "the end of the jobs", timeout=300.0)


@pytest.mark.usefixtures("slurm")
def test_a_set_by_jobs_is_that_of_a_local_run(
    here: Path, jobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One task is cancelled in the queue: asked again, the command queues it and what needs it, and
    nothing else."""
    assert ask("--tasks", "3") == 0
    said = capsys.readouterr().out
    assert "data/set: in the making" in said
    first = data_prep_jobs.read_order(jobs).jobs
    command("scancel", first["task-1"]).ok()
    assert ask("--tasks", "3") == 0
    assert data_prep_jobs.read_order(jobs).jobs == first, (
        "asked again while jobs are at work, it queues nothing"
    )
    assert ask("--dedup", "exact") == 2
    assert (
        "data/set: jobs of a command with other options are at work on it"
        in capsys.readouterr().err
    )
    wait_for_jobs(jobs)
    assert not (here / "data" / "set" / "manifest.json").exists()

    assert ask() == 0
    said = capsys.readouterr().out
    assert "2 finished, 1 not finished" in said
    assert "queued again, what is not finished" in said
    second = data_prep_jobs.read_order(jobs).jobs
    assert {part for part in first if first[part] != second[part]} == {"task-1", "merge"}
    wait_for_jobs(jobs)
    assert ask() == 0
    assert "data/set: made" in capsys.readouterr().out

    options = PrepareOptions(
        ["books"],
        here / "local" / "set",
        None,
        400,
        None,
        "bpe",
        64,
        "concat",
        0.1,
        rules_file("light"),
        "near",
    )
    prepare_here(options)
    assert contents(here / "data" / "set") == contents(here / "local" / "set")
    assert jobs.stat().st_mode & 0o777 == 0o700
    assert not list((here / "data" / "set").glob(".*"))


@pytest.mark.usefixtures("slurm")
def test_a_failure_is_told_with_its_log(
    here: Path, jobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "books" / "broken.jsonl").write_text('{"text": \n')
    assert ask("--strict") == 0
    wait_for_jobs(jobs)
    capsys.readouterr()
    assert ask("--strict") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "tokenizer failed: books/broken.jsonl: line 1: found" in said
    assert f"its log is {jobs / 'jobs' / 'slurm'}/" in said
    assert "2 tasks" in said
    assert " 2 not finished merge" in said


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize(
    ("inputs", "more", "says"),
    [
        (
            [],
            ["--cluster", "sandbox", "books"],
            "--cluster: after the name it takes cluster.KEY=VALUE, found books; put INPUT first",
        ),
        ([], ["--cluster", "nowhere"], "nowhere.yaml' cannot be read"),
        (
            [],
            ["--cluster", "sandbox", "cluster.partition=lwo"],
            "cluster.partition: there is no lwo (did you mean low?)",
        ),
        ([], ["--task", "1"], "--task: with --cluster there is a job for each"),
        (["-"], [], "-: jobs cannot read standard input"),
        (["/dev/shm"], [], "INPUT: /dev/shm lies in the memory of this machine"),
        (["nowhere"], [], "nowhere: no such file or folder"),
        ([], ["--workers", "99"], "cluster.cpus_per_rank: a job needs 1 node with 99 CPUs"),
    ],
)
def test_what_is_refused_before_the_queue(
    here: Path, inputs: list[str], more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    site = () if "--cluster" in more else SITE
    assert ask(*more, inputs=("books", *inputs), site=site) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
    assert not (here / "data").exists()


@pytest.mark.usefixtures("slurm")
def test_a_set_that_is_there_is_left_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "data" / "set").mkdir(parents=True)
    (here / "data" / "set" / "manifest.json").write_text("{}")
    assert ask() == 2
    assert "data/set: already holds a prepared set" in capsys.readouterr().err


@pytest.mark.usefixtures("slurm")
def test_a_dry_run_shows_the_plan_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask("--dry-run", "--tasks", "7", "--workers", "2") == 0
    shown = capsys.readouterr().out
    assert "clean      " in shown
    assert "#SBATCH --array=0-6%7" in shown
    assert "#SBATCH --cpus-per-task=2" in shown
    assert not (here / "data").exists()


@pytest.mark.usefixtures("slurm")
def test_a_set_of_images_by_jobs_is_that_of_a_local_run(
    here: Path, jobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class_folders(here / "photos", 60)
    assert ask_for_images("--dry-run", "--tasks", "7", "--workers", "2") == 0
    shown = capsys.readouterr().out
    assert "#SBATCH --array=0-6%7" in shown and "20.00% held out" in shown
    assert "like it, each once: merge job" in shown
    assert not (here / "data").exists()

    assert ask_for_images("--tasks", "2") == 0
    assert "tokenizer" not in capsys.readouterr().out
    wait_for_jobs(jobs)
    assert ask_for_images() == 0
    said = capsys.readouterr().out
    assert "data/set: made" in said and "2 finished" in said
    prepare_images(ImageOptions(["photos"], here / "local" / "set", val_fraction=0.2))
    assert contents(here / "data" / "set") == contents(here / "local" / "set")


@pytest.mark.parametrize(
    "asked", [PrepareOptions(["a"], Path("b")), ImageOptions(["a"], Path("b"))]
)
def test_an_order_is_read_as_it_was_written(
    asked: PrepareOptions | ImageOptions, tmp_path: Path
) -> None:
    order = PrepareOrder(asked=asked, here=tmp_path, umask=0o22, tasks=2, jobs={"task-0": "5_0"})
    data_prep_jobs.write_order(tmp_path, order)
    assert data_prep_jobs.read_order(tmp_path) == order
    assert ("tokenizer" in order.parts) == isinstance(asked, PrepareOptions)
