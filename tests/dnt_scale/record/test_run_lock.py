"""One writer of a run folder: real files, real processes."""

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from dnt_scale.config import ConfigError
from dnt_scale.distributed.host import start_ticks
from dnt_scale.record import run_lock
from dnt_scale.record.run_lock import (
    FILE,
    HeldError,
    HeldFault,
    Holder,
    check_free,
    current_holder,
    held,
    take,
    this_process,
)
from testbed.run import STEPS, Ranks, metrics, start, tiny, train
from testbed.waiting import until


def me(**changes: object) -> Holder:
    return replace(this_process("training"), **changes)  # type: ignore[arg-type]


def hold(run_dir: Path) -> None:
    """Hold the lock until killed."""
    take(run_dir, this_process("training"))
    (run_dir / "held").touch()
    time.sleep(600)


def hold_in_a_child(run_dir: Path) -> None:
    """End at once, with a child that has the open file."""
    take(run_dir, this_process("training"))
    if os.fork() == 0:
        (run_dir / "child").write_text(str(os.getpid()))
        time.sleep(600)
    until(lambda: (run_dir / "child").exists() and (run_dir / "child").read_text())
    os._exit(0)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Ranks]:
    """A process that holds the lock of ``tmp_path / "run"``."""
    group = Ranks(hold, (tmp_path / "run",), 1, {})
    until(lambda: (tmp_path / "run" / "held").exists())
    yield group
    group.kill()
    group.wait()


def left_behind(run_dir: Path, **changes: object) -> Path:
    """A record whose holder has no flock."""
    run_dir.mkdir(exist_ok=True)
    file = run_dir / FILE
    file.touch()
    file.write_text(json.dumps(asdict(me(inode=file.stat().st_ino, **changes))))
    return file


def test_a_second_one_is_told_who_writes(holder: Ranks, tmp_path: Path) -> None:
    run_dir, pid = tmp_path / "run", holder.processes[0].pid
    with pytest.raises(
        HeldError, match=rf"^run\.dir: {run_dir} is being trained by pid {pid} on \S+ since"
    ) as caught:
        take(run_dir, me())
    assert str(caught.value).endswith(": wait for it, stop it, or take another run.name")
    found = current_holder(run_dir)
    assert found is not None and found.pid == pid
    with pytest.raises(HeldError, match=f"pid {pid}"), held(run_dir, "dnt submit"):
        raise AssertionError
    assert current_holder(run_dir) == found  # asking and trying change nothing


def test_kill_9_leaves_a_lock_that_the_next_one_takes_over_at_once(
    holder: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, pid = tmp_path / "run", holder.processes[0].pid
    holder.kill(signal.SIGKILL)
    holder.wait()
    assert current_holder(run_dir) is None
    with take(run_dir, me()):
        assert f"{run_dir} was left locked by pid {pid} on" in capsys.readouterr().err
        now = current_holder(run_dir)
        assert now is not None and now.pid == os.getpid()
    assert current_holder(run_dir) is None and (run_dir / FILE).read_bytes() == b""
    with take(run_dir, me()):
        pass
    assert capsys.readouterr().err == ""  # a lock that was released is nothing to tell


def test_a_child_that_outlives_the_holder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "LEAVING_S", 0.3)
    run_dir = tmp_path / "run"
    Ranks(hold_in_a_child, (run_dir,), 1, {}).wait().ok()
    child = int((run_dir / "child").read_text())
    try:
        with pytest.raises(
            HeldError, match=rf"left behind; `fuser {run_dir / FILE}` may name it: end it"
        ):
            take(run_dir, me())
    finally:
        os.kill(child, signal.SIGKILL)
    until(lambda: current_holder(run_dir) is None)
    take(run_dir, me()).release()


def test_a_moved_folder_takes_its_lock_along_and_a_copied_one_does_not(
    holder: Ranks, tmp_path: Path
) -> None:
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    check_free(tmp_path / "copy")
    with take(tmp_path / "copy", me()):
        pass
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(HeldError, match=f"pid {holder.processes[0].pid}"):
        take(tmp_path / "moved", me())
    check_free(tmp_path / "run")


