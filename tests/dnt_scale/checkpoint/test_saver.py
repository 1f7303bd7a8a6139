"""Saves in the background: what is in place is whole, whoever fails, is killed, or fills the
disk.
"""

import contextlib
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec.core
import pytest
import torch
import torch.distributed as dist

from dnt_scale.checkpoint import (
    CheckpointError,
    Saver,
    check_files,
    newest,
    read,
    read_state,
    read_tensors,
    storage,
    write,
)
from dnt_scale.checkpoint.inspection import verify
from dnt_scale.checkpoint.read import complete
from dnt_scale.checkpoint.storage import Storage
from dnt_scale.distributed import process_group
from dnt_scale.distributed.agree import highest
from dnt_scale.distributed.errors import is_fault
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.distributed.watchdog import watching
from testbed import run
from testbed.run import call, can_mount, tensors
from testbed.waiting import until
from tests.helpers.tensor_shards import (
    copies,
    equal,
    rows,
    save_made_up,
    some_state,
    some_tensors,
    zeros,
)


@pytest.fixture(scope="module")
def me() -> Iterator[Ranks]:
    with process_group.alone() as me:
        yield me


@contextlib.contextmanager
def saver_of(folder: Path | str, me: Ranks, **options) -> Iterator[Saver]:
    saver = Saver(folder, me, **{"keep": 9, **options})
    try:
        yield saver
    finally:
        saver.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def commit(saver: Saver) -> Path | str | None:
    """As the loop does it: when no rank is busy."""
    until(lambda: not saver.busy)
    return saver.commit()


def test_a_save_is_in_place_only_when_committed(me, tmp_path):
    whole = some_tensors()
    with saver_of(tmp_path, me) as saver:
        assert not saver.pending and not saver.busy and saver.commit() is None
        saver.save(some_state(3), copies(whole, 0, 1))
        until(lambda: not saver.busy)
        assert (
            saver.pending
            and names(tmp_path) == [".partial-step-00000003"]
            and newest(tmp_path) is None
        )
        assert saver.commit() == tmp_path / "step-00000003" == newest(tmp_path)
        assert not saver.pending and saver.commit() is None
    assert names(tmp_path) == ["latest", "step-00000003"]
    assert (tmp_path / "latest").readlink() == Path("step-00000003")
    assert not any(verify(str(tmp_path)).values())


def test_what_is_saved_is_what_the_tensors_were(me, tmp_path):
    """Training goes on in the tensors while the thread writes; the buffers of one save serve the
    next.
    """
    whole = some_tensors(scale=2000)
    with saver_of(tmp_path, me) as saver:
        for step in (1, 2, 3):
            expected = {name: tensor.clone() for name, tensor in whole.items()}
            saver.save(some_state(step), copies(whole, 0, 1))
            buffer = saver._buffer.data_ptr()
            for tensor in whole.values():
                tensor.mul_(1.5)
            saver.commit(wait=step == 2) if step == 2 else commit(saver)
            assert equal(tensors(tmp_path / f"step-{step:08d}"), expected)
            assert saver._buffer.data_ptr() == buffer


def test_a_save_commits_the_one_before(me, tmp_path):
    with saver_of(tmp_path, me) as saver:
        saver.save(some_state(1), copies(some_tensors(), 0, 1))
        saver.save(some_state(2), copies(some_tensors(), 0, 1))
        assert names(tmp_path) == [".partial-step-00000002", "latest", "step-00000001"]
        saver.commit(wait=True)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


def test_a_checkpoint_that_others_read_stays_until_they_have(me, tmp_path):
    with saver_of(tmp_path, me, keep=1) as saver:
        for step in (1, 2, 3):
            saver.save(some_state(step), copies(some_tensors(), 0, 1))
            assert saver.commit(wait=True) and saver.written == step
            saver.read_by_others = 1 if step < 3 else None
        assert list(complete(Storage(tmp_path))) == [1, 3]
        saver.save(some_state(4), copies(some_tensors(), 0, 1))
        saver.commit(wait=True)
    assert names(tmp_path) == ["latest", "step-00000004"]


