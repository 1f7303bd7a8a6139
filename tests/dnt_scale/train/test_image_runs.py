"""Runs on images: the same on any engine and ranks, bitwise across a kill, measured and used
afterwards.
"""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dnt_scale import config
from dnt_scale.config import ConfigError, from_yaml
from dnt_scale.data.sources import load_source
from dnt_scale.distributed import process_group
from dnt_scale.engine import build as build_engine
from dnt_scale.model.task import build_task
from dnt_scale.train.spike_guard import Guard
from dnt_scale.train.stages import Stages, load_stages
from testbed.configs import composed
from testbed.images import CLASSES, drawn, small_image_set
from testbed.run import (
    IDLING,
    PLOTS,
    call,
    dnt,
    metrics,
    same_tensors,
    start,
    steps_written,
    synthetic_set,
    train,
)
from testbed.waiting import until
from tests.helpers.engines import overrides_of

STEPS = 6
ENGINES = ["fsdp", "ddp", "zero2"]
RUN = [
    "model=vdnt_tiny",
    "model.layers=2",
    "model.width=16",
    "model.heads=2",
    "model.image_size=16",
    "model.patch_size=8",
    "model.classes=3",
    "model.stochastic_depth=0.3",
    "data=images",
    "data.augment=deit",
    "data.workers=0",
    "optim=msgdw",
    "optim.lr=0.1",
    "optim.schedule.warmup_steps=1",
    "run.name=images",
    "run.device=cpu",
    f"train.steps={STEPS}",
    "train.global_batch=12",
    "train.micro_batch=3",
    "train.dtype=fp32",
    "train.ema=0.8",
    "eval.every=3",
    "eval.rows=null",
    "checkpoint.every=2",
    "checkpoint.keep=9",
    "tracking.enabled=false",
]
VAL = 23


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("images") / "set"
    small_image_set(out, train=60, val=VAL)
    return out


@pytest.fixture(scope="module")
def overrides(images: Path) -> list[str]:
    return [*RUN, f"data.path={images}"]


