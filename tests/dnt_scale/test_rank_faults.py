"""Whatever befalls one rank of a run, all end soon with a message that names it, and the next
start goes on bitwise.
"""

import json
import os
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dnt_scale.record import timeline
from dnt_scale.train.rank import main
from testbed.run import (
    STEPS,
    Finished,
    Ranks,
    call,
    complete_checkpoints,
    metrics,
    same_tensors,
    start,
    steps_written,
    tiny,
    train,
)
from testbed.waiting import until

LAST = f"checkpoints/step-{STEPS:08d}"
FIELDS = ["checkpoint.every=2"]


@pytest.fixture(scope="module")
def undisturbed(corpus, reference, tmp_path_factory):
    """The folders of undisturbed runs by their number of ranks; to be read only."""
    run_dir = tmp_path_factory.mktemp("whole") / "tiny"
    train(tiny(corpus, run_dir, "checkpoint.keep=9"), ranks=4).ok()
    return {2: reference, 4: run_dir}


def hit(
    overrides: list[str],
    run_dir: Path,
    ranks: int,
    when: Callable[[], bool],
    act: Callable[[Ranks], None],
):
    """Start a run, ``act`` on it at a moment, and wait; again when it had ended before."""
    for _ in range(10):
        group = start(overrides, ranks)
        until(lambda group=group: when() or not group.running, every=0.001)
        act(group)
        finished = group.wait()
        if steps_written(run_dir) < STEPS:
            return finished
        shutil.rmtree(run_dir)
    raise AssertionError("never hit before its end")


def goes_on_as_if_nothing_had_been(
    overrides: list[str], run_dir: Path, ranks: int, undisturbed: Path
) -> None:
    assert complete_checkpoints(run_dir)
    train(overrides, ranks).ok()
    assert metrics(run_dir) == metrics(undisturbed)
    assert same_tensors(run_dir / LAST, undisturbed / LAST)
    assert not list((run_dir / "checkpoints").glob(".*-step-*"))


