"""Another task than language, whole in this file: an image classifier with a buffer, and a source
of made-up images.
"""

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnt_scale import config
from dnt_scale.config import MODELS, SOURCES, ConfigError, DataSection, ModelSection, Unit
from dnt_scale.costs.memory_plan import memory
from dnt_scale.data.sources import DataPart, Source, load_source
from dnt_scale.data.stream import Stream
from dnt_scale.distributed import process_group
from dnt_scale.distributed.errors import AgreedError
from dnt_scale.engine import build as build_engine
from dnt_scale.model.flops import count_parameters
from dnt_scale.model.init import drawn
from dnt_scale.model.task import Task, build_task
from dnt_scale.train.rank import main
from testbed.configs import composed
from testbed.run import (
    PLOTS,
    call,
    complete_checkpoints,
    metrics,
    same_tensors,
    synthetic_set,
)
from tests.helpers.engines import ENGINES, overrides_of


@dataclass(frozen=True)
class Images:
    """Rows {"image": fp32 (rows, pixels), "label": int64 (rows,)}, a label of -1 for what does not
    count.
    """

    pixels: int
    classes: int


@MODELS.register
class ToyModel(ModelSection):
    reads: ClassVar[type] = Images

    kind: Literal["toy"] = "toy"
    pixels: int
    classes: int
    width: int = 16
    persistent: bool = False

    def build(self, rows: Images | None = None) -> "ToyClassifier":
        return ToyClassifier(self)

    def check(self, rows: Images) -> None:
        if rows != Images(self.pixels, self.classes):
            raise ConfigError(
                f"model.pixels is {self.pixels}, but the images have {rows.pixels}; set it to that"
            )


def brightness(pixels: int) -> Tensor:
    """What the buffer has to hold: nothing that bf16 could hold as exactly."""
    return torch.linspace(0.501, 1.503, pixels)


