"""Stages of a run: which rows they take, and that a resume inside or across them is exact."""

import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dnt_scale import config
from dnt_scale.cli.main import main as dnt
from dnt_scale.config import ConfigError, RunConfig
from dnt_scale.distributed import process_group
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.optim.schedule import Schedule
from dnt_scale.train import loop
from dnt_scale.train.hooks import Hook
from dnt_scale.train.recorded import Typed
from dnt_scale.train.run_start import begin, begun_on_all
from dnt_scale.train.setup import Step, Training
from dnt_scale.train.stages import Batches, Stages, check_batches, load_stages
from testbed.run import call, metrics, same_tensors, synthetic_set, tiny, train
from tests.helpers.once import Once
from tests.helpers.start import start

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
LAST = "checkpoints/step-00000010"
STOPPED = (2, 4, 5, 7, 8)  # in each stage and where one ends
SETS = ("web", "good", "short")


@pytest.fixture(scope="session")
def sets(once: Once) -> Path:
    """Three sets with one tokenizer, the last with rows of half the length; and one of another
    tokenizer.
    """

    def make(folder: Path) -> None:
        for seed, name in enumerate(SETS):
            synthetic_set(folder / name, seq_len=32 if name == "short" else 64, seed=seed)
        synthetic_set(folder / "foreign", vocab_size=500)

    return once("stage_sets", make)


def three_stages(sets: Path, run_dir: Path, *more: str) -> list[str]:
    """Four steps on one set, three on a mixture with it, three on shorter rows to the end."""
    return tiny(
        sets / "web",
        run_dir,
        "train.steps=10",
        "train.global_batch=12",
        "train.micro_batch=3",
        "optim.schedule.name=constant",
        "train.stages.both.after_step=4",
        "train.stages.both.global_batch=24",
        "train.stages.both.lr_factor=0.5",
        f"train.stages.both.data.mixture.w={{path: {sets}/web, weight: 1}}",
        f"train.stages.both.data.mixture.g={{path: {sets}/good, weight: 2}}",
        "train.stages.end.after_step=7",
        f"train.stages.end.data.path={sets}/short",
        "train.stages.end.micro_batch=6",
        "train.stages.end.decay_to=0.1",
        *more,
    )


def loaded(*overrides: str) -> Stages:
    return load_stages(config.load(list(overrides)))


# --- which rows, which learning rate --------------------------------------------------------------


def rows(stages: Stages, step: int, of: int) -> list[str]:
    """A hash of each global batch from a step on, read by so many ranks."""
    ranks = [replace(ALONE, rank=rank, world_size=of) for rank in range(of)]
    consumed = stages.at(step).span.rows_at(step)
    found = [hashlib.sha256() for _ in range(step, stages.total_steps)]
    for rank in ranks:
        with Batches(stages, step, consumed, rank) as batches:
            for number, digest in enumerate(found, step + 1):
                batch, done = next(batches)
                assert isinstance(batch, torch.Tensor)
                assert done == stages.at(number - 1).span.rows_at(number)
                digest.update(batch.numpy().tobytes())
    return [digest.hexdigest() for digest in found]


def test_a_step_takes_the_same_rows_on_any_ranks_from_any_step_on(sets, tmp_path):
    stages = loaded(*three_stages(sets, tmp_path))
    whole = rows(stages, 0, 1)
    assert len(set(whole)) == 10
    for step, of in zip(STOPPED, (2, 3, 4, 1, 2), strict=True):
        assert rows(stages, step, of) == whole[step:]


def positions(stages: Stages) -> list[tuple[str, str, int]]:
    """The set, member and row of every row of a run, step by step."""
    found = []
    for stage in stages:
        places = stage.rows_behind(stage.span.rows, stage.span.rows_at(stage.span.end))["rows"]
        found += [
            (Path(place["set"]).name, place["member"], row)
            for place in places
            for row in place["rows"]
        ]
    return found


def test_a_set_that_goes_on_shows_no_row_again(sets, tmp_path):
    """Of `web` stage 1 takes 48 rows and the mixture 24 of its 72: none of them is one of those."""
    stages = loaded(*three_stages(sets, tmp_path))
    web = [place for place in positions(stages) if place[0] == "web"]
    assert len(web) == len(set(web)) == 48 + 24
    alone = loaded(*tiny(sets / "web", tmp_path, "train.steps=6", "train.global_batch=12"))
    assert sorted(positions(alone)) == sorted(web)  # the next ones of its own order


