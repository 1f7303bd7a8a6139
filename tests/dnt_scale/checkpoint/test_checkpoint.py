"""What is on disk is a whole checkpoint or is refused, whatever was killed, damaged or full."""

import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from testbed.run import (
    STEPS,
    TINY_MODEL,
    can_mount,
    complete_checkpoints,
    dnt,
    metrics,
    same_tensors,
    start,
    steps_written,
    stop_midway,
    tensors,
    tiny,
    train,
)
from testbed.waiting import until

LAST = f"step-{STEPS:08d}"


def in_folder(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_tensors_are_named_fp32_and_safetensors_only(reference):
    folder = reference / "checkpoints" / LAST
    whole = tensors(folder)
    names = {name.removeprefix("model.") for name in whole if name.startswith("model.")}
    assert {"tok_emb.weight", "pos_emb.weight", "blocks.0.attn.w_q.weight", "norm_out.gain"} < names
    assert whole.keys() == {
        f"{kind}.{name}" for kind in ("model", "momentum_buffer") for name in names
    }
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert (
        whole["model.tok_emb.weight"].shape
        == whole["momentum_buffer.tok_emb.weight"].shape
        == (512, 64)
    )
    files = sorted(path.name for path in folder.iterdir())
    assert [Path(name).suffix for name in files] == [".safetensors", ".safetensors", ".json"]
    for name in files[:-1]:
        with safe_open(folder / name, "pt") as file:
            assert file.keys()


def test_state_json_says_where_the_run_stands(corpus, reference):
    state = json.loads((reference / "checkpoints" / LAST / "state.json").read_text())
    known = {
        "step": STEPS,
        "consumed_rows": 8 * STEPS,
        "tokens": 512 * STEPS,
        "skipped": 0,
        "world_size": 2,
    }
    assert {key: state[key] for key in known} == known
    assert {key: state["engine"][key] for key in ("step", "updates")} == {
        "step": STEPS,
        "updates": STEPS,
    }
    assert state["config"]["data"]["path"] == str(corpus)


def test_retention_and_latest(corpus, reference, tmp_path):
    assert complete_checkpoints(reference) == [f"step-{step:08d}" for step in (6, 12, 18, 20)]
    train(
        tiny(corpus, tmp_path / "run", "checkpoint.keep=2", "checkpoint.every=1", "train.steps=6")
    ).ok()
    assert in_folder(tmp_path / "run") == ["latest", "step-00000005", "step-00000006"]
    assert (tmp_path / "run" / "checkpoints" / "latest").readlink() == Path("step-00000006")
    assert len(complete_checkpoints(tmp_path / "run")) == 2


def test_kills_during_saves_lose_nothing(corpus, reference, tmp_path):
    """A checkpoint every step and, again and again, kill -9 in the middle of one."""
    run_dir = tmp_path / "run"
    overrides = tiny(corpus, run_dir, "checkpoint.every=1")
    folder = run_dir / "checkpoints"
    partial_seen = False
    before: list[str] = []
    for moment in (2, 5, 9, 13):
        group = start(overrides, ranks=2)
        final = folder / f"step-{moment:08d}"
        until(lambda group=group, final=final: final.exists() or not group.running)
        until(
            lambda group=group: any(folder.glob(".partial-step-*")) or not group.running,
            every=0.001,
        )
        time.sleep(random.random() * 0.01)
        group.kill(signal.SIGKILL)
        codes = group.wait().codes
        assert set(codes) <= {-signal.SIGKILL, 0}, codes
        partial_seen |= any(folder.glob(".*-step-*"))
        whole = complete_checkpoints(run_dir)
        assert whole and whole >= before
        before = whole
    assert partial_seen
    train(overrides, ranks=2).ok()
    assert in_folder(run_dir) == ["latest", f"step-{STEPS - 1:08d}", LAST]
    assert metrics(run_dir) == metrics(reference)
    assert same_tensors(folder / LAST, reference / "checkpoints" / LAST)


def test_remains_of_a_killed_save_are_ignored_and_cleaned(corpus, finished_run):
    folder = finished_run / "checkpoints"
    shutil.copytree(folder / LAST, folder / ".partial-step-00000022")
    (folder / ".partial-step-00000022" / "state.json").write_text('{"format": "dnt-ch')
    shutil.copytree(folder / LAST, folder / ".old-step-00000003")
    (folder / "step-00000099").mkdir()  # without a state.json it is no checkpoint
    (folder / "latest").unlink()
    (folder / ".latest").symlink_to("step-00000099")
    done = train(tiny(corpus, finished_run, "train.steps=22", "checkpoint.keep=1")).ok()
    assert f"resumingfrom{folder / LAST}" in "".join(done.err.split())  # the console folds lines
    shutil.rmtree(folder / "step-00000099")
    assert in_folder(finished_run) == ["latest", "step-00000022"]


def truncate(folder: Path) -> str:
    path = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(path, path.stat().st_size // 2)
    return f"{path}: truncated"


def flip_a_byte(folder: Path) -> str:
    path = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return f"{path}: damaged"


@pytest.mark.parametrize("damage", [truncate, flip_a_byte])
def test_a_damaged_checkpoint_is_named_and_refused(corpus, finished_run, damage):
    message = damage(finished_run / "checkpoints" / LAST)
    before = (finished_run / "metrics.jsonl").read_bytes()
    error = train(tiny(corpus, finished_run), ranks=2).error()
    assert message in error
    assert (
        f"remove {finished_run / 'checkpoints' / LAST} to go on from an older checkpoint" in error
    )
    assert (finished_run / "metrics.jsonl").read_bytes() == before


def test_after_removing_a_damaged_checkpoint_the_older_one_serves(corpus, reference, finished_run):
    shutil.rmtree(finished_run / "checkpoints" / LAST)
    done = train(tiny(corpus, finished_run), ranks=2).ok()
    folder = finished_run / "checkpoints"
    said = f"resuming from {folder}/step-00000018 ({LAST}, the latest, is gone)"
    assert "".join(said.split()) in "".join(done.err.split())
    assert (folder / "latest").readlink() == Path(LAST)
    assert metrics(finished_run) == metrics(reference)
    assert same_tensors(finished_run / "checkpoints" / LAST, reference / "checkpoints" / LAST)


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_pickles_lying_in_a_checkpoint_are_not_loaded(corpus, finished_run, tmp_path):
    marker = tmp_path / "unpickled"
    payload = pickle.dumps(Payload(marker))
    for name in (".metadata", "__0_0.distcp", "model.pt", "optimizer.bin"):
        (finished_run / "checkpoints" / LAST / name).write_bytes(payload)
    train(tiny(corpus, finished_run, "train.steps=21")).ok()
    assert not marker.exists()


@dataclass
class Disk:
    """A place with too little room for one more checkpoint, until `make_room` is called."""

    folder: Path
    file_limit: int
    message: str

    def make_room(self) -> None:
        self.file_limit = resource.RLIM_INFINITY
        if os.path.ismount(self.folder):
            subprocess.run(["mount", "-o", "remount,size=32m", self.folder], check=True)


@pytest.fixture(
    params=["a limit on file sizes", "a full tmpfs"] if can_mount() else ["a limit on file sizes"]
)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """Real failing writes: everyone can have the limit, root a small tmpfs as well."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "a limit on file sizes":
        yield Disk(folder, 400_000, "File too large")
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1900k", "dnt-test", folder], check=True)
    try:
        yield Disk(folder, resource.RLIM_INFINITY, "disk full")
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_stops_the_run_and_the_same_command_goes_on(corpus, reference, disk):
    run_dir = disk.folder / "run"
    shutil.copytree(reference, run_dir, ignore=shutil.ignore_patterns("step-*", "latest", "plots"))
    shutil.copytree(
        reference / "checkpoints" / "step-00000012", run_dir / "checkpoints" / "step-00000012"
    )
    overrides = tiny(corpus, run_dir, "checkpoint.keep=1")
    error = train(overrides, ranks=2, file_limit=disk.file_limit).error()
    assert disk.message in error
    assert str(run_dir / "checkpoints" / ".partial-step-00000018") in error
    assert in_folder(run_dir) == ["step-00000012"]
    assert complete_checkpoints(run_dir) == ["step-00000012"]
    disk.make_room()
    train(overrides, ranks=2, file_limit=disk.file_limit).ok()
    assert in_folder(run_dir) == ["latest", LAST]
    assert metrics(run_dir) == metrics(reference)
    assert same_tensors(run_dir / "checkpoints" / LAST, reference / "checkpoints" / LAST)


@pytest.mark.skipif(not can_mount(), reason="only root can mount a tmpfs")
def test_metrics_that_cannot_be_written_end_all_ranks_with_one_line(corpus, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "dnt-test", folder], check=True)
    try:
        run_dir = folder / "run"
        group = start(tiny(corpus, run_dir, "train.steps=5000", "checkpoint.every=0"), ranks=2)
        until(lambda: steps_written(run_dir) >= 5 or not group.running)
        with (folder / "fill").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        error = group.wait().error()
        assert "No space left on device" in error and str(run_dir / "metrics.jsonl") in error
        assert metrics(run_dir)[-1]["step"] >= 5  # whole lines only
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_run_begins_from_converted_weights(corpus, reference, tmp_path):
    file, run_dir = tmp_path / "w.safetensors", tmp_path / "run"
    dnt("checkpoint", "convert", reference, file).ok()
    given = [
        line for line in tiny(corpus, run_dir, "train.steps=3") if not line.startswith("model")
    ]
    told = dnt("checkpoint", "convert", file, *given).ok().out
    model = told.partition(" the same settings and ")[2].partition(" begins from it")[0].split()
    assert model == TINY_MODEL  # as the file's metadata has it
    done = train([*given, *model], ranks=2).ok()
    assert f"resumingfrom{run_dir}/checkpoints/step-00000000" in "".join(done.err.split())
    losses = [line["train/loss"] for line in metrics(run_dir) if "train/loss" in line]
    fresh = [line["train/loss"] for line in metrics(reference) if "train/loss" in line]
    assert (
        len(losses) == 3
        and losses[0] == pytest.approx(fresh[-1], abs=0.3)
        and losses[0] < fresh[0] - 0.5
    )


def test_a_runs_checkpoints_may_lie_at_a_url(corpus, reference, tmp_path):
    overrides = tiny(
        corpus,
        tmp_path / "run",
        f"checkpoint.dir=file://{tmp_path}/bucket/tiny",
        "checkpoint.keep=1",
    )
    stop_midway(overrides, tmp_path / "run", lambda group: group.kill(signal.SIGTERM))
    train(overrides, ranks=2).ok()
    assert metrics(tmp_path / "run") == metrics(reference)
    assert [path.name for path in (tmp_path / "bucket" / "tiny").iterdir()] == [LAST]
    assert same_tensors(tmp_path / "bucket" / "tiny" / LAST, reference / "checkpoints" / LAST)
    assert not (tmp_path / "run" / "checkpoints").exists()
