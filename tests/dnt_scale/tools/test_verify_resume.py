import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from dnt_scale.cli.main import main
from dnt_scale.tools import verify_resume as tool
from dnt_scale.tools.verify_resume import (
    Failed,
    children,
    distance,
    equal,
    first_divergence,
    near,
    verify_resume,
)
from dnt_scale.train.launch import complaint, environment
from testbed.run import ENVIRONMENT, TINY_RUN, Finished, call, synthetic_set
from testbed.waiting import until
from tests.helpers.sweeps import Forked

pytestmark = pytest.mark.slow

STEPS = 6


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    data = synthetic_set(tmp_path_factory.mktemp("verify") / "set")
    return [*TINY_RUN, f"data.path={data}"]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def be_verify_resume(folder: Path, words: Sequence[str]) -> None:
    """`dnt verify-resume`, working in ``folder``, whose single ranks are forked from it; several
    are torchrun's.
    """
    under_torchrun = tool.started

    @contextmanager
    def started(overrides: Sequence[str], ranks: int, log: Path) -> Iterator[object]:
        if ranks > 1:
            with under_torchrun(overrides, ranks, log) as process:
                yield process
            return
        forked = Forked(overrides, ranks, log, environment())
        try:
            yield forked
        finally:
            forked.send_signal(signal.SIGKILL)
            until(lambda: forked.poll() is not None)

    tool.started = started
    tempfile.tempdir = str(folder)
    sys.exit(main(["verify-resume", *words]))


def verified(folder: Path, *words: object) -> Finished:
    return call(be_verify_resume, folder, [str(word) for word in words])


@pytest.fixture(scope="module")
def kept(overrides, tmp_path_factory) -> Path:
    """The folders `straight` and `resumed` of a run on 2 ranks that was killed and resumed,
    bitwise equal.
    """
    place = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(place))
        assert verify_resume([*overrides, "train.dtype=auto"], steps=STEPS, ranks=2, keep=True)
    (folder,) = place.iterdir()
    return folder


def test_the_same_run_goes_on_to_the_last_bit(kept, capsys):
    assert equal(kept / "straight", kept / "resumed")
    assert (
        capsys.readouterr().out
        == "bitwise equal: 6 steps, and every tensor of the last checkpoint\n"
    )
    assert (kept / "killed.log").exists()


def test_other_ranks_and_another_engine_go_on_within_rounding(overrides, tmp_path):
    # more micro-batches, or both numbers of ranks would add the same sums
    asked = [*overrides, "train.micro_batch=2", "--steps", STEPS, "--then-ranks", 2]
    finished = verified(tmp_path, *asked, "--then", "engine=ddp").ok()
    out = finished.out
    assert re.search(
        r"killed at step \d; goes on from the checkpoint of step 3$", finished.err, re.MULTILINE
    )
    assert not list(tmp_path.glob("dnt-verify-resume-*"))
    assert re.search(
        r"^largest difference of the weights in the last checkpoint: \S+ \(model\.\S+\)$",
        out,
        re.MULTILINE,
    )
    assert "\nlargest difference of momentum_buffer in the last checkpoint: " in out
    assert out.endswith("within 1e-05 of loss and weights, the tolerance of fp32\n")


def test_another_learning_rate_is_no_rounding_in_the_dtype_that_rounds_most(overrides, tmp_path):
    more = ["optim.lr=5", "train.dtype=bf16"]
    finished = verified(tmp_path, *overrides, "--steps", STEPS, "--then", *more)
    assert finished.code == 1, finished.err
    assert finished.out.endswith("\nnot within 0.01 of loss and weights, the tolerance of bf16\n")


def test_what_cannot_run_is_an_error(overrides, tmp_path):
    with pytest.raises(ValueError, match=r"optim.lrr: no such field; did you mean optim.lr\?"):
        verify_resume(overrides, then=["optim.lrr=1"])
    with pytest.raises(ValueError, match=r"--steps is 1, --ranks 1; a kill half-way takes 2 steps"):
        verify_resume(overrides, steps=1)
    with pytest.raises(Failed, match=r"^the straight run failed: .*no-set: no such folder"):
        verify_resume([*overrides, f"data.path={tmp_path}/no-set"], steps=STEPS)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def other(kept, tmp_path) -> Path:
    return Path(shutil.copytree(kept / "resumed", tmp_path / "other", symlinks=True))


def test_a_step_that_differs_is_named(kept, other, capsys):
    assert equal(kept / "straight", other)
    path = other / "metrics.jsonl"
    lines = path.read_text().splitlines()
    loss = json.loads(lines[4])["train/loss"]
    moved = math.nextafter(loss, math.inf)
    lines[4] = json.dumps({**json.loads(lines[4]), "train/loss": moved})
    path.write_text("\n".join([*lines, ""]))
    capsys.readouterr()
    assert not equal(kept / "straight", other)
    words = f"step 5: train/loss is {loss!r} and {moved!r}, {moved - loss:.3g} apart\n"
    assert capsys.readouterr().out == f"first divergence (straight, then resumed): {words}"


def test_a_tensor_that_differs_in_its_last_bit_is_named(kept, other, capsys):
    file = next((other / "checkpoints" / "latest").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)
    assert not equal(kept / "straight", other)
    found = capsys.readouterr().out
    assert re.match(
        r"first divergence .*: the last checkpoint: (model|momentum_buffer)\.\S+\[.*\]: \S+ and "
        r"\S+, ",
        found,
    )
    assert near(kept / "straight", other, 3, 1e-5, "fp32")
    capsys.readouterr()
    assert near(kept / "straight", kept / "resumed", 3, 1e-5, "fp32")
    lines = capsys.readouterr().out.splitlines()
    assert "largest difference of the weights in the last checkpoint: 0 (bitwise equal)" in lines


def test_steps_before_the_kill_must_be_equal_on_any_engine(kept, other, capsys):
    path = other / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join([json.dumps({**json.loads(lines[0]), "grad_norm": 1.0}), *lines[1:], ""])
    )
    assert not near(kept / "straight", other, 3, 1e-5, "fp32")
    assert "step 1: grad_norm is " in capsys.readouterr().out


def test_first_divergence():
    steps = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": None}]
    assert first_divergence(steps, steps) is None
    assert first_divergence(steps, steps[:1]) == "metrics.jsonl has 2 and 1 steps"
    assert first_divergence(steps, [steps[0], {"step": 2, "train/loss": 1.0}]) == (
        "step 2: train/loss is None and 1.0, inf apart"
    )
    assert (distance(1.0, 3.0), distance(None, None)) == (2.0, 0.0)


def test_what_a_failed_run_said(tmp_path):
    log = tmp_path / "log"
    log.write_text("W1124 noise\nrank 1: error: data.path: no such folder\nTraceback\n")
    assert complaint(log) == "data.path: no such folder"
    log.write_text("\n".join(map(str, range(20))))
    assert complaint(log).split() == [str(number) for number in range(10, 20)]


def test_children_of_a_process():
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            assert process.pid in children(os.getpid())
            assert children(process.pid) == []
        finally:
            process.kill()