def test_where_locks_do_not_work_the_process_itself_counts(tmp_path: Path) -> None:
    """The record says that this very process, or one that is gone, holds it; nobody has an
    flock.
    """
    parent = os.getppid()
    alive = {"pid": parent, "started": start_ticks(parent)}
    left_behind(tmp_path / "alive", **alive)
    with pytest.raises(HeldError, match=f"pid {parent}"):
        take(tmp_path / "alive", me())
    # another process has the number now
    left_behind(tmp_path / "reused", **{**alive, "started": 1})
    take(tmp_path / "reused", me()).release()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left_behind(tmp_path / "gone", pid=gone.pid)
    take(tmp_path / "gone", me()).release()


def test_a_record_of_an_older_dnt_has_no_clock_ticks(tmp_path: Path) -> None:
    parent = os.getppid()
    created = psutil.Process(parent).create_time()
    for name, time_of_start in (("alive", created), ("reused", 1.0)):
        file = left_behind(tmp_path / name, pid=parent, created=time_of_start)
        record = json.loads(file.read_text())
        del record["started"]
        file.write_text(json.dumps(record))
    with pytest.raises(HeldError, match=f"pid {parent}"):
        take(tmp_path / "alive", me())
    take(tmp_path / "reused", me()).release()


def test_a_holder_on_another_machine_is_watched_for_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 1.0)
    monkeypatch.setattr(run_lock, "POLL_S", 0.05)
    file = left_behind(tmp_path / "run", machine="elsewhere", host="node7", pid=1)
    over = threading.Event()

    def live() -> None:
        while not over.wait(0.3):
            os.utime(file)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(HeldError, match="pid 1 on node7"):
            take(tmp_path / "run", me())
        with pytest.raises(HeldError, match="pid 1 on node7"):
            check_free(tmp_path / "run")
    finally:
        over.set()
        thread.join()
    monkeypatch.setattr(run_lock, "BEAT_S", 0.1)
    take(tmp_path / "run", me()).release()
    assert "was left locked by pid 1 on node7" in capsys.readouterr().err


def test_a_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    with take(tmp_path / "run", me()):
        first = (tmp_path / "run" / FILE).stat().st_mtime_ns
        until(lambda: (tmp_path / "run" / FILE).stat().st_mtime_ns > first)
        content = (tmp_path / "run" / FILE).read_bytes()
        (tmp_path / "run").rename(tmp_path / "moved")
        moved = (tmp_path / "moved" / FILE).stat().st_mtime_ns
        until(lambda: (tmp_path / "moved" / FILE).stat().st_mtime_ns > moved)
        assert (tmp_path / "moved" / FILE).read_bytes() == content
    assert (tmp_path / "moved" / FILE).read_bytes() == b""


def taken_over(run_dir: Path) -> None:
    run_lock.BEAT_S = 0.1
    hold(run_dir)


def test_a_holder_that_was_taken_over_ends(tmp_path: Path) -> None:
    group = Ranks(taken_over, (tmp_path / "run",), 1, {})
    until(lambda: (tmp_path / "run" / "held").exists())
    file = tmp_path / "run" / FILE
    other = {**json.loads(file.read_bytes()), "token": "other", "host": "node7", "pid": 8}
    with file.open("r+b") as out:
        out.truncate(0)
        out.write(json.dumps(other).encode())
    error = group.wait().fault()
    assert f"{tmp_path / 'run'} was taken over by pid 8 on node7" in error


