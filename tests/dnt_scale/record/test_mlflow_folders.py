"""Run folders that were copied, moved, restored or mixed up between starts: two never write into
one MLflow run.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dnt_scale.record.files import read_json
from dnt_scale.record.finalize import finalize_run
from dnt_scale.record.mlflow.backend import LEASE
from dnt_scale.record.sender import finalize_here, send_all
from dnt_scale.record.sender_files import Sent
from dnt_scale.record.training_process import EndedTraining
from testbed.stores import sqlite_store
from tests.helpers.senders import begin, client, mlflow_run_of, shown, start, without_processes

pytestmark = pytest.mark.slow

# mlflow.json has since
OLD_FIELDS = ("place", "own_id", "copied_from", "leases", "claimed", "name", "notes", "remedy")


@pytest.fixture
def runs_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for run folders with an empty store; starts there are this process's own."""
    sqlite_store(tmp_path / "runs" / "mlflow.db")
    without_processes(monkeypatch)
    return tmp_path / "runs"


def notes(run_dir: Path) -> list[str]:
    return list(read_json(run_dir / "logs" / "mlflow.json")["notes"])


def made_by_an_older_dnt(run_dir: Path) -> None:
    """Take out of a folder and its MLflow run what a dnt of before this rule did not write."""
    for name, fields in (
        ("mlflow.json", OLD_FIELDS),
        ("tracking.json", ("place", "former_place", "description")),
    ):
        file = run_dir / "logs" / name
        file.write_text(json.dumps({k: v for k, v in read_json(file).items() if k not in fields}))
    client(run_dir).delete_tag(read_json(run_dir / "logs" / "mlflow.json")["mlflow_run_id"], LEASE)


def copy(a: Path, b: Path) -> None:
    subprocess.run(["cp", "-a", a, b], check=True)


def move(a: Path, b: Path) -> None:
    a.rename(b)


def copy_and_delete(a: Path, b: Path) -> None:  # also what mv does between file systems
    copy(a, b)
    shutil.rmtree(a)


def move_and_copy_back(a: Path, b: Path) -> None:
    move(a, b)
    copy(b, a)


def swap(a: Path, b: Path) -> None:
    copy(a, b)
    move(a, a.with_name("c"))
    move(b, a)
    move(a.with_name("c"), b)


def checkpoints_only(a: Path, b: Path) -> None:
    """Someone takes over the checkpoints, which carry the run's id, and the numbers, but not the
    logs.
    """
    copy(a, b)
    shutil.rmtree(b / "logs")


def restore_in_place(a: Path, b: Path) -> None:
    """An older backup is unpacked over the folder, after a copy of it was started."""
    copy(a, a.with_name("backup"))
    start(a)
    shutil.copytree(a.with_name("backup"), a, dirs_exist_ok=True)
    copy(a, b)
    shutil.rmtree(a.with_name("backup"))


def old_copy(a: Path, b: Path) -> None:
    made_by_an_older_dnt(a)
    copy(a, b)


def old_copy_without_place(a: Path, b: Path) -> None:
    """Neither the copy nor the original can say which it is: no configuration was noted."""
    made_by_an_older_dnt(a)
    order = read_json(a / "logs" / "tracking.json")
    (a / "logs" / "tracking.json").write_text(json.dumps(order | {"tags": {}}))
    copy(a, b)


@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize(
    "act",
    [
        copy,
        move_and_copy_back,
        swap,
        checkpoints_only,
        restore_in_place,
        old_copy,
        old_copy_without_place,
    ],
)
def test_two_folders_have_two_mlflow_runs(
    runs_dir: Path, act: Callable[[Path, Path], None], first: str
) -> None:
    a, b = runs_dir / "a", runs_dir / "b"
    origin = start(a, 3)
    act(a, b)
    order = [a, b] if first == "a" else [b, a]
    before = {place: (place / "metrics.jsonl").read_bytes().count(b"\n") for place in order}
    made = {place: start(place) for place in order}
    assert len(set(made.values())) == 2
    again = {place: start(place) for place in reversed(order)}  # and it stays so
    assert again == made
    for place in order:
        assert shown(place) == (place.name, list(range(1, before[place] + 5)))
    tags = client(a).get_run(made[a]).data.tags, client(b).get_run(made[b]).data.tags
    # whose run had gone on in the meantime
    assert origin in made.values() or act is restore_in_place
    for place, own in zip((a, b), tags, strict=True):
        assert made[place] == origin or own["dnt.copied_from"] == origin
        assert own["mlflow.note.content"].startswith(f"in {place}")
    assert tags[0]["dnt.run_id"] != tags[1]["dnt.run_id"]


def test_a_copy_of_a_copy_and_the_deleted_original(runs_dir: Path) -> None:
    a, b, c, d = (runs_dir / name for name in "abcd")
    made = [start(a)]
    copy(a, b)
    made.append(start(b))
    copy(b, c)
    made.append(start(c))
    assert notes(c) == [
        f"{c} was copied or moved from {b}: it gets an MLflow run of its own, with all steps"
    ]
    copy_and_delete(c, d)
    made.append(start(d))
    assert len(set(made)) == 4
    assert shown(d) == ("d", list(range(1, 9)))
    assert made == [start(place) for place in (a, b)] + [made[2], start(d)]