def test_in_the_foreground_a_save_is_in_place_when_it_returns(me, tmp_path):
    with saver_of(tmp_path, me, background=False) as saver:
        saver.save(some_state(1), copies(some_tensors(), 0, 1))
        assert not saver.pending and names(tmp_path) == ["latest", "step-00000001"]


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"),
    [
        (1, None, [7]),
        (2, None, [6, 7]),
        (2, 3, [3, 6, 7]),
        (1, 2, [2, 4, 6, 7]),
        (3, 5, [5, 6, 7]),
        (9, None, [*range(1, 8)]),
    ],
)
def test_retention(me, tmp_path, keep, keep_every, kept):
    with saver_of(tmp_path, me, keep=keep, keep_every=keep_every) as saver:
        for step in range(1, 8):
            saver.save(some_state(step), copies(some_tensors(), 0, 1))
            commit(saver)
    assert names(tmp_path) == ["latest", *(f"step-{step:08d}" for step in kept)]


def test_a_step_that_is_there_is_written_again(me, tmp_path):
    for seed in (1, 2):
        save_made_up(tmp_path, 5, me, seed=seed)
    assert equal(tensors(tmp_path / "step-00000005"), some_tensors(seed=2))
    assert names(tmp_path) == ["latest", "step-00000005"]


def test_close_gives_an_uncommitted_save_up(me, tmp_path):
    save_made_up(tmp_path, 1, me)
    saver = Saver(tmp_path, me, keep=1)
    saver.save(some_state(2), copies(some_tensors(scale=5000), 0, 1))
    saver.close()
    assert not saver.busy and names(tmp_path) == ["latest", "step-00000001"]


@pytest.mark.parametrize("wait", [False, True])
def test_what_is_on_disk_is_read_back(me, tmp_path, monkeypatch, wait):
    """A disk that stores another byte than it was given: found before the checkpoint is put in
    place.
    """
    save_made_up(tmp_path, 1, me)

    def spoil(file: storage.File) -> None:
        position = file.tell()
        if position > 2000:
            os.pwrite(file.fileno(), b"\xff", 2000)
        file.close()

    monkeypatch.setattr(write, "finish", spoil)
    with saver_of(tmp_path, me) as saver:
        saver.save(some_state(2), copies(some_tensors(), 0, 1))
        with pytest.raises(
            CheckpointError, match=r"on rank 0: .*what is on disk is not what was written"
        ) as failed:
            saver.commit(wait=True) if wait else commit(saver)
        assert is_fault(failed.value)  # another disk may do
        assert names(tmp_path) == ["latest", "step-00000001"]


def test_an_old_checkpoint_that_cannot_be_removed_is_told(me, tmp_path):
    save_made_up(tmp_path, 1, me)
    with saver_of(tmp_path, me, keep=1) as saver:
        saver.save(some_state(2), copies(some_tensors(), 0, 1))
        (tmp_path / ".old-step-00000001" / "in the way").mkdir(parents=True)
        with pytest.raises(
            CheckpointError,
            match=r"step-00000002: is in place, but older checkpoints could not be removed: .*not "
            r"empty",
        ):
            saver.commit(wait=True)
    assert newest(tmp_path) == tmp_path / "step-00000002"
    assert not any(verify(str(tmp_path)).values())


def test_health_and_scalars_survive_whatever_they_are(me, tmp_path):
    health = {"loss": [1.25, float("inf"), 3e-300], "norm": []}
    scalars = {"step": 4, "updates": 3, "previous_norm": float("inf")}
    save_made_up(tmp_path, 4, me, health=health, engine=scalars)
    state = read_state(tmp_path / "step-00000004")
    assert (state.health, state.scalars) == (health, scalars)


def test_leftovers_of_killed_saves_go(me, tmp_path):
    for name in (".partial-step-00000009", ".old-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-00007-model-00001-of-00001.safetensors").write_bytes(b"x")
    save_made_up(tmp_path, 2, me)
    assert names(tmp_path) == ["latest", "step-00000002"]


# several ranks