def ended_naming(finished: Finished, rank: int, run_dir: Path) -> None:
    """The victim was killed, all others ended with status 1; one line and the timeline name it
    and its host.
    """
    others = [code for index, code in enumerate(finished.codes) if index != rank]
    assert finished.codes[rank] == -signal.SIGKILL, finished.err
    assert set(others) == {1}, finished.err
    assert "Traceback" not in finished.err, finished.err
    (line,) = [line for line in finished.err.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: rank {rank} ({socket.gethostname()}) "), finished.err
    (lost,) = [event for event in timeline.read(run_dir) if event["event"] == "lost"]
    assert line.startswith(f"error: {lost['message']}; all ranks end; ")
    assert lost["hosts"] == [socket.gethostname()]


@pytest.mark.parametrize(("ranks", "victim"), [(2, 0), (2, 1), (4, 2)])
def test_a_rank_killed_in_a_step(corpus, undisturbed, tmp_path, ranks, victim):
    overrides = tiny(corpus, tmp_path / "run", *FIELDS)
    finished = hit(
        overrides,
        tmp_path / "run",
        ranks,
        lambda: steps_written(tmp_path / "run") >= 5,
        lambda group: group.kill(signal.SIGKILL, victim),
    )
    ended_naming(finished, victim, tmp_path / "run")
    goes_on_as_if_nothing_had_been(overrides, tmp_path / "run", ranks, undisturbed[ranks])


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_killed_in_a_save(corpus, undisturbed, tmp_path, ranks):
    overrides = tiny(corpus, tmp_path / "run", *FIELDS)

    def saving() -> bool:
        return steps_written(tmp_path / "run") >= 5 and any(
            (tmp_path / "run").glob("checkpoints/.partial-*")
        )

    finished = hit(
        overrides,
        tmp_path / "run",
        ranks,
        saving,
        lambda group: group.kill(signal.SIGKILL, ranks - 1),
    )
    ended_naming(finished, ranks - 1, tmp_path / "run")
    goes_on_as_if_nothing_had_been(overrides, tmp_path / "run", ranks, undisturbed[ranks])


@pytest.mark.parametrize(("ranks", "victim"), [(2, 1), (4, 0)])
def test_a_rank_that_is_stopped(corpus, undisturbed, tmp_path, ranks, victim):
    overrides = tiny(corpus, tmp_path / "run", *FIELDS)
    finished = hit(
        [*overrides, "health.hang_s=8"],
        tmp_path / "run",
        ranks,
        lambda: steps_written(tmp_path / "run") >= 5,
        lambda group: group.kill(signal.SIGSTOP, victim),
    )
    ended_naming(finished, victim, tmp_path / "run")  # by the others, for it cannot end by itself
    goes_on_as_if_nothing_had_been(overrides, tmp_path / "run", ranks, undisturbed[ranks])


def train_with_a_nan(overrides: list[str], rank: int, forward: int) -> None:
    """`dnt_scale.train` whose forward pass number ``forward`` gives NaN on one rank."""
    from dnt_scale.model import dnt
    from dnt_scale.model.dnt import DNT

    class Poisoned(DNT):
        passes = 0

        def forward(self, tokens_BT, targets_BT=None):
            loss = super().forward(tokens_BT, targets_BT)
            if loss.requires_grad:
                Poisoned.passes += 1
                if Poisoned.passes == forward and int(os.environ["RANK"]) == rank:
                    return loss * float("nan")
            return loss

    dnt.DNT = Poisoned
    sys.exit(main(overrides))


@pytest.mark.parametrize(("ranks", "engine"), [(2, "zero2"), (4, "fsdp")])
def test_a_nan_on_one_rank(corpus, tmp_path, ranks, engine):
    """With 2 ranks a step is two passes, with 4 it is one; the fifth step is hit."""
    forward = 10 if ranks == 2 else 5
    overrides = tiny(
        corpus,
        tmp_path / "run",
        f"engine={engine}",
        "checkpoint.every=3",
        "eval.every=0",
        "train.micro_batch=2",
    )
    call(train_with_a_nan, overrides, ranks - 1, forward, ranks=ranks).ok()
    assert [line["step"] for line in metrics(tmp_path / "run") if line["skipped"]] == [5]
    bad = (tmp_path / "run" / "logs" / "bad_steps.jsonl").read_text().splitlines()
    assert len(bad) == 1 and '"positions":[32,40]' in bad[0]
    # killed before the bad step, the run meets it again and ends as it did
    run_dir = tmp_path / "again"
    again = [*overrides, f"run.dir={run_dir}"]
    group = Ranks(train_with_a_nan, (again, ranks - 1, forward), ranks, {})
    until(lambda: len(list(run_dir.glob("checkpoints/step-*"))) > 0 or not group.running)
    group.kill(signal.SIGKILL)
    group.wait()
    before = max(int(path.name[5:]) for path in run_dir.glob("checkpoints/step-*"))
    left = forward - before * (2 if ranks == 2 else 1)
    call(train_with_a_nan, again, ranks - 1, left, ranks=ranks).ok()
    assert metrics(run_dir) == metrics(tmp_path / "run")
    assert same_tensors(run_dir / LAST, tmp_path / "run" / LAST)


def train_with_a_flipped_bit(overrides: list[str], rank: int, step: int) -> None:
    """`dnt_scale.train` in which a weight of one rank changes in its last bit before ``step``."""
    from dnt_scale.train import loop, setup

    beat, build, built = loop.beat, setup.engine.build, []

    def kept(*arguments):
        built.append(build(*arguments))
        return built[0]

    def marked(where: str) -> None:
        if where == f"step {step}" and int(os.environ["RANK"]) == rank:
            built[0].shards()[0].data.view(torch.int32).flatten()[5] ^= 1
        beat(where)

    setup.engine.build, loop.beat = kept, marked
    sys.exit(main(overrides))


def test_a_replica_that_parts_from_the_others(corpus, tmp_path):
    overrides = tiny(
        corpus,
        tmp_path / "run",
        "engine=ddp",
        "health.check_every=2",
        "eval.every=0",
        "checkpoint.every=2",
    )
    fault = call(train_with_a_flipped_bit, overrides, 1, 4, ranks=4).fault()
    assert fault.startswith(
        "error: rank 1 has other bits in model.tok_emb.weight than ranks 0, 2 and 3, which should "
    )
    assert steps_written(tmp_path / "run") == 4
    assert "step-00000002" in complete_checkpoints(tmp_path / "run")


def train_with(overrides: list[str], rank: int, more: list[str]) -> None:
    """`dnt_scale.train` with more overrides on one rank."""

    sys.exit(main([*overrides, *(more if int(os.environ["RANK"]) == rank else [])]))


@pytest.mark.parametrize(("ranks", "rank"), [(4, 2), (2, 0)])
def test_a_rank_with_another_configuration(corpus, tmp_path, ranks, rank):
    overrides = tiny(corpus, tmp_path / "run")
    error = call(train_with, overrides, rank, ["optim.lr=0.2"], ranks=ranks).error()
    # on whichever side it is, rank 0 is what the others are compared with
    here, there = ("0.1", "0.2") if rank == 0 else ("0.2", "0.1")
    assert f"optim.lr is {here} on rank {rank or 1}, but {there} on rank 0" in error
    assert not (tmp_path / "run").exists()


def train_on_a_small_disk(overrides: list[str], rank: int, room: int) -> None:
    """`dnt_scale.train`; no file that this rank writes may exceed ``room`` bytes."""

    if int(os.environ["RANK"]) == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    sys.exit(main(overrides))


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_disk_that_is_full_for_one_rank(corpus, undisturbed, tmp_path, ranks):
    """Its first save fails; the next start, on a disk with room, begins again and is the
    undisturbed run.
    """
    overrides = tiny(corpus, tmp_path / "run", *FIELDS)
    error = call(train_on_a_small_disk, overrides, ranks - 1, 20_000, ranks=ranks).error()
    assert "checkpoints" in error and f"on rank {ranks - 1}" in error
    assert not complete_checkpoints(tmp_path / "run")
    train(overrides, ranks).ok()
    assert metrics(tmp_path / "run") == metrics(undisturbed[ranks])
    assert same_tensors(tmp_path / "run" / LAST, undisturbed[ranks] / LAST)


def train_without_a_file_system(overrides: list[str], rank: int) -> None:
    """`dnt_scale.train` on ranks of which one cannot open a URL."""
    import fsspec.core

    def missing(url: str) -> None:
        raise ImportError

    if int(os.environ["RANK"]) == rank:
        fsspec.core.url_to_fs = missing
    sys.exit(main(overrides))


def test_a_node_that_cannot_open_the_url(corpus, tmp_path):
    overrides = tiny(corpus, tmp_path / "run", f"checkpoint.dir=file://{tmp_path}/there")
    error = call(train_without_a_file_system, overrides, 1, ranks=2).error()
    assert (
        f"rank 1: file://{tmp_path}/there: file:// needs a package that is not here; pip install"
        in error
    )


def test_a_rank_whose_configuration_is_none_says_so(tmp_path):
    wrong = tiny(tmp_path, tmp_path / "run", "optim.lrr=1")
    finished = train(wrong, ranks=2)
    assert "error: configuration: optim.lrr: no such field" in finished.error()
    assert (
        "rank 1: error: configuration: optim.lrr: no such field; did you mean optim.lr?"
        in finished.err
    )
    alone = train(wrong, env={"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"})
    assert alone.code == 2 and alone.err.startswith(
        "rank 1: error: configuration: optim.lrr: no such field"
    )


def train_with_a_spike(overrides: list[str], step: int, killed_at: int | None = None) -> None:
    """`dnt_scale.train` whose loss is a thousandfold on rank 1 at ``step``; all ranks die at the
    step ``killed_at``.
    """
    from dnt_scale.model import dnt
    from dnt_scale.model.dnt import DNT
    from dnt_scale.train import loop

    beat, now = loop.beat, [""]

    def marked(where: str) -> None:
        now[0] = where
        if where == f"step {killed_at}":
            os.kill(os.getpid(), signal.SIGKILL)
        beat(where)

    class Spiked(DNT):
        def forward(self, tokens_BT, targets_BT=None):
            loss = super().forward(tokens_BT, targets_BT)
            return loss * 1000 if now[0] == f"step {step}" and os.environ["RANK"] == "1" else loss

    dnt.DNT, loop.beat = Spiked, marked
    sys.exit(main(overrides))


SPIKE = [
    "health.spike_window=8",
    "health.spike_sigmas=20",
    "eval.every=0",
    "train.steps=16",
    "checkpoint.keep=99",
]


@pytest.mark.parametrize(
    ("spike", "every", "same_as", "updates"),
    [("skip", 1, 11, 11), ("clip", 1, None, 12), ("rollback", 4, 8, 8)],
)
def test_a_spike(corpus, tmp_path, spike, every, same_as, updates):
    """At step 12; what it leaves is the weights of another step, or a step of the usual length."""
    run_dir = tmp_path / "run"
    overrides = tiny(corpus, run_dir, *SPIKE, f"health.spike={spike}", f"checkpoint.every={every}")
    finished = call(train_with_a_spike, overrides, 12, ranks=2).ok()
    (said,) = [line for line in finished.err.splitlines() if " spike (" in line]
    assert said.startswith("step 12: a loss and gradient spike (loss ")
    lines = metrics(run_dir)
    assert [line["step"] for line in lines if line["skipped"]] == ([] if spike == "clip" else [12])
    for action in ("clip", "rollback"):
        assert [line["step"] for line in lines if line[f"health/{action}"]] == (
            [12] if spike == action else []
        )
    (bad,) = map(json.loads, (run_dir / "logs" / "bad_steps.jsonl").read_text().splitlines())
    assert (bad["step"], bad["action"], bad["positions"]) == (12, spike, [88, 96])
    place = run_dir / "checkpoints"
    assert (
        json.loads((place / "step-00000012/state.json").read_text())["engine"]["updates"] == updates
    )
    if same_as:
        assert same_tensors(place / "step-00000012", place / f"step-{same_as:08d}")
    else:
        assert not same_tensors(place / "step-00000012", place / "step-00000011")
        assert lines[-1]["train/loss"] < lines[10]["train/loss"] + 0.3


def test_a_rollback_of_a_run_that_was_killed(corpus, tmp_path):
    """Killed between the checkpoint and the spike, the run goes back to the same weights as one
    left alone.
    """
    fields = [*SPIKE, "health.spike=rollback", "checkpoint.every=4", "checkpoint.background=false"]
    whole, again = (tiny(corpus, tmp_path / name, *fields) for name in ("whole", "again"))
    call(train_with_a_spike, whole, 12, ranks=2).ok()
    assert -signal.SIGKILL in call(train_with_a_spike, again, 12, 11, ranks=2).codes
    assert complete_checkpoints(tmp_path / "again")[-1] == "step-00000008"
    call(train_with_a_spike, again, 12, ranks=2).ok()
    assert metrics(tmp_path / "again") == metrics(tmp_path / "whole")
    for step in (8, 12, 16):
        name = f"checkpoints/step-{step:08d}"
        assert same_tensors(tmp_path / "again" / name, tmp_path / "whole" / name)