def test_a_renamed_or_restored_folder_goes_on_under_its_name(runs_dir: Path) -> None:
    a, b = runs_dir / "a", runs_dir / "b"
    made = start(a)
    assert notes(a) == []
    move(a, b)
    assert start(b) == made
    assert shown(b) == ("b", [1, 2, 3, 4])
    assert notes(b) == ["MLflow's run a is named b now, as its folder is"]
    copy(b, a)
    shutil.rmtree(b)
    move(a, b)  # as from a backup: the same place, another inode
    assert start(b) == made
    assert notes(b) == []
    made_by_an_older_dnt(b)
    assert start(b) == made
    made_by_an_older_dnt(b)
    move(b, a)
    assert start(a) == made
    assert shown(a)[0] == "a"
    moved = runs_dir.with_name("moved")
    runs_dir.rename(moved)  # with the store in it
    assert start(moved / "a") == made
    assert notes(moved / "a") == []


def test_what_a_person_writes_on_the_page_stays(runs_dir: Path) -> None:
    a = runs_dir / "a"
    made = start(a)
    page = client(a)
    assert page.get_run(made).data.tags["mlflow.note.content"] == f"in {a}"
    start(a, description="in another way")
    assert page.get_run(made).data.tags["mlflow.note.content"] == "in another way"
    page.update_run(made, name="the best")
    page.set_tag(made, "mlflow.note.content", "")
    start(a)
    assert page.get_run(made).info.run_name == "the best"
    assert page.get_run(made).data.tags["mlflow.note.content"] == ""
    start(a, run_name="a-2")  # the folder's name is another now
    assert page.get_run(made).info.run_name == "a-2"


@pytest.mark.parametrize(
    "killed", ["before it is noted that the lease is taken", "before the run is noted"]
)
def test_a_start_that_is_killed_while_it_takes_the_lease(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    a = runs_dir / "a"
    made = start(a) if killed.startswith("before it") else ""
    started, told = begin(a, 1), []

    def save(self: Sent, error: str | None = None, remedy: str = "") -> None:
        if told:
            raise KeyboardInterrupt
        told.append(error)
        write(self, error, remedy)

    write = Sent.save
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Sent, "save", save)
        started.send()
    assert start(a) == made or not made
    assert (
        len(client(a).search_runs([client(a).get_experiment_by_name("tests").experiment_id])) == 1
    )
    assert shown(a)[1][-1] == 5 if made else 3


def test_both_go_on_when_neither_place_nor_start_could_tell_them_apart(runs_dir: Path) -> None:
    """The same folder on two machines at the same path: each thinks the lease is its own until
    it sees the other's.
    """
    a, there = runs_dir / "a", runs_dir / "there"
    origin = start(a)
    copy(a, there)
    for name in ("mlflow.json", "tracking.json"):
        file = there / "logs" / name
        place = {"path": str(there), "inode": there.stat().st_ino}
        file.write_text(json.dumps(read_json(file) | {"place": place}))
    senders = [begin(a, 3, run_name="a"), begin(there, 5, run_name="a")]
    assert senders[0].send()  # at work on the run ...
    assert mlflow_run_of(senders[1]) == origin
    for each in reversed(senders):
        assert send_all(each, EndedTraining("FINISHED")) == 0
    assert len({mlflow_run_of(each) for each in senders}) == 2
    assert shown(a) == ("a", [1, 2, 3, 4, 5])
    assert shown(there) == ("a", [1, 2, 3, 4, 5, 6, 7])


def test_finalizing_a_copy_tells_nothing_of_the_original(
    runs_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    a, b, c = (runs_dir / name for name in "abc")
    made = start(a)
    copy(a, b)
    before = client(a).get_run(made).data.tags[LEASE]
    assert finalize_run(b, "FAILED")
    assert client(a).get_run(made).info.status == "FINISHED"
    assert client(a).get_run(made).data.tags[LEASE] == before
    made_by_an_older_dnt(a)
    copy(a, c)
    assert finalize_run(c, "FAILED")
    assert client(a).get_run(made).info.status == "FINISHED"
    # a copy that was killed before its sender had MLflow's answer
    begin(b, 1)
    assert finalize_here(b, "mlflow", "KILLED") == 0
    mine = read_json(b / "logs" / "mlflow.json")["mlflow_run_id"]
    assert mine != made
    assert client(b).get_run(mine).info.status == "KILLED"
    assert shown(b) == ("b", [1, 2, 3])
    # a run that another has taken over since is the other's to tell
    client(b).set_tag(mine, LEASE, "another's")
    assert finalize_here(b, "mlflow", "FAILED") == 0
    assert client(b).get_run(mine).info.status == "KILLED"
    assert finalize_run(b, "FAILED")  # starts no process any more
    assert capfd.readouterr().err == ""


def test_a_copied_sweep_has_a_parent_run_of_its_own(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DNT_PARENT", "sweep-1:rates")
    uri = f"sqlite:///{runs_dir / 'mlflow.db'}"
    one, other, renamed = (runs_dir / name for name in ("one", "other", "renamed"))

    def parent(sweep: Path, run: str) -> str:
        made = start(sweep / run, uri=uri)
        return str(client(sweep / run).get_run(made).data.tags["mlflow.parentRunId"])

    first = parent(one, "lr-1")
    assert parent(one, "lr-2") == first
    copy(one, other)
    second = parent(other, "lr-1")
    assert second != first
    assert parent(other, "lr-2") == second
    move(one, renamed)
    assert parent(renamed, "lr-1") == first