@pytest.fixture(scope="module")
def finished(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run on 2 ranks; to be read only."""
    run_dir = tmp_path_factory.mktemp("finished") / "images"
    said = train([*overrides, f"run.dir={run_dir}"], ranks=2, env=PLOTS).ok().err
    assert "images/s" in said and "top1" in said
    return run_dir


def test_auto_measures_its_micro_batch_with_images(overrides: list[str], tmp_path: Path) -> None:
    given = [*overrides, f"run.dir={tmp_path}", "train.micro_batch=auto", "train.steps=1"]
    said = train([*given, "eval.every=0", "optim.schedule.warmup_steps=0"]).ok().err
    assert "train.micro_batch: " in said and "images/s a rank" in said
    assert from_yaml(tmp_path / "config.yaml").train.micro_batch in (1, 2, 4, 6, 12)


def without_speed(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in metrics(run_dir)]


# ---------------------------------------------------------------- engines and ranks


def losses(overrides: list[str]) -> None:
    """The losses of each engine on this group of ranks, and what it measures at the end."""
    me = process_group.start("cpu")
    found = {}
    for name in ENGINES:
        run = composed(*overrides, "run.dir=unused", *overrides_of(name, me.world_size))
        source = load_source(run)
        engine = build_engine(
            run, lambda run=run, source=source: build_task(run.model, source.rows), me, STEPS
        )
        judge = Guard(run.health, run.optim.judged_clip_norm, run.train.max_skipped).judge
        with source.stream(
            seed=run.run.seed,
            global_batch=run.train.global_batch,
            rank=me.rank,
            world_size=me.world_size,
        ) as stream:
            curve = [engine.train_step(next(stream)[0], judge).loss for _ in range(STEPS)]
        sets = source.validation(rows=None, micro_batch=3, rank=me.rank, world_size=me.world_size)
        found[name] = [*curve, *engine.evaluate(sets[""]).values()]
        engine.close()
    if me.first:
        print(json.dumps(found))
    process_group.stop()


def test_the_curve_is_that_of_one_rank_on_every_engine_and_any_ranks(overrides) -> None:
    found = {
        ranks: json.loads(call(losses, overrides, ranks=ranks).ok().out) for ranks in (1, 2, 4)
    }
    first = found[1]["ddp"]
    assert max(first[:STEPS]) - min(first[:STEPS]) > 1e-3  # it is no line
    for ranks, curves in found.items():
        for name, curve in curves.items():
            np.testing.assert_allclose(curve, first, rtol=0, atol=1e-5, err_msg=f"{name} {ranks}")


# ---------------------------------------------------------------- a run, killed and resumed


def test_a_killed_run_goes_on_bitwise(overrides, finished, tmp_path) -> None:
    chosen = [*overrides, f"run.dir={tmp_path}/run", "data.workers=1"]
    group = start(chosen, ranks=2, env=IDLING)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    until(lambda: checkpoint.exists() and steps_written(tmp_path / "run") >= 3)
    group.kill(signal.SIGKILL)
    assert set(group.wait().codes) == {-signal.SIGKILL}
    assert steps_written(tmp_path / "run") < STEPS
    assert "resuming from" in train(chosen, ranks=2).ok().err
    assert without_speed(tmp_path / "run") == without_speed(finished)
    last = f"checkpoints/step-{STEPS:08d}"
    assert same_tensors(tmp_path / "run" / last, finished / last)


def test_validation_is_of_every_image(finished) -> None:
    measured = [line for line in metrics(finished) if "val/loss" in line]
    assert [line["step"] for line in measured] == [0, 3, 6]
    for line in measured:
        names = {name for name in line if name.startswith("val/")}
        assert names == {"val/loss", "val/top1", "val/top5"}
        assert round(line["val/top1"] * VAL, 6) % 1 == 0
        assert line["val/top5"] == 1.0  # of three classes
    assert (finished / "plots" / "loss.png").stat().st_size > 10_000
    with Image.open(finished / "plots" / "predictions.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == (8 * 120 + 8, 3 * 152 + 32)  # 23 images, 8 a row
        assert len(picture.getcolors(1 << 24)) > 1000
    state = json.loads((finished / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["images"] == 12 * STEPS and len(state["classes_sha256"]) == 64


def test_another_recipe_or_set_is_no_resume(overrides, finished, tmp_path) -> None:
    small_image_set(tmp_path / "other", train=60, val=VAL, seed=1)
    for changed, named in (("data.augment=none", "data.augment"), ("data.path", "data.path")):
        if changed == "data.path":
            changed = f"data.path={tmp_path}/other"
        error = train([*overrides, f"run.dir={finished}", "train.steps=9", changed]).error()
        assert named in error


# ---------------------------------------------------------------- afterwards


def test_a_run_is_measured_and_names_images(finished, images, tmp_path) -> None:
    told = dnt("eval", finished).ok()
    assert "step 6, the moving average of the weights (train.ema)" in told.err
    said = told.out.split()
    last = metrics(finished)[-1]
    assert said[::2] == ["val/loss", "val/top1", "val/top5"]
    assert [float(value) for value in said[1::2]] == pytest.approx(
        [last[name] for name in said[::2]], abs=1e-4
    )
    drawn(0, 0).save(tmp_path / "bar.png")
    turned = drawn(1, 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera that was held upright
    turned.save(tmp_path / "cross.jpg", exif=exif, quality=95)
    turned.rotate(-90, expand=True).save(tmp_path / "upright.jpg", quality=95)
    lines = (
        dnt(
            "classify",
            finished,
            *(tmp_path / name for name in ("bar.png", "cross.jpg", "upright.jpg")),
        )
        .ok()
        .out.splitlines()
    )
    assert len(lines) == 3 * (1 + len(CLASSES)) and lines[0].endswith("bar.png")
    guesses = [(float(line.split()[0]), line.split()[1]) for line in lines if line[0] == " "]
    for one in (guesses[:3], guesses[3:6], guesses[6:]):
        assert {name for _, name in one} == set(CLASSES)
        assert sum(share for share, _ in one) == pytest.approx(1, abs=1e-3)
        assert one == sorted(one, reverse=True)
    for (a, _), (b, _) in zip(guesses[3:6], guesses[6:], strict=True):
        assert a == pytest.approx(b, abs=0.02)
    (tmp_path / "no.jpg").write_bytes(b"no image")
    both = dnt("classify", finished, tmp_path / "no.jpg", tmp_path / "bar.png")
    assert both.code == 2 and "no.jpg: cannot be read as an image" in both.err
    assert len(both.out.splitlines()) == 1 + len(CLASSES)  # the other one all the same
    others = dnt("classify", finished, tmp_path, tmp_path / "gone.jpg")
    *_, folder, gone = others.err.splitlines()
    assert others.code == 2 and f"{tmp_path}: is a folder; name the images in it" in folder
    assert gone.endswith("gone.jpg: no such file")


def test_images_and_language_do_not_go_together(overrides, images, tmp_path) -> None:
    run = [f"run.dir={tmp_path}/run", "run.name=any", "run.device=cpu", "tracking.enabled=false"]
    text = synthetic_set(tmp_path / "text")
    error = train(["model=dnt_nano", "data=images", f"data.path={images}", *run]).error()
    assert "model.kind is dnt, which does not read the rows of data.kind=images" in error
    error = train(["model=vdnt_tiny", f"data.path={text}", *run]).error()
    assert "model.kind is vit, which does not read the rows of data.kind=tokens" in error
    error = train(["model=dnt_nano", f"data.path={images}", *run]).error()
    assert "dnt-images" in error
    error = train([*overrides, *run, f"data.path={text}"]).error()
    assert "dnt-shards" in error
    error = train([*overrides, *run, "model.patch_size=5"]).error()
    assert "image_size 16 is not divisible by patch_size 5" in error
    assert not (tmp_path / "run").exists()


def test_stages_of_images_begin_after_steps(overrides, tmp_path) -> None:
    """And not after tokens, of which images are none."""

    def stages(*more: str) -> Stages:
        return load_stages(config.load([*overrides, f"run.dir={tmp_path}/run", *more]))

    late = ["train.stages.late.after_step=4", "train.stages.late.global_batch=24"]
    assert stages(*late).units_at(STEPS) == 4 * 12 + 2 * 24
    with pytest.raises(ConfigError, match=r"late\.after_tokens is 40, but data\.kind=images has"):
        stages("train.stages.late.after_tokens=40")
