"""`train.micro_batch: auto`: what is measured, what is taken of it; the records and a resume have
the number.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dnt_scale import config
from dnt_scale.checkpoint import State
from dnt_scale.config import ConfigError, RunConfig
from dnt_scale.distributed import process_group
from dnt_scale.tools.verify_resume import as_taken
from dnt_scale.train import micro_batch, recorded
from dnt_scale.train.micro_batch import Room, Sample, candidates, first_rows, repeated, search
from dnt_scale.train.run_folder import Start
from dnt_scale.train.stages import Stages, load_stages
from testbed.measure import answers
from testbed.run import call, metrics, same_tensors, tiny, train

AUTO = "train.micro_batch=auto"


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (1, [1]),
        (8, [1, 2, 4, 8]),
        (12, [1, 2, 4, 6, 12]),  # 8 would leave a micro-batch of 4
        (13, [1, 2, 4, 7, 13]),
        (15, [1, 2, 4, 8, 15]),
    ],
)
def test_sizes_share_a_ranks_rows_as_equally_as_may_be(rows: int, sizes: list[int]) -> None:
    assert candidates(rows) == sizes


SIZES = [1, 2, 4, 8, 16, 32]


def searched(
    seconds: dict[int, float | tuple[float, float] | None],
    has_room: Callable[[int], bool] = lambda rows: True,
) -> tuple[int, list[int], int | None]:
    """Return the rows taken, the sizes timed, and the one refused."""

    def time_of(rows: int, before: int | None) -> tuple[float, float] | None:
        found = seconds[rows]
        return (found, math.inf) if isinstance(found, float) else found

    rows, speeds, refused = search(SIZES, time_of, has_room)
    return rows, list(speeds), refused


def test_the_smallest_of_those_about_as_fast_is_taken() -> None:
    assert searched({1: 0.1, 2: 0.15, 4: 0.29, 8: 0.58, 16: 9.0}) == (2, [1, 2, 4, 8], None)
    growing = {1: 0.1, 2: 0.11, 4: 0.13, 8: 0.2, 16: 0.3, 32: 0.4}
    assert searched({**growing}) == (32, SIZES, None)


def test_one_bad_measurement_does_not_end_the_search() -> None:
    found = {1: 0.1, 2: 0.25, 4: 0.2, 8: 0.3, 16: 0.7, 32: 1.3}
    assert searched({**found}) == (8, [1, 2, 4, 8, 16], None)


def test_the_second_measurement_of_a_size_counts_too() -> None:
    """One that another process held up would make the next size look better than it is."""
    growing: dict[int, float | tuple[float, float] | None] = {2: 0.19, 4: 0.38, 8: 0.76}
    assert searched({1: 0.3, **growing})[0] == 2
    assert searched({1: 0.3, **growing, 2: (0.19, 0.1)})[0] == 2
    assert searched({1: 0.3, **growing, 2: (0.19, 0.09)})[0] == 1


def test_a_long_pass_is_the_last_one() -> None:
    assert searched({1: 0.6}) == (1, [1], None)
    assert searched({1: 0.4, 2: 0.6}) == (2, [1, 2], None)


def test_memory_bounds_the_size() -> None:
    growing: dict[int, Any] = {1: 0.1, 2: 0.11, 4: 0.13, 8: None}
    assert searched(growing) == (4, [1, 2, 4], 8)
    assert searched({**growing, 8: 0.15}, lambda rows: rows < 8) == (4, [1, 2, 4], 8)
    assert searched({1: None}) == (1, [], 1)
    assert searched({1: 0.1}, lambda rows: False) == (1, [1], 2)


# --- the sample -----------------------------------------------------------------------------------


@dataclass
class Ticks:
    """A clock by which every look takes a second more than the one before."""

    now: float = 0.0
    step: float = 0.0

    def __call__(self) -> float:
        self.step += 1
        self.now += self.step
        return self.now


@pytest.fixture
def alone() -> Iterator[process_group.Ranks]:
    with process_group.alone() as ranks:
        yield ranks


def stages_of(data: Path, *overrides: str) -> Stages:
    return load_stages(config.load(tiny(data, Path("run"), AUTO, *overrides)))


def sampled(stages: Stages, ranks: process_group.Ranks, clock: Callable[[], float]) -> Sample:
    return Sample(stages[0], first_rows(stages[0]), ranks, clock)


def test_the_least_of_several_passes_counts(
    corpus: Path, alone: process_group.Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro_batch, "LONG_S", 100.0)
    sample = sampled(stages_of(corpus), alone, Ticks())
    # the first pass, of 2 s, is not one; then by turns: 4, 6, 8 s ...
    assert sample.time(2, None) == (4.0, math.inf)
    sample.clock = Ticks()
    assert sample.time(4, 2) == (4.0, 6.0)
    monkeypatch.setattr(micro_batch, "LONG_S", 1.0)
    sample.clock = Ticks()
    assert sample.time(4, 2) == (2.0, math.inf)


def test_memory_that_runs_out_bounds_one_rank_and_ends_several(
    corpus: Path, alone: process_group.Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = sampled(stages_of(corpus), alone, Ticks())
    asked = []

    def out(rows: int) -> float:
        asked.append(rows)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sample, "_once", out)
    assert sample.time(2, None) is None and asked == [2]
    sample.alone = False
    with pytest.raises(torch.OutOfMemoryError):
        sample.time(2, None)


@pytest.mark.parametrize("engine", ["fsdp", "ddp", "zero1", "zero3"])
def test_a_large_model_is_timed_in_part_with_the_rows_of_its_data(
    engine: str, corpus: Path, alone: process_group.Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro_batch, "SMALL", 1000)
    stages = stages_of(corpus, "model.layers=5", f"engine={engine}", "train.dtype=bf16")
    before = torch.random.get_rng_state()
    sample = sampled(stages, alone, Ticks())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(list(sample.model.task.blocks)) == 2 and sample.scale == 2.5
    assert "2 of 5 layers" in sample.part
    assert isinstance(sample.batch, torch.Tensor) and sample.batch.shape == (8, 65)
    found = sample.time(3, 1)
    assert found is not None and min(found) > 0


def test_rows_are_repeated_in_each_tensor_of_a_batch() -> None:
    batch = {"image": torch.arange(12).reshape(3, 2, 2), "label": torch.tensor([1, 2, 3])}
    found = repeated(batch, 5)
    assert isinstance(found, dict)
    assert found["label"].tolist() == [1, 2, 3, 1, 2]
    assert torch.equal(found["image"][3], batch["image"][0])


def test_a_gpu_has_room_for_what_the_peak_leaves(
    corpus: Path, alone: process_group.Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the planner's formulas, for the longest rows that the number is for; of a model that they
    do not know by what was measured.
    """
    stages = stages_of(corpus)
    sample = sampled(stages, alone, Ticks())
    room = Room(stages, alone, sample)
    assert room.has(1 << 20)  # on a CPU
    monkeypatch.setattr(micro_batch, "peak", lambda run, *_: Bytes(100 * run.train.micro_batch))
    room.free = 400.0
    assert [size for size in (1, 4, 5, 8) if room.has(size)] == [1, 4]

    room.run = room.run.model_copy(
        update={
            "model": config.load(
                ["model=vdnt_tiny", "data=images", "data.path=x", "run.name=x"]
            ).model
        }
    )
    held = micro_batch.memory_plan.memory(room.run, 1, 1).device()
    room.free, room.row_bytes = held + 300.0, 100
    assert [size for size in (1, 3, 4) if room.has(size)] == [1, 3]