def save_with_a_limit_on_rank_1(folder: Path, background: bool) -> None:
    me = process_group.start("cpu")
    whole = some_tensors(scale=2000)
    saver = Saver(folder, me, keep=5, background=background)
    saver.save(some_state(1, 2), rows(whole, me.rank, 2))
    saver.commit(wait=True)
    if me.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        saver.save(some_state(2, 2), rows(whole, me.rank, 2))
        until(lambda: highest(saver.busy) == (0,))
        saver.commit()
    except CheckpointError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert names(folder) == ["latest", "step-00000001"]
    dist.barrier()
    saver.save(some_state(3, 2), rows(whole, me.rank, 2))  # and it goes on
    saver.commit(wait=True)
    saver.close()
    process_group.stop()


@pytest.mark.parametrize("background", [True, False])
def test_a_rank_that_cannot_write_fails_the_save_on_all(tmp_path, background):
    done = call(save_with_a_limit_on_rank_1, tmp_path, background, ranks=2).ok()
    lines = done.out.splitlines()
    assert len(lines) == 2 and len(set(lines)) == 1
    assert (
        ".partial-step-00000002: could not be written on rank 1: OSError: [Errno 27] File too large"
        in lines[0]
    )
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000003"]
    assert not any(verify(str(tmp_path)).values())


