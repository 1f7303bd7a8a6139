"""A run that was killed and started again is the run that was never killed."""

import json
import shutil
import signal
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from dnt_scale import config
from dnt_scale.config.tracking_uri import default_uri
from dnt_scale.data.token_sets import load_sets
from dnt_scale.data.tokens import token_stream
from dnt_scale.train.rank import main
from testbed.run import (
    STEPS,
    Ranks,
    dnt,
    metrics,
    same_tensors,
    steps_written,
    stop_midway,
    tensors,
    tiny,
    train,
)
from testbed.stores import sqlite_store
from testbed.waiting import until

LAST = f"checkpoints/step-{STEPS:08d}"


def test_what_a_killed_run_wrote_is_true(killed, reference):
    step = steps_written(killed)
    assert 0 < step < STEPS
    assert metrics(killed) == [line for line in metrics(reference) if line["step"] <= step]


def test_resuming_on_as_many_ranks_is_bitwise_the_uninterrupted_run(
    corpus, killed, reference, tmp_path
):
    run_dir = shutil.copytree(killed, tmp_path / "run", symlinks=True)
    train(tiny(corpus, run_dir, "checkpoint.every=3"), ranks=2).ok()
    assert metrics(run_dir) == metrics(reference)
    assert same_tensors(run_dir / LAST, reference / LAST)


def test_bf16_resumes_bitwise_too(corpus, tmp_path):
    bf16 = ["train.dtype=bf16", "optim.lr=1.0", "checkpoint.every=4", "checkpoint.background=false"]
    train(tiny(corpus, tmp_path / "whole", *bf16), ranks=2).ok()
    run_dir = tmp_path / "run"
    overrides = tiny(corpus, run_dir, *bf16)
    stop_midway(overrides, run_dir, lambda group: group.kill(signal.SIGKILL), after=5)
    assert "resuming from" in " ".join(train(overrides, ranks=2).ok().err.split())
    assert metrics(run_dir) == metrics(tmp_path / "whole")
    assert same_tensors(run_dir / LAST, tmp_path / "whole" / LAST)
    assert {str(value.dtype) for value in tensors(run_dir / LAST).values()} == {"torch.float32"}


@pytest.mark.parametrize("ranks", [1, 4])
def test_resuming_on_other_ranks_goes_on_with_the_same_rows(
    corpus, killed, reference, tmp_path, ranks
):
    run_dir = shutil.copytree(killed, tmp_path / "run", symlinks=True)
    train(tiny(corpus, run_dir, "checkpoint.every=3"), ranks).ok()
    ours, theirs = metrics(run_dir), metrics(reference)
    assert [(line["step"], line["tokens"]) for line in ours] == [
        (line["step"], line["tokens"]) for line in theirs
    ]
    for field in ("train/loss", "val/loss"):
        pairs = [(a[field], b[field]) for a, b in zip(ours, theirs, strict=True) if field in b]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=0, atol=1e-4)
    resumed, whole = tensors(run_dir / LAST), tensors(reference / LAST)
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(
            resumed[name].numpy(), value.numpy(), rtol=0, atol=1e-4, err_msg=name
        )


def test_a_finished_run_has_nothing_to_do(corpus, finished_run):
    before = (finished_run / "metrics.jsonl").read_bytes()
    steps = sorted(path.name for path in (finished_run / "checkpoints").iterdir())
    done = train(tiny(corpus, finished_run, "checkpoint.keep=9"), ranks=2).ok()
    assert f"done: {STEPS} steps" in done.err
    assert (finished_run / "metrics.jsonl").read_bytes() == before
    assert sorted(path.name for path in (finished_run / "checkpoints").iterdir()) == steps


def test_another_runs_checkpoints_are_refused(corpus, finished_run, tmp_path):
    place = finished_run / "checkpoints"
    names = sorted(path.name for path in place.iterdir())
    shared = f"checkpoint.dir={place}"
    error = train(tiny(corpus, tmp_path / "other", "run.name=other", shared), ranks=2).error()
    assert error.startswith(
        f"error: checkpoint.dir: {place}/step-{STEPS:08d} is of the run tiny, this one is other; "
    )
    assert f"checkpoint.dir='{place}/${{run.name}}'" in error
    assert (
        sorted(path.name for path in place.iterdir()) == names and not (tmp_path / "other").exists()
    )
    # the run itself
    assert "done: " in train(tiny(corpus, tmp_path / "moved", shared, "checkpoint.keep=9")).ok().err