@dataclass
class Bytes:
    """A peak."""

    all: int

    def total(self) -> int:
        return self.all


# --- what is recorded, and kept -------------------------------------------------------------------


def measured_nothing(*_: object) -> None:
    raise AssertionError("measured")


def run_with(*overrides: str) -> RunConfig:
    return config.load(tiny(Path("set"), Path("run"), *overrides))


def some_state(ranks: int) -> State:
    return State.model_construct(world_size=ranks)


@pytest.mark.parametrize(
    ("ranks", "said"), [(1, ""), (4, "16, as recorded with the checkpoint of 4 ranks; on 1")]
)
def test_a_resume_keeps_the_number_and_measures_nothing(
    ranks: int, said: str, alone: process_group.Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro_batch, "load_stages", measured_nothing)
    start = Start(state=some_state(ranks), micro_batch=16)
    found, line = micro_batch.resolve(run_with(AUTO), alone, start)
    assert found == run_with("train.micro_batch=16")
    assert said in line and bool(line) == bool(said)


def test_a_number_that_was_typed_stays(
    alone: process_group.Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro_batch, "load_stages", measured_nothing)
    run = run_with("train.micro_batch=3")
    assert micro_batch.resolve(run, alone, Start(micro_batch=16)) == (run, "")


def test_ranks_go_by_the_slowest_and_agree(corpus: Path) -> None:
    """Rank 0 finds a row the cheaper the more there are, rank 1 does not."""
    found = answers(call(resolved_by_unlike_ranks, str(corpus), ranks=2))
    assert found == [[1], [1]]