class ToyClassifier(nn.Module, Task):
    def __init__(self, section: ToyModel) -> None:
        super().__init__()
        width = section.width
        self.embed = nn.Linear(section.pixels, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(3)
        )
        self.head = nn.Linear(width, section.classes)
        self.register_buffer(
            "brightness", torch.empty(section.pixels), persistent=section.persistent
        )

    def init_buffers(self) -> None:
        self.brightness.copy_(brightness(len(self.brightness)))

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.embed((batch["image"] * self.brightness).to(self.embed.weight.dtype))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x).float()

    def loss_sum(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.logits(batch), batch["label"], ignore_index=-1, reduction="sum")

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["label"] >= 0).sum()

    def eval_sums(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        hits = (self.logits(batch).argmax(1) == batch["label"]).sum()
        return {"loss": self.loss_sum(batch), "top1": hits}

    def initial(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        return (
            torch.zeros(shape)
            if name.endswith("bias")
            else drawn(name, shape, shape[-1] ** -0.5, seed)
        )

    def flops_per_row(self, units_a_row: int) -> float:
        return 6.0 * sum(parameter.numel() for parameter in self.parameters())


@SOURCES.register
class ToyData(DataSection):
    kind: Literal["toy_images"] = "toy_images"
    salt: str

    def open(self) -> "ToyImages":
        return ToyImages(self.salt)


class ToyImages(Source):
    unit = Unit("images", 1)
    rows = Images(pixels=24, classes=4)

    def __init__(self, salt: str) -> None:
        self.salt = salt
        self.shades = drawn("shades", torch.Size((4, 24)), 1.0, 0)

    def parts(self) -> list[DataPart]:
        return [
            DataPart(
                "", "data.salt", "made-up images", hashlib.sha256(self.salt.encode()).hexdigest()
            )
        ]

    def made(self, seed: int, first: int, count: int) -> dict[str, Tensor]:
        """The rows at positions from ``first`` on: each a function of (salt, seed, position)."""
        labels = torch.arange(first, first + count) * 7 % 4
        noise = [
            drawn(f"{self.salt}/{place}", torch.Size((24,)), 0.7, seed)
            for place in range(first, first + count)
        ]
        return {"image": self.shades[labels] + torch.stack(noise), "label": labels}

    def stream(
        self, *, seed: int, global_batch: int, rank: int, world_size: int, consumed_rows: int = 0
    ) -> Stream:
        return Stream(
            lambda first, count: self.made(seed, first, count),
            global_batch=global_batch,
            rank=rank,
            world_size=world_size,
            consumed_rows=consumed_rows,
        )

    def validation(
        self, *, rows: int | None, micro_batch: int, rank: int, world_size: int
    ) -> dict[str, Any]:
        return {"": self.held_out(rows or 50, micro_batch, rank, world_size)}

    def held_out(self, rows: int, micro_batch: int, rank: int, world_size: int) -> Any:
        for start in range(0, rows, micro_batch * world_size):
            batch = self.made(99, start + rank * micro_batch, micro_batch)
            beyond = (
                torch.arange(start + rank * micro_batch, start + (rank + 1) * micro_batch) >= rows
            )
            yield {**batch, "label": batch["label"].masked_fill(beyond, -1)}


# --- the proof ------------------------------------------------------------------------------------

STEPS = 8


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> list[str]:
    """Overrides of a run of this model on this source, by files of one's own."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.yaml").write_text("kind: toy\nname: toy\npixels: 24\nclasses: 4\n")
    (folder / "images.yaml").write_text("kind: toy_images\nsalt: a\n")
    chosen = {
        "run": {"name": "toy", "device": "cpu"},
        "train": {"steps": STEPS, "global_batch": 12, "micro_batch": 3, "dtype": "fp32"},
        "eval": {"every": 4, "rows": 50},
        "checkpoint": {"every": 4, "keep": 9},
        "optim": {"lr": 0.3},
    }
    values = [
        f"{section}.{key}={value}"
        for section, keys in chosen.items()
        for key, value in keys.items()
    ]
    warmup = [
        "optim=msgdw",
        "optim.schedule.warmup_steps=1",
        "optim.schedule.name=constant",
        "tracking.enabled=false",
    ]
    return [f"model={folder}/toy.yaml", f"data={folder}/images.yaml", *warmup, *values]


def train_toy(overrides: list[str]) -> None:
    """`dnt_scale.train`, looking at the buffer whenever the loss is computed."""
    loss_sum = ToyClassifier.loss_sum

    def watched(self: ToyClassifier, batch: dict[str, Tensor]) -> Tensor:
        assert torch.equal(self.brightness, brightness(24)), self.brightness
        return loss_sum(self, batch)

    ToyClassifier.loss_sum = watched
    sys.exit(main(overrides))


@pytest.mark.parametrize("name", ["fsdp", "ddp", "zero2"])
def test_a_task_that_is_no_language_trains_resumes_and_checkpoints(toy, name, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    overrides = [*toy, f"engine={name}"]
    call(train_toy, [*overrides, f"run.dir={whole}"], ranks=2, env=PLOTS).ok()
    call(train_toy, [*overrides, f"run.dir={parts}", f"train.steps={STEPS // 2}"], ranks=2).ok()
    said = call(train_toy, [*overrides, f"run.dir={parts}"], ranks=2).ok().err
    assert "resuming from" in said and "images/s" in said and f"{12 * STEPS} images" in said

    def without_speed(run_dir: Path) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in line.items() if not k.endswith("_per_s")} for line in metrics(run_dir)
        ]

    lines = without_speed(whole)
    assert without_speed(parts) == lines  # bitwise
    assert (
        complete_checkpoints(parts)
        == complete_checkpoints(whole)
        == ["step-00000004", "step-00000008"]
    )
    assert same_tensors(*(folder / "checkpoints" / "step-00000008" for folder in (whole, parts)))
    assert lines[-1]["images"] == 12 * STEPS and "tokens" not in lines[-1]
    measured = [line for line in lines if "val/loss" in line]
    assert {name for name in measured[0] if name.startswith("val/")} == {"val/loss", "val/top1"}
    assert measured[-1]["val/loss"] < measured[0]["val/loss"]
    # of 50 images, each once
    assert all(round(line["val/top1"] * 50, 6) % 1 == 0 for line in measured)
    assert (whole / "plots" / "loss.png").stat().st_size > 10_000
    state = json.loads((whole / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert state["images"] == 12 * STEPS and "tokenizer_sha256" not in state

    error = call(
        train_toy, [*overrides, f"run.dir={parts}", "data.salt=b", "train.steps=9"], ranks=2
    ).error()
    assert "data.salt: the manifest of made-up images is not the one that" in error


def print_evaluated(run_dir: Path) -> None:
    from dnt_scale.tools.inference import checkpoint_of, evaluate

    with process_group.alone() as me:
        print(json.dumps(evaluate(checkpoint_of(run_dir), None, None, me)))


def print_generated(run_dir: Path) -> None:
    from dnt_scale.tools.generate import Asked, load_writer
    from dnt_scale.tools.inference import checkpoint_of

    with process_group.alone() as me, pytest.raises(ConfigError) as caught:
        load_writer(checkpoint_of(run_dir), me, Asked(), None)
    print(caught.value)


def test_a_run_is_measured_afterwards_and_makes_no_text(toy, tmp_path):
    call(train_toy, [*toy, f"run.dir={tmp_path}/run", "engine=fsdp"]).ok()
    found = json.loads(call(print_evaluated, tmp_path / "run").ok().out)
    last = metrics(tmp_path / "run")[-1]
    assert found == pytest.approx(
        {key: value for key, value in last.items() if key.startswith("val/")}, abs=1e-6
    )
    assert (
        "model.kind is toy, which is no language model"
        in call(print_generated, tmp_path / "run").ok().out
    )


def steps_of_every_engine(overrides: list[str]) -> None:
    """Each engine in bf16: the buffer at the start, after a step and after new weights; losses
    before and after.
    """
    me = process_group.start("cpu")
    found = {}
    for label in ENGINES:
        run = composed(*overrides, *overrides_of(label, me.world_size))
        source = load_source(run)
        engine = build_engine(
            run, lambda run=run, source=source: build_task(run.model, source.rows), me, STEPS
        )
        task = engine.task if hasattr(engine, "task") else engine.model.task
        with source.stream(
            seed=1, global_batch=12, rank=me.rank, world_size=me.world_size
        ) as stream:
            batch, _ = next(stream)
        before = engine.evaluate([batch])
        for _ in range(2):
            assert task.brightness.dtype == torch.float32 and torch.equal(
                task.brightness, brightness(24)
            ), label
            loss = engine.train_step(batch, lambda loss, norm: 1.0).loss
            engine.refresh(engine.scalars())
        found[label] = [before["loss"], loss]
        engine.close()
    if me.first:
        print(json.dumps(found))
    process_group.stop()


def test_every_engine_has_the_buffer_in_its_own_dtype(toy):
    options = [*toy, "run.dir=unused", "train.dtype=bf16", "train.micro_batch=6"]
    found = json.loads(call(steps_of_every_engine, options, ranks=2).ok().out)
    first = found["ddp"][0]
    assert found.keys() == ENGINES.keys()
    for label, (before, after) in found.items():
        assert before == pytest.approx(first, abs=0.02), label
        assert after < before, label


def build_refused(overrides: list[str]) -> None:
    me = process_group.start("cpu")
    run = config.load(overrides)
    with pytest.raises(AgreedError) as caught:
        build_engine(run, lambda: build_task(run.model), me, STEPS)
    print(caught.value)
    process_group.stop()


@pytest.mark.parametrize("name", ["fsdp", "zero2"])
def test_a_persistent_buffer_is_refused(toy, name):
    said = (
        call(build_refused, [*toy, "run.dir=unused", "model.persistent=true", f"engine={name}"])
        .ok()
        .out
    )
    assert said.startswith(
        "model.kind is toy, whose buffer brightness is persistent, but checkpoints hold weights"
    )


def test_what_does_not_go_together_is_named(toy, tmp_path):
    tokens = synthetic_set(tmp_path / "set")
    model, data = toy[:2]
    others = [value for value in toy[2:] if not value.startswith(("data", "model"))]
    with pytest.raises(
        ConfigError, match=r"model\.kind is toy, which does not read the rows of data\.kind=tokens"
    ):
        load_source(config.load([model, f"data.path={tokens}", *others]))
    with pytest.raises(
        ConfigError,
        match=r"model\.kind is dnt, which does not read the rows of data\.kind=toy_images",
    ):
        load_source(config.load(["model=dnt_nano", data, *others]))
    with pytest.raises(ConfigError, match=r"model\.pixels is 23, but the images have 24"):
        load_source(config.load([*toy, "model.pixels=23"]))
    with pytest.raises(
        ConfigError, match=r"train\.tokens is 100, but data\.kind=toy_images has images; set train"
    ):
        load_source(
            config.load(
                [value for value in toy if "train.steps" not in value] + ["train.tokens=100"]
            )
        )


def test_memory_is_planned_for_any_task(toy):
    run = config.load([*toy, "engine=ddp"])
    assert memory(run, 2).weights == 4 * count_parameters(run.model)


def test_an_unknown_kind_is_named_with_those_there_are(toy):
    with pytest.raises(
        ConfigError,
        match=re.escape("model.kind: no such kind; did you mean toy? There are: dnt, toy, vit"),
    ):
        config.load([*toy, "model.kind=tooy"])