def test_a_stage_with_the_same_data_goes_on_in_one_order(sets, tmp_path):
    """With a third of the batch from step 2 on, 6 steps take the rows of 4."""
    given = tiny(sets / "web", tmp_path, "train.global_batch=12", "optim.schedule.warmup_steps=0")
    plain = loaded(*given, "train.steps=4")
    smaller = ["train.stages.small.after_step=2", "train.stages.small.global_batch=4"]
    stages = loaded(*given, "train.steps=8", *smaller)
    with Batches(plain, 0, 0, ALONE) as one, Batches(stages, 0, 0, ALONE) as other:
        whole = torch.cat([next(one)[0] for _ in range(4)])
        parts = torch.cat([next(other)[0] for _ in range(8)])
    assert torch.equal(whole, parts)


def test_where_a_set_lies_changes_no_row(sets, tmp_path):
    """A stage whose mixture is that of the one before goes on in its order, after 8 rows of parts
    of 1 and 2.
    """
    moved = shutil.copytree(sets / "good", tmp_path / "moved")

    def stages(place: Path) -> Stages:
        mixture = "{{w: {{path: {}, weight: 1}}, g: {{path: {}, weight: 2}}}}"
        return loaded(
            *tiny(sets / "web", tmp_path, "train.global_batch=4", "train.steps=6"),
            "optim.schedule.warmup_steps=0",
            "data.path=null",
            f"data.mixture={mixture.format(sets / 'web', sets / 'good')}",
            "train.stages.more.after_step=2",
            "train.stages.more.lr_factor=0.5",
            f"train.stages.more.data.mixture={mixture.format(sets / 'web', place)}",
        )

    assert rows(stages(moved), 0, 1) == rows(stages(sets / "good"), 0, 1)


def test_tokens_count_each_stages_rows(sets, tmp_path):
    stages = loaded(*three_stages(sets, tmp_path))
    assert [stages.units_at(step) for step in (0, 4, 7, 10)] == [
        0,
        4 * 12 * 64,
        (4 * 12 + 3 * 24) * 64,
        (4 * 12 + 3 * 24) * 64 + 3 * 24 * 32,
    ]
    whole = stages.work_at(10)
    assert stages.work_at(4) < whole / 2 < stages.work_at(7) < whole


def test_the_learning_rate_has_its_stages_factor(sets, tmp_path):
    run = config.load(three_stages(sets, tmp_path, "optim.schedule.warmup_steps=2"))
    spans = run.spans(64, {"end": 32})
    schedule = Schedule(run.optim.schedule, 10, spans)
    found = [schedule.factor(step) for step in range(10)]
    assert found == pytest.approx([0.5, 1, 1, 1, 0.5, 0.5, 0.5, 0.5 - 0.4 / 3, 0.5 - 0.8 / 3, 0.1])