@pytest.mark.skipif(not can_mount(), reason="takes root")
def test_a_full_disk_is_told_with_what_is_left(me, tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1000k", "dnt-test", tmp_path], check=True)
    try:
        save_made_up(tmp_path, 1, me)
        with saver_of(tmp_path, me) as saver:
            saver.save(some_state(2), copies(some_tensors(scale=200), 0, 1))
            with pytest.raises(
                CheckpointError, match=r"disk full while saving on rank 0 \(0\.\d MB free\)"
            ):
                commit(saver)
            assert names(tmp_path) == ["latest", "step-00000001"]
            saver.save(some_state(2), copies(some_tensors(), 0, 1))
            commit(saver)
        assert not any(verify(str(tmp_path)).values())
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def save_and_check_slowly(folder: Path) -> None:
    """With a disk on rank 1 that needs more than ``hang_s`` for a save, and for reading it."""
    me = process_group.start("cpu")
    with watching(me, 1.0):
        slow = 0.15 if me.rank == 1 else 0.0
        for module, name in ((write, "write_all"), (read, "fill")):
            real = getattr(module, name)

            def slowly(*arguments, real=real):
                time.sleep(slow)
                return real(*arguments)

            setattr(module, name, slowly)
            module.CHUNK = 1 << 19
        whole = some_tensors(scale=1000)
        saver = Saver(folder, me, keep=5)
        started = time.monotonic()
        saver.save(some_state(1, 2), rows(whole, me.rank, 2))
        saver.commit(wait=True)
        saved = time.monotonic()
        check_files(newest(folder), read_state(newest(folder)), me)
        read_tensors(newest(folder), rows(zeros(whole), me.rank, 2), me)
        took = saved - started, time.monotonic() - saved
        assert not slow or min(took) > 1.2, took
        saver.close()
    process_group.stop()


def test_a_slow_disk_is_no_hang(tmp_path):
    finished = call(save_and_check_slowly, tmp_path, ranks=2).ok()
    assert not finished.err, finished.err


def lack_a_file_system(folder: Path) -> None:
    me = process_group.start("cpu")
    save_made_up(folder, 1, me)
    url = f"file://{folder}/step-00000001"
    if me.rank == 1:

        def missing(url: str) -> None:
            raise ImportError

        fsspec.core.url_to_fs = missing
    for act in (
        lambda: check_files(url, read_state(folder / "step-00000001"), me),
        lambda: read_tensors(url, [], me),
    ):
        with pytest.raises(
            CheckpointError, match=r"^rank 1: file://.*: file:// needs a package that is not here"
        ):
            act()
    process_group.stop()


def test_a_rank_that_lacks_a_file_system_is_named_on_all(tmp_path):
    call(lack_a_file_system, tmp_path, ranks=2).ok()


def save_for_ever(folder: Path) -> None:
    me = process_group.start("cpu")
    whole = some_tensors(scale=3000)
    saver = Saver(folder, me, keep=3)
    for step in range(1, 10_000):
        for tensor in whole.values():
            tensor.fill_(step)
        saver.save(some_state(step, 2), rows(whole, me.rank, 2))
        while any(highest(saver.busy)):
            time.sleep(0.001)
        saver.commit()


@pytest.mark.parametrize("victims", [[0], [1], [0, 1]])
def test_kill_9_during_a_background_save_leaves_the_one_before(tmp_path, victims):
    group = run.Ranks(save_for_ever, (tmp_path,), 2, {})
    until(lambda: newest(tmp_path) is not None)
    until(lambda: any(tmp_path.glob(".partial-*/*")))
    for victim in victims:
        group.kill(signal.SIGKILL, victim)
    group.wait()
    assert not any(verify(str(tmp_path)).values())
    path = newest(tmp_path)
    assert path is not None
    step = read_state(path).step
    assert all((tensor == tensor.new_tensor(step)).all() for tensor in tensors(Path(path)).values())
    with (
        process_group.alone()
        if not dist.is_initialized()
        else contextlib.nullcontext(Ranks(0, 0, 1, torch.device("cpu"))) as me
    ):
        save_made_up(tmp_path, step + 1, me)
    assert not list(tmp_path.glob(".*"))


def test_the_writer_leaves_the_cores_to_training(me, tmp_path):
    seen: list[int] = []

    class Watching(Saver):
        def _read_back(self, *arguments) -> None:
            seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    for background in (True, False):
        saver = Watching(tmp_path, me, keep=1, background=background)
        saver.save(some_state(1), copies(some_tensors(), 0, 1))
        saver.commit(wait=True)
        saver.close()
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    assert seen == [min(19, usual + 15), usual]


# at a URL


def test_a_url_holds_checkpoints_too(me, tmp_path):
    url = f"file://{tmp_path}/bucket/run"
    inside = tmp_path / "bucket" / "run"
    assert newest(url) is None
    with saver_of(url, me, keep=1, keep_every=2) as saver:
        for step in (1, 2, 3):
            saver.save(some_state(step), copies(some_tensors(seed=step), 0, 1))
            assert commit(saver) == f"{url}/step-{step:08d}"
    assert names(inside) == ["step-00000002", "step-00000003"]
    assert newest(url) == f"{url}/step-00000003"
    state = read_state(f"{url}/step-00000003")
    assert state.step == 3 and len(state.files) == 1
    back = zeros(some_tensors())
    read_tensors(f"{url}/step-00000003", rows(back, 0, 1), me)
    assert equal(back, some_tensors(seed=3))
    assert not any(verify(url).values())


def test_at_a_url_state_json_comes_last_and_leftovers_go(me, tmp_path):
    url = f"file://{tmp_path}"
    with saver_of(url, me) as saver:
        saver.save(some_state(1), copies(some_tensors(), 0, 1))
        until(lambda: not saver.busy)
        assert names(tmp_path / "step-00000001") == ["shard-00001-model-00001-of-00001.safetensors"]
        assert newest(url) is None
    # given up: closed before it was committed
    (tmp_path / "step-00000007").mkdir(exist_ok=True)
    (tmp_path / "step-00000007" / "shard-00001-model-00001-of-00001.safetensors").write_bytes(
        b"killed here"
    )
    with saver_of(url, me) as saver:
        saver.save(some_state(2), copies(some_tensors(), 0, 1))
        commit(saver)
    assert names(tmp_path) == ["step-00000002"]


def test_memory_serves_one_rank(me):
    whole = save_made_up("memory://made-up/run", 4, me)
    back = zeros(whole)
    read_tensors("memory://made-up/run/step-00000004", copies(back, 0, 1), me)
    assert equal(back, whole)


def test_a_url_nobody_can_open_is_told(me):
    with pytest.raises(
        CheckpointError,
        match=r"s3://bucket/run: s3:// needs a package that is not here; pip install s3fs",
    ):
        Saver("s3://bucket/run", me, keep=1)
    with pytest.raises(CheckpointError, match=r"nowhere://x: .*expected a folder, s3://"):
        newest("nowhere://x")