@pytest.mark.parametrize(
    ("field", "overrides", "place"),
    [
        ("run.dir", ["run.dir=FILE"], "FILE"),
        ("run.dir", ["run.dir=/proc/nowhere"], "/proc/nowhere"),
        ("run.dir", ["run.dir=FILE", "checkpoint.dir=RUN/checkpoints"], "FILE"),
        ("checkpoint.dir", ["checkpoint.dir=FILE"], "FILE"),
        ("checkpoint.dir", ["checkpoint.dir=file:///proc/nowhere"], "file:///proc/nowhere"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_at_the_start(
    corpus, tmp_path, field, overrides, place
):
    file = tmp_path / "file"
    file.write_text("in the way")

    def filled(text: str) -> str:
        return text.replace("FILE", str(file)).replace("RUN", str(tmp_path))

    error = train(tiny(corpus, tmp_path / "run", *map(filled, overrides)), ranks=2).error()
    assert error.startswith(f"error: {field}: nothing can be written to {filled(place)} ("), error
    assert error.endswith("); give another") and file.read_text() == "in the way"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_more_steps_go_on_from_the_end(corpus, finished_run):
    before = metrics(finished_run)
    train(tiny(corpus, finished_run, "train.steps=23"), ranks=2).ok()
    assert metrics(finished_run)[: len(before)] == before
    assert [line["step"] for line in metrics(finished_run)][len(before) :] == [21, 22, 23]


def test_a_resumed_run_is_one_mlflow_run(corpus, tmp_path):
    run_dir = tmp_path / "runs" / "tracked"
    overrides = tiny(corpus, run_dir, "tracking.enabled=true", "run.name=tracked", "eval.every=0")
    sqlite_store(file := Path(default_uri(run_dir).removeprefix("sqlite:///")))
    for steps in (3, 6):
        train([*overrides, f"train.steps={steps}"]).ok()
    store = sqlite3.connect(file)
    # training waits a minute for its sender; where others compute too, that takes longer
    ended = [("tracked", "FINISHED")]
    until(lambda: store.execute("select name, status from runs").fetchall() == ended)
    points = store.execute(
        "select step, value from metrics where key = 'train/loss' order by step"
    ).fetchall()
    assert points == [(line["step"], line["train/loss"]) for line in metrics(run_dir)]
    assert [step for step, _ in points] == [1, 2, 3, 4, 5, 6]


def train_and_keep_batches(overrides: list[str], folder: Path) -> None:
    """`dnt_scale.train`, leaving each batch that it trains on as a file named by state and rank."""
    from dnt_scale.data.stream import Stream

    taken = Stream.__next__

    def kept(self):
        batch, consumed = taken(self)
        np.save(folder / f"{consumed:06d}-{self.offset:02d}.npy", batch.numpy())
        return batch, consumed

    Stream.__next__ = kept
    sys.exit(main(overrides))


@pytest.fixture(scope="module")
def stopped_mixture(mixed, tmp_path_factory):
    """A run on a mixture on 4 ranks, stopped by SIGTERM before its end: its folder, overrides
    and batches.
    """
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "4").mkdir()
    data = [
        "train.global_batch=12",
        "train.micro_batch=3",
        "eval.every=0",
        "checkpoint.every=0",
        "train.steps=40",
        *mixed,
    ]
    overrides = tiny(Path(), folder / "run", *data)
    group = Ranks(train_and_keep_batches, (overrides, folder / "4"), 4, {})
    until(lambda: steps_written(folder / "run") >= 3 or not group.running)
    group.kill(signal.SIGTERM)
    stopped = group.wait()
    assert stopped.codes == [143] * 4, stopped.err
    assert 3 <= steps_written(folder / "run") < 40
    return folder / "run", overrides, folder / "4"


def batches_kept(folder: Path) -> dict[int, list[list[int]]]:
    """Rows of each global batch, by its state, in the order of the ranks."""
    found: dict[int, list[list[int]]] = {}
    for path in sorted(folder.iterdir()):
        found.setdefault(int(path.stem.partition("-")[0]), []).extend(np.load(path).tolist())
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_mixture_stopped_on_4_ranks_goes_on_with_the_same_rows_on_fewer(
    stopped_mixture, tmp_path, ranks
):
    stopped, overrides, before = stopped_mixture
    run_dir = Path(shutil.copytree(stopped, tmp_path / "run", symlinks=True))
    (tmp_path / "kept").mkdir()
    overrides = [*overrides, f"run.dir={run_dir}"]
    Ranks(train_and_keep_batches, (overrides, tmp_path / "kept"), ranks, {}).wait().ok()
    first, rest = batches_kept(before), batches_kept(tmp_path / "kept")
    assert not first.keys() & rest.keys()

    run = config.load(overrides)
    sources = load_sets(run.data)
    with token_stream(sources, seed=run.run.seed, global_batch=12, rank=0, world_size=1) as stream:
        undisturbed = {
            consumed: batch.tolist() for batch, consumed in (next(stream) for _ in range(40))
        }
    assert first | rest == undisturbed


def test_another_weight_is_refused(stopped_mixture, tmp_path):
    stopped, overrides, _ = stopped_mixture
    run_dir = Path(shutil.copytree(stopped, tmp_path / "run", symlinks=True))
    error = train(
        [*overrides, f"run.dir={run_dir}", "data.mixture.packed.weight=2"], ranks=1
    ).error()
    assert (
        "was trained on docs 0.666667, packed 0.333333, this run asks for docs 0.5, packed 0.5, so "
        "the order" in error
    )
    assert error.startswith("error: data.mixture: ") and "run.name" in error


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["~data.mixture.packed"], ", this run asks for docs 1, so"),
        (
            ["~data.mixture.packed", "~data.mixture.docs", "data.path=DOCS"],
            ", this run asks for data.path, one set, so",
        ),
        (
            ["data.mixture.docs.weight=4", "data.mixture.packed={path: OTHER, weight: 2}"],
            "error: data.mixture.packed.path: the manifest of OTHER is not the one that ",
        ),
    ],
)
def test_what_is_another_in_a_mixture_is_named(
    stopped_mixture, corpus, packed, tmp_path, change, expected
):
    stopped, overrides, _ = stopped_mixture
    run_dir = Path(shutil.copytree(stopped, tmp_path / "run", symlinks=True))
    other = Path(shutil.copytree(packed, tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["options"]["shard_bytes"] += 1
    (other / "manifest.json").write_text(json.dumps(manifest))

    def filled(line):
        return line.replace("OTHER", str(other)).replace("DOCS", str(corpus))

    error = train([*overrides, f"run.dir={run_dir}", *map(filled, change)], ranks=1).error()
    assert filled(expected) in error and str(run_dir) in error
    assert "data.mixture.docs.path: the manifest" not in error


def test_a_run_from_before_there_were_mixtures_goes_on(corpus, finished_run):
    state_file, config_file = finished_run / LAST / "state.json", finished_run / "config.yaml"
    state, settings = json.loads(state_file.read_text()), yaml.safe_load(config_file.read_text())
    assert state.pop("sets")
    for data in (state["config"]["data"], settings["data"]):
        del data["mixture"], data["document_mask"]
    state_file.write_text(json.dumps(state))
    config_file.write_text(yaml.safe_dump(settings))
    assert dnt("eval", finished_run, "--rows", 10).ok().out.startswith("val/loss ")
    assert (
        dnt("generate", finished_run, "--prompt", "def ", "--tokens", 3).ok().out.startswith("def ")
    )
    train(tiny(corpus, finished_run, "train.steps=22"), ranks=2).ok()
    assert [line["step"] for line in metrics(finished_run)][-2:] == [21, 22]
    assert json.loads((finished_run / "checkpoints/latest/state.json").read_text())["sets"]