def test_stages_may_begin_after_tokens(sets, tmp_path):
    """Batches of 768 tokens to 3,000 of them, then of 1,536 to the budget."""
    run = config.load(
        tiny(
            sets / "web",
            tmp_path,
            "train.steps=null",
            "train.tokens=1e4",
            "train.global_batch=12",
            "train.stages.more.after_tokens=3e3",
            "train.stages.more.global_batch=24",
        )
    )
    first, second = run.spans(64)
    assert (first.begin, first.end, second.begin, second.end) == (0, 4, 4, 9)
    assert second.units_at(8) < 10_000 <= second.units_at(9)
    assert run.total_steps(64) == 9


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["end.after_step=4"],
            "train: stages.end.after_step is 4, not above 4 of stages.both, which stands before "
            "it; write stages in the order they begin in",
        ),
        (
            ["end.after_step=10"],
            "train.stages.end begins after step 10, but train.steps is 10, so the run ends after "
            "step 10; let it begin earlier, or train for longer",
        ),
        (
            ["both.lr_facter=1"],
            "train.stages.both.lr_facter: no such field; did you mean train.stages.*.lr_factor? "
            "(found 1)",
        ),
        (["both.after_tokens=10"], "set one of after_step and after_tokens"),
        (["end.after_step=null", "end.after_tokens=1e5"], "give all stages of a run the same"),
        (
            ["end.data.path=/SETS/foreign"],
            "train.stages.end.data: /SETS/foreign was made with another tokenizer (sha256 ",
        ),
        (
            ["both.data.mixture.g.path=/SETS/short"],
            "train.stages.both: data.mixture.w.path: /SETS/web has seq_len 64, but /SETS/short (g) "
            "has 32; prepare both with the same --tokenizer and --seq-len",
        ),
        (["end.data.document_mask=true"], "train.stages.end.data: its rows have document_eos 0"),
    ],
)
def test_what_cannot_be_is_one_line(sets, tmp_path, given, said):
    stages = [f"train.stages.{line}".replace("/SETS", str(sets)) for line in given]
    with pytest.raises(ConfigError) as caught:
        loaded(*three_stages(sets, tmp_path, *stages))
    assert said.replace("/SETS", str(sets)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_stages_batch_is_for_all_ranks(sets, tmp_path):
    run = config.load(three_stages(sets, tmp_path, "train.stages.both.global_batch=26"))
    check_batches(run, 2)
    with pytest.raises(ConfigError, match=r"^train\.stages\.both: train\.global_batch is 26, not"):
        check_batches(run, 4)


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def whole(sets: Path, once: Once) -> Path:
    """The folder of the run of three stages on 4 ranks, with a checkpoint after each step in
    STOPPED and others; to be read only.
    """

    def make(folder: Path) -> None:
        every = ["checkpoint.every=1", "checkpoint.keep=20", "checkpoint.background=false"]
        train(three_stages(sets, folder / "tiny", *every), ranks=4).ok()

    return once("staged_run", make) / "tiny"


def stopped(whole: Path, step: int, folder: Path) -> Path:
    """The run as it was when it had stopped after a step."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("step-*", "latest"))
    name = f"checkpoints/step-{step:08d}"
    shutil.copytree(whole / name, folder / name)
    return folder


class Seen(Hook):
    """Writes down, after each step, its number, the micro-batch and how full the guard's window
    is.
    """

    def after_step(self, run: Training, step: Step) -> None:
        if run.ranks.first:
            with (run.config.run.dir / "seen").open("a") as file:
                file.write(f"{step.number} {run.engine.micro_batch} {len(run.guard.losses)}\n")


def go_on(overrides: list[list[str]]) -> None:
    """Train several runs, one after the other, in the processes of one group of ranks."""
    ranks = process_group.start("cpu")
    loop.HOOKS = (*loop.HOOKS, Seen)  # type: ignore[attr-defined]
    for given in overrides:
        run: RunConfig = config.load(given)
        begun = begun_on_all(run, ranks, Typed(given), fresh=False)
        assert loop.train(begun, ranks) == 0
    process_group.stop()


def resumed(
    sets: Path, whole: Path, folder: Path, of: int, steps: tuple[int, ...] = STOPPED
) -> list[Path]:
    """The runs that go on, from each of these steps, on so many ranks."""
    folders = [stopped(whole, step, folder / str(step)) for step in steps]
    call(go_on, [three_stages(sets, each, "checkpoint.every=0") for each in folders], ranks=of).ok()
    return folders


def test_a_run_has_each_stages_speed_and_tokens(whole):
    lines = [line for line in metrics(whole) if line["step"]]
    tokens = [4 * 12 * 64, (4 * 12 + 3 * 24) * 64]
    assert [lines[step - 1]["tokens"] for step in (4, 7)] == tokens
    assert lines[-1]["tokens"] == tokens[-1] + 3 * 24 * 32
    assert [line["lr"] for line in lines[3:5]] == [0.1, 0.05]


@pytest.mark.slow
def test_resuming_on_as_many_ranks_is_bitwise_the_uninterrupted_run(sets, whole, tmp_path):
    begins = [0] * 4 + [4] * 3 + [7] * 3  # of each step's stage, where the guard begins anew
    seen = [
        f"{step} {6 if begin == 7 else 3} {step - begin}" for step, begin in enumerate(begins, 1)
    ]
    for stop, folder in zip(STOPPED, resumed(sets, whole, tmp_path, 4), strict=True):
        assert (folder / "seen").read_text().splitlines() == seen[stop:]
        assert metrics(folder) == metrics(whole)
        assert same_tensors(folder / LAST, whole / LAST)


@pytest.mark.slow
@pytest.mark.parametrize(("of", "steps"), [(1, (2, 7)), (2, (4, 8)), (3, (5, 7))])
def test_resuming_on_other_ranks_has_the_same_losses(sets, whole, tmp_path, of, steps):
    wanted = metrics(whole)
    for folder in resumed(sets, whole, tmp_path, of, steps):
        found = metrics(folder)
        assert [line["tokens"] for line in found] == [line["tokens"] for line in wanted]
        for name in ("train/loss", "val/loss"):
            losses = [[line[name] for line in lines if name in line] for lines in (found, wanted)]
            assert losses[0] == pytest.approx(losses[1], abs=1e-5, rel=0)


# --- changed on a resume --------------------------------------------------------------------------


def continued(overrides: list[str]) -> Stages:
    """The stages of a run that goes on."""
    return load_stages(begin(config.load(overrides), Typed(overrides)).run)


def test_a_stage_that_has_not_begun_may_change_and_is_told(sets, whole, tmp_path):
    run_dir = stopped(whole, 5, tmp_path / "run")
    given = three_stages(sets, run_dir, "train.stages.end.lr_factor=0.2", "train.steps=12")
    (line,) = [line for line in start(given) if "other than" in line]
    assert "train.stages.end.lr_factor null -> 0.2" in line and "train.steps 10 -> 12" in line
    later = [line for line in given if not line.startswith("train.stages.end")]
    assert continued(later)[-1].span.begin == 7  # kept
    more = [*later, "train.stages.new.after_step=6", "train.stages.new.lr_factor=2"]
    assert [stage.span.name for stage in continued(more)] == ["", "both", "new", "end"]
    other = [*given, f"train.stages.end.data.path={sets}/good"]
    assert continued(other)[2].run.data.path == sets / "good"


@pytest.mark.parametrize(
    ("step", "given", "said"),
    [
        (
            5,
            ["both.lr_factor=0.7"],
            r"train\.stages\.both\.lr_factor: .* was trained with 0\.5, this run asks for 0\.7, "
            "but the stage has begun, after step 4",
        ),
        (5, ["both.global_batch=36"], r"train\.stages\.both\.global_batch: .* trained with 24"),
        (5, ["both.data.mixture.g.weight=3"], r"both\.data\.mixture\.g\.weight: .* with 2, this"),
        (5, ["both.after_step=5"], r"train\.stages\.both\.after_step: .* trained with 4"),
        (8, ["end.data.path=/SETS/good"], r"train\.stages\.end\.data: the manifest of .*/good is"),
        (
            8,
            ["end.after_step=6"],
            r"train\.stages\.end\.after_step: .*/step-00000008 was trained with 7",
        ),
    ],
)
def test_what_has_begun_may_not_change(sets, whole, tmp_path, step, given, said):
    run_dir = stopped(whole, step, tmp_path / "run")
    stages = [f"train.stages.{line}".replace("/SETS", str(sets)) for line in given]
    with pytest.raises(ConfigError, match=said):
        start(three_stages(sets, run_dir, *stages))


def test_what_has_begun_may_go_on_elsewhere_and_in_other_micro_batches(sets, whole, tmp_path):
    run_dir = stopped(whole, 8, tmp_path / "run")
    moved = shutil.copytree(sets / "short", tmp_path / "moved")
    changed = [f"train.stages.end.data.path={moved}", "train.stages.end.micro_batch=4"]
    assert start(three_stages(sets, run_dir, *changed))


def test_a_stage_may_not_begin_in_the_past(sets, whole, tmp_path):
    """Not one that was not trained; it may begin where the checkpoint stands."""
    run_dir = stopped(whole, 2, tmp_path / "run")
    past = [line for line in three_stages(sets, run_dir) if not line.startswith("train.stages")]
    new = ["train.stages.new.after_step=1", "train.stages.new.lr_factor=2"]
    with pytest.raises(ConfigError) as caught:
        start([*new, *past])
    assert str(caught.value) == (
        f"train.stages.new: begins after step 1, but {run_dir}/checkpoints/step-00000002 has "
        "trained to step 2 without it; let it begin there or later, or take another run.name"
    )
    new[0] = "train.stages.new.after_step=2"
    assert "learning rate of the next step: 0.1 -> 0.2" in " ".join(start([*new, *past]))


def test_the_plan_of_a_run_is_a_line_a_stage(sets, whole, tmp_path, monkeypatch, capsys):
    """Of a run that has begun, as it would go on; without a terminal nothing is folded."""
    monkeypatch.chdir(sets)
    run_dir = stopped(whole, 5, tmp_path / "run")
    assert dnt(["train", "--print-plan", *three_stages(sets, run_dir, "train.steps=12")]) == 0
    said = capsys.readouterr()
    stage = r"stage\s+steps\s+tokens\s+data\s+rows x tokens\s+learning rate"
    lines = (
        stage,
        r"1\s+1 - 4\s+3,072\s+web\s+12 x 64\s+0\.05 to 0\.1",
        r"2 both\s+5 - 7\s+4,608\s+0\.333 w web\s+24 x 64\s+0\.05",
        r"0\.667 g good",
        r"3 end\s+8 - 12\s+3,840\s+short\s+24 x 32\s+0\.042 to 0\.01",
        r"step 5 is done, by .*step-00000005",
    )
    for line, wanted in zip(said.out.splitlines(), lines, strict=True):
        assert re.fullmatch(wanted, line.strip()), line
    assert "train.steps 10 -> 12" in said.err


def test_all_stages_that_have_not_begun_may_be_left_out(sets, whole, tmp_path):
    given = three_stages(sets, stopped(whole, 4, tmp_path / "run"))
    none = [*(line for line in given if not line.startswith("train.stages")), "train.stages={}"]
    (line,) = [line for line in start(none) if "other than" in line]
    assert "train.stages.both.after_step 4 -> not there" in line and "null -> not" not in line


def test_a_run_without_stages_has_no_more_in_its_configuration(sets, tmp_path):
    """So its checkpoints and its MLflow params are those of old."""
    run = config.load(tiny(sets / "web", tmp_path))
    assert not [key for key in config.flat(run) if "stages" in key]
    settings = run.model_dump(mode="json")
    del settings["train"]["stages"]
    assert config.validate(settings) == run