@pytest.fixture(params=[errno.ENOLCK, errno.ENOTSUP])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, which none here is: what the system call says there."""

    def refuse(descriptor: int, kind: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(run_lock, "RACE_S", 0.2)


@pytest.mark.usefixtures("no_flock")
def test_without_flock_the_record_decides(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with take(run_dir, me()):
        with pytest.raises(HeldError, match=f"pid {os.getpid()}"):
            take(run_dir, me())
        check = current_holder(run_dir)
        assert check is not None and check.pid == os.getpid()
    assert current_holder(run_dir) is None
    take(run_dir, me()).release()


@pytest.mark.usefixtures("no_flock")
def test_without_flock_one_of_many_at_once_gets_it(tmp_path: Path) -> None:
    run_dir, got, lost = tmp_path / "run", [], []
    ready = threading.Barrier(6)

    def try_it() -> None:
        ready.wait()
        try:
            got.append(take(run_dir, me()))
        except HeldError as error:
            lost.append(error)

    threads = [threading.Thread(target=try_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(lost)) == (1, 5)
    got[0].release()


def test_a_job_waits_for_what_will_pass_and_for_nothing_else(tmp_path: Path) -> None:
    parent = {"pid": os.getppid(), "started": start_ticks(os.getppid())}
    mine = me(attempt="12.1")
    left_behind(tmp_path / "local", **parent)
    with pytest.raises(HeldError) as caught:
        take(tmp_path / "local", mine, patience_s=60)
    assert not isinstance(caught.value, HeldFault)  # a person has to see to it
    left_behind(tmp_path / "earlier", attempt="12.0", **parent)
    with pytest.raises(HeldFault, match=r"\(job 12\)"):  # another try may go well
        take(tmp_path / "earlier", mine, patience_s=0.3)
    file = left_behind(tmp_path / "submit", what="dnt submit", **parent)
    threading.Timer(0.3, lambda: os.truncate(file, 0)).start()
    take(tmp_path / "submit", mine, patience_s=60).release()


def test_somebodys_file_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("do not touch\n")
    for action in (lambda: take(tmp_path, me()), lambda: check_free(tmp_path)):
        with pytest.raises(
            ConfigError, match=rf"run\.dir: {tmp_path / FILE} is no lock of dnt's; move it away"
        ):
            action()
    assert (tmp_path / FILE).read_text() == "do not touch\n"
    (tmp_path / FILE).rename(tmp_path / "mine")
    take(tmp_path, me()).release()


def test_a_start_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    take(tmp_path / "runs" / "new", me()).release()
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    take(tmp_path / "there", me()).release()
    assert not list((tmp_path / "there").iterdir())
    with take(tmp_path / "runs" / "new", me()):
        (tmp_path / "runs" / "new" / "config.yaml").write_text("it began")
    assert (tmp_path / "runs" / "new" / FILE).read_bytes() == b""


def test_of_two_starts_in_one_folder_one_trains_undisturbed(corpus: Path, tmp_path: Path) -> None:
    for number, delay in enumerate((0.0, random.Random(5).uniform(0.0, 1.0))):
        run_dir = tmp_path / str(number)
        pair = []
        for wait in (0.0, delay):
            time.sleep(wait)
            pair.append(start(tiny(corpus, run_dir, "checkpoint.every=5", "eval.every=0")))
        ends = [group.wait() for group in pair]
        assert sorted(end.codes[0] or 0 for end in ends) in ([0, 2], [0, 0]), [
            end.err for end in ends
        ]
        assert [line["step"] for line in metrics(run_dir)] == list(range(1, STEPS + 1))
        for end in ends:
            if end.codes == [2]:
                assert end.error().startswith(f"error: run.dir: {run_dir} is being trained by pid ")
                assert len(end.err.splitlines()) == 1


def test_a_folder_of_checkpoints_has_one_writer_too(corpus: Path, tmp_path: Path) -> None:
    """Two runs of one name, in folders of their own, that were given the same checkpoint.dir."""
    group = Ranks(hold, (tmp_path / "shared",), 1, {})
    until(lambda: (tmp_path / "shared" / "held").exists())
    try:
        error = train(
            tiny(corpus, tmp_path / "run", f"checkpoint.dir={tmp_path / 'shared'}")
        ).error()
        pid = group.processes[0].pid
        assert error.startswith(
            f"error: checkpoint.dir: {tmp_path / 'shared'} is being written by pid {pid} on "
        )
        assert error.endswith("take another checkpoint.dir") and not (tmp_path / "run").exists()
    finally:
        group.kill()
        group.wait()