def resolved_by_unlike_ranks(corpus: str) -> None:
    ranks = process_group.start("cpu")

    def once(sample: Sample, rows: int) -> float:
        return 0.01 if ranks.rank == 0 else 0.02 * rows

    Sample._once = once  # type: ignore[method-assign]
    run = config.load(tiny(Path(corpus), Path("run"), AUTO))
    print(json.dumps([micro_batch.resolve(run, ranks, Start())[0].train.micro_batch]), flush=True)
    process_group.stop()


def number_of(run_dir: Path) -> int:
    return int(yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["micro_batch"])


def test_what_was_taken_is_recorded_kept_and_computed_with(corpus: Path, tmp_path: Path) -> None:
    """By two ranks; a resume on one has the same. It is the run that the number makes when it is
    typed, to the bit, and to rounding that of another number.
    """
    given = ["eval.every=0", "checkpoint.every=0"]

    def made(name: str, *overrides: str, ranks: int = 2) -> str:
        folder = tmp_path / name
        return train(tiny(corpus, folder, *given, *overrides), ranks).ok().err

    said = made("auto", AUTO, "train.steps=3")
    number = number_of(tmp_path / "auto")
    assert said.count(f"train.micro_batch: {number}, of 1 at ") == 1
    state = json.loads((tmp_path / "auto/checkpoints/step-00000003/state.json").read_text())
    assert state["config"]["train"]["micro_batch"] == number in (1, 2, 4)

    made("typed", f"train.micro_batch={number}", "train.steps=3")
    made("other", f"train.micro_batch={4 // number if number != 2 else 4}", "train.steps=3")
    losses = {
        name: [line["train/loss"] for line in metrics(tmp_path / name)[:3]]
        for name in ("auto", "typed", "other")
    }
    assert losses["auto"] == losses["typed"] == pytest.approx(losses["other"], abs=1e-5)
    newest = "checkpoints/step-00000003"
    assert same_tensors(tmp_path / "auto" / newest, tmp_path / "typed" / newest)

    again = made("auto", AUTO, "train.steps=4", ranks=1)
    assert number_of(tmp_path / "auto") == number
    assert f"train.micro_batch: {number}, as recorded with the checkpoint of 2 ranks" in again
    assert "micro_batch 4 ->" not in again and "tokens/s a rank" not in again


def test_a_number_that_was_not_chosen_yet_is_the_commands() -> None:
    """As in the checkpoint of step 0 that `dnt import` makes; what is chosen is told as kept."""
    base = tiny(Path("set"), Path("run"))
    unchosen = run_with(AUTO).model_dump(mode="json")
    chosen = run_with("train.micro_batch=2").model_dump(mode="json")
    for asked in ("auto", 3):
        command = [*base, f"train.micro_batch={asked}"]
        found = recorded.kept(
            config.load(command), recorded.Typed(base[:1]), unchosen, base[:1], "step"
        )
        assert found[0].train.micro_batch == asked
    kept, lines = recorded.kept(run_with(AUTO), recorded.Typed(base[:1]), chosen, base[:1], "step")
    assert kept.train.micro_batch == 2 and not any("micro_batch" in line for line in lines)
    told = recorded.told(run_with("train.micro_batch=2"), run_with(AUTO), 1, 64)
    assert not list(told)


def test_a_run_that_was_killed_early_goes_on_with_what_it_had_taken(tmp_path: Path) -> None:
    from dnt_scale.train.run_folder import decide, write_config

    run = config.load(tiny(Path("set"), tmp_path / "run", "train.micro_batch=2"))
    write_config(run)
    asked = run.with_micro_batch("auto")
    assert decide(asked) == Start()  # no step was done: maybe on another kind of machine
    (run.run.dir / "checkpoints").mkdir()
    (run.run.dir / "metrics.jsonl").write_text('{"step": 1, "time": 1.0}\n')
    assert decide(asked).micro_batch == 2
    other = asked.model_copy(update={"run": asked.run.model_copy(update={"seed": 7})})
    assert decide(other).micro_batch is None


def test_verify_resume_chooses_once() -> None:
    overrides = tiny(Path("set"), Path("run"), AUTO)
    taken = run_with("train.micro_batch=2").train
    assert as_taken(overrides, taken) == [*overrides, "train.micro_batch=2"]
    typed = tiny(Path("set"), Path("run"), "train.micro_batch=3")
    assert as_taken(typed, taken) == typed


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "true", "null", "[1]", "1e300", "inf"])
def test_one_line_for_what_is_no_number_of_rows(value: str) -> None:
    expected = r"^configuration: train\.micro_batch: expected a whole number of rows from 1 to "
    with pytest.raises(ConfigError, match=expected):
        run_with(f"train.micro_batch={value}")
