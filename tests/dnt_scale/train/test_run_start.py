"""Whatever can happen to a run folder between two starts: a start goes on exactly, begins and
says so, or refuses.
"""

import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from dnt_scale import config
from dnt_scale.checkpoint import CheckpointError
from dnt_scale.cli.main import main
from dnt_scale.config import ConfigError, RunConfig
from dnt_scale.train.rank import asked_anew
from dnt_scale.train.recorded import Typed
from dnt_scale.train.run_start import begin, check_no_job, make_room
from testbed.run import STEPS, metrics, same_tensors, tiny, train
from tests.helpers.folders import ended, queued, submitted_run

LAST = f"step-{STEPS:08d}"


def tree(folder: Path) -> dict[str, bytes]:
    """All files and links below a folder, and what is in them."""
    return {
        str(path.relative_to(folder)): str(path.readlink()).encode()
        if path.is_symlink()
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture(scope="module")
def finished(corpus: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference run without its tensors, which only reading them would miss; killed after
    its last checkpoint.
    """
    run_dir = Path(
        shutil.copytree(reference, tmp_path_factory.mktemp("start") / "tiny", symlinks=True)
    )
    for shard in run_dir.glob("checkpoints/*/*.safetensors"):
        os.truncate(shard, 10)
    raw = yaml.safe_load((run_dir / "config.yaml").read_text())
    raw["run"]["dir"] = str(run_dir)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(raw))
    return run_dir


@functools.cache
def loaded(*overrides: str) -> RunConfig:
    return config.load(list(overrides))


@dataclass
class Case:
    """A run folder to be damaged, and the command that comes next."""

    run_dir: Path
    overrides: list[str]

    @property
    def run(self) -> RunConfig:
        return loaded(*self.overrides)

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def metrics(self, lines: int) -> None:
        path = self.run_dir / "metrics.jsonl"
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))

    def killed_early(self) -> None:
        """As it was after its third step, before the first checkpoint."""
        shutil.rmtree(self.checkpoints)
        self.checkpoints.mkdir()
        self.metrics(4)
        for file in (self.run_dir / "logs").glob("timeline-*"):
            events = [json.loads(line) for line in file.read_text().splitlines()]
            kept = [event for event in events if event["event"] in ("start", "ready")]
            file.write_text("".join(json.dumps(event) + "\n" for event in kept))

    def rename(self, name: str) -> None:
        self.run_dir = self.run_dir.rename(self.run_dir.with_name(name))
        self.overrides = [*self.overrides, f"run.dir={self.run_dir}", f"run.name={name}"]


@pytest.fixture
def case(corpus: Path, finished: Path) -> Iterator[Case]:
    place = finished.parent / "case"  # the same for all: one configuration to read
    run_dir = Path(shutil.copytree(finished, place / "tiny", symlinks=True))
    file = run_dir / "config.yaml"
    file.write_text(file.read_text().replace(str(finished), str(run_dir)))
    yield Case(run_dir, tiny(corpus, run_dir, "checkpoint.keep=9"))
    shutil.rmtree(place)


# --- the states: what is done to the folder, and what a start says then ---------------------------


def untouched(case: Case) -> None: ...


def latest_is_gone(case: Case) -> None:
    (case.checkpoints / "latest").unlink()


def the_newest_is_removed(case: Case) -> None:
    shutil.rmtree(case.checkpoints / LAST)


def a_link_to_the_newest(case: Case) -> None:
    (case.checkpoints / "step-20").symlink_to(LAST)


def a_backup_beside(case: Case) -> None:
    shutil.copytree(case.checkpoints / LAST, case.checkpoints / f"{LAST}.bak")
    shutil.copytree(case.checkpoints / LAST, case.checkpoints / f"{LAST} (copy)")
    shutil.copytree(case.checkpoints / LAST, case.checkpoints / "step-99")
    (case.checkpoints / "step-000000\uff12\uff10").mkdir()  # full-width digits
    (case.checkpoints / ".DS_Store").touch()


def a_link_of_such_a_name(case: Case) -> None:
    (case.checkpoints / "step-00000099").symlink_to("step-00000006")


def a_file_of_such_a_name(case: Case) -> None:
    (case.checkpoints / "step-00000099").write_text("a note")


def a_killed_save(case: Case) -> None:
    for name in (".partial-step-00000024", ".old-step-00000012"):
        (case.checkpoints / name).mkdir()


def an_older_one_in_part(case: Case) -> None:
    (case.checkpoints / "step-00000006" / "state.json").unlink()


def a_state_is_missing(case: Case) -> None:
    (case.checkpoints / LAST / "state.json").unlink()


def a_state_is_cut_short(case: Case) -> None:
    os.truncate(case.checkpoints / LAST / "state.json", 300)


def a_state_is_empty(case: Case) -> None:
    os.truncate(case.checkpoints / LAST / "state.json", 0)


def the_only_state_is_foreign(case: Case) -> None:
    for old in ("step-00000006", "step-00000012", "step-00000018"):
        shutil.rmtree(case.checkpoints / old)
    (case.checkpoints / LAST / "state.json").write_text('{"format": "another"}')


def an_empty_folder_of_a_step(case: Case) -> None:
    (case.checkpoints / "step-00000030").mkdir()


def a_copy_under_another_step(case: Case) -> None:
    shutil.copytree(case.checkpoints / "step-00000006", case.checkpoints / "step-00000030")


def checkpoints_removed(case: Case) -> None:
    shutil.rmtree(case.checkpoints)


def checkpoints_and_metrics_removed(case: Case) -> None:
    checkpoints_removed(case)
    (case.run_dir / "metrics.jsonl").unlink()


def checkpoints_removed_and_metrics_of_the_start(case: Case) -> None:
    checkpoints_removed(case)
    case.metrics(1)  # the validation at step 0


def checkpoints_emptied(case: Case) -> None:
    shutil.rmtree(case.checkpoints)
    case.checkpoints.mkdir()


def checkpoints_emptied_and_no_logs(case: Case) -> None:
    checkpoints_emptied(case)
    shutil.rmtree(case.run_dir / "logs")


def only_latest_is_left(case: Case) -> None:
    for path in case.checkpoints.glob("step-*"):
        shutil.rmtree(path)
    case.metrics(4)
    shutil.rmtree(case.run_dir / "logs")


def only_partial_ones_are_left(case: Case) -> None:
    checkpoints_emptied(case)
    (case.checkpoints / ".partial-step-00000006").mkdir()


def checkpoints_is_a_file(case: Case) -> None:
    shutil.rmtree(case.checkpoints)
    case.checkpoints.write_text("see the other disk")


def checkpoints_lead_nowhere(case: Case) -> None:
    shutil.rmtree(case.checkpoints)
    case.checkpoints.symlink_to("/nowhere/checkpoints")


def checkpoints_on_another_disk(case: Case) -> None:
    moved = case.checkpoints.rename(case.run_dir.parent / "disk")
    case.checkpoints.symlink_to(moved)


def another_checkpoint_dir(case: Case) -> None:
    case.overrides = [*case.overrides, f"checkpoint.dir={case.run_dir.parent}/elsewhere"]


def another_checkpoint_dir_and_no_metrics(case: Case) -> None:
    another_checkpoint_dir(case)
    (case.run_dir / "metrics.jsonl").unlink()


def checkpoint_dir_not_mounted(case: Case) -> None:
    """They were in a folder of their own, whose mount point is empty now."""
    place = case.run_dir.parent / "mount"
    place.mkdir()
    shutil.rmtree(case.checkpoints)
    case.overrides = [*case.overrides, f"checkpoint.dir={place}"]
    (case.run_dir / "config.yaml").write_text(config.to_yaml(case.run))


def no_config(case: Case) -> None:
    (case.run_dir / "config.yaml").unlink()


def an_empty_config(case: Case) -> None:
    (case.run_dir / "config.yaml").write_text("")


def somebodys_config(case: Case) -> None:
    (case.run_dir / "config.yaml").write_text("mine: precious\n")


def a_config_cut_short(case: Case) -> None:
    os.truncate(case.run_dir / "config.yaml", 200)


def a_config_of_bytes(case: Case) -> None:
    (case.run_dir / "config.yaml").write_bytes(b"\xff\xfe\x00mine")


def a_config_that_is_a_folder(case: Case) -> None:
    (case.run_dir / "config.yaml").unlink()
    (case.run_dir / "config.yaml").mkdir()


def a_config_that_leads_nowhere(case: Case) -> None:
    (case.run_dir / "config.yaml").unlink()
    (case.run_dir / "config.yaml").symlink_to("../shared.yaml")


def another_run_in_its_folder(case: Case) -> None:
    case.overrides = [*case.overrides, "run.name=other"]


def moved_to_another_name(case: Case) -> None:
    case.rename("renamed")


def copied_to_another_name(case: Case) -> None:
    shutil.copytree(case.run_dir, case.run_dir.with_name("kept"), symlinks=True)
    case.rename("copy")


def moved_with_checkpoints_elsewhere(case: Case) -> None:
    place = case.checkpoints.rename(case.run_dir.parent / "elsewhere")
    case.overrides = [*case.overrides, f"checkpoint.dir={place}"]
    (case.run_dir / "config.yaml").write_text(config.to_yaml(case.run))
    case.rename("renamed")


def moved_and_started_with_checkpoints_elsewhere(case: Case) -> None:
    """config.yaml has the new name, the checkpoints still the old one."""
    moved_with_checkpoints_elsewhere(case)
    (case.run_dir / "config.yaml").write_text(config.to_yaml(case.run))


def another_run_by_a_path_from_elsewhere(case: Case) -> None:
    """run.dir was given from another working folder, which is not this one."""
    raw = yaml.safe_load((case.run_dir / "config.yaml").read_text())
    raw["run"]["dir"] = f"{case.run_dir.parent.name}/{case.run_dir.name}"
    (case.run_dir / "config.yaml").write_text(yaml.safe_dump(raw))
    case.overrides = [*case.overrides, "run.name=other"]


def only_the_config_of_another_run(case: Case) -> None:
    for name in ("checkpoints", "logs"):
        shutil.rmtree(case.run_dir / name)
    (case.run_dir / "metrics.jsonl").unlink()
    case.rename("other")


def no_metrics(case: Case) -> None:
    (case.run_dir / "metrics.jsonl").unlink()


def metrics_cut_short(case: Case) -> None:
    case.metrics(9)
    with (case.run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "tok')


def somebodys_metrics(case: Case) -> None:
    (case.run_dir / "metrics.jsonl").write_text('{"step": 1, "accuracy": 0.9}\n')


def metrics_of_zeros(case: Case) -> None:
    (case.run_dir / "metrics.jsonl").write_bytes(b"\0" * 4096)


def metrics_that_are_a_folder(case: Case) -> None:
    no_metrics(case)
    (case.run_dir / "metrics.jsonl").mkdir()


def killed_after_the_checkpoint(case: Case) -> None:
    the_newest_is_removed(case)
    case.metrics(20)


def killed_before_the_first(case: Case) -> None:
    case.killed_early()


def killed_before_the_first_in_a_dtype_that_was_chosen(case: Case) -> None:
    """config.yaml has what the machine took for auto."""
    case.killed_early()
    case.overrides = [*case.overrides, "train.dtype=auto"]


def killed_in_the_first_save(case: Case) -> None:
    case.killed_early()
    (case.checkpoints / ".partial-step-00000006").mkdir()


def killed_before_the_first_step(case: Case) -> None:
    case.killed_early()
    case.metrics(1)


def killed_early_and_other_settings(case: Case) -> None:
    case.killed_early()
    case.overrides = [*case.overrides, "optim.lr=0.2"]


def killed_early_and_no_config(case: Case) -> None:
    case.killed_early()
    no_config(case)


def logs_that_are_a_file(case: Case) -> None:
    shutil.rmtree(case.run_dir / "logs")
    (case.run_dir / "logs").write_text("my notes")


def a_sweeps_folder(case: Case) -> None:
    (case.run_dir / "sweep.json").write_text("{}")


def a_folder_that_is_a_file(case: Case) -> None:
    shutil.rmtree(case.run_dir)
    case.run_dir.write_text("a file")


def an_empty_folder(case: Case) -> None:
    shutil.rmtree(case.run_dir)
    case.run_dir.mkdir()


def somebodys_project(case: Case) -> None:
    an_empty_folder(case)
    (case.run_dir / "README.md").write_text("# A project")


GOES_ON: dict[Callable[[Case], None], tuple[int, str]] = {  # the step, and what is told
    untouched: (20, ""),
    latest_is_gone: (20, ""),
    the_newest_is_removed: (
        18,
        "steps 19 to 20 came after the newest checkpoint and are done again",
    ),
    killed_after_the_checkpoint: (18, "step 19 came after the newest checkpoint and is done again"),
    a_link_to_the_newest: (20, ""),
    a_backup_beside: (20, ""),
    a_link_of_such_a_name: (
        20,
        "CHECKPOINTS/step-00000099 is a file or a link, no checkpoint's folder: passed over",
    ),
    a_file_of_such_a_name: (
        20,
        "CHECKPOINTS/step-00000099 is a file or a link, no checkpoint's folder: passed over",
    ),
    a_killed_save: (20, ""),
    an_empty_folder_of_a_step: (20, "CHECKPOINTS/step-00000030 is empty: passed over"),
    an_older_one_in_part: (20, ""),
    checkpoints_on_another_disk: (20, ""),
    no_config: (20, ""),
    an_empty_config: (20, ""),
    moved_to_another_name: (20, ""),
    copied_to_another_name: (20, ""),
    moved_with_checkpoints_elsewhere: (20, ""),
    moved_and_started_with_checkpoints_elsewhere: (20, ""),
    no_metrics: (
        20,
        "RUN/metrics.jsonl is missing or empty: what it had up to step 20 is not in it any more",
    ),
    metrics_cut_short: (
        20,
        "RUN/metrics.jsonl ends at step 8: what it had up to step 20 is not in it any more",
    ),
}
BEGINS: dict[Callable[[Case], None], str] = {
    killed_before_the_first: "no checkpoint yet: 3 steps of RUN/metrics.jsonl are done again",
    killed_before_the_first_in_a_dtype_that_was_chosen: "no checkpoint yet: 3 steps of "
    "RUN/metrics.jsonl are done ag",
    killed_in_the_first_save: "no checkpoint yet: 3 steps of RUN/metrics.jsonl are done again",
    killed_before_the_first_step: "",
    killed_early_and_other_settings: "no checkpoint yet, and other settings than before: the 3 "
    "steps of RUN/metrics",
    killed_early_and_no_config: "no checkpoint yet, and no config.yaml: the 3 steps of RUN/metrics",
    an_empty_folder: "",
    somebodys_project: "",
}
REFUSES: dict[Callable[[Case], None], str] = {
    a_state_is_missing: f"CHECKPOINTS/{LAST}/state.json: missing, .* remove CHECKPOINTS/{LAST} to "
    "go on from step 18",
    a_state_is_cut_short: f"CHECKPOINTS/{LAST}/state.json: damaged .* remove CHECKPOINTS/{LAST} to "
    "go on from an older",
    a_state_is_empty: f"CHECKPOINTS/{LAST}/state.json: damaged .* remove CHECKPOINTS/{LAST} to go "
    "on from an older",
    the_only_state_is_foreign: f"CHECKPOINTS/{LAST}/state.json: damaged .* no older one: restore "
    "it, or .*--fresh",
    a_copy_under_another_step: "CHECKPOINTS/step-00000030/state.json: is of step 6, .* remove it "
    "to go on",
    checkpoints_removed: "RUN/metrics.jsonl has 20 steps, but there is no checkpoint in "
    "CHECKPOINTS .*step 20 is gone",
    checkpoints_and_metrics_removed: "RUN had a checkpoint, but there is no .* in CHECKPOINTS "
    ".*step 20 is gone",
    checkpoints_removed_and_metrics_of_the_start: "RUN had a checkpoint, but there is no .*step 20 "
    "is gone",
    another_checkpoint_dir_and_no_metrics: "RUN/config.yaml they are in CHECKPOINTS, see "
    "checkpoint.dir.*--fresh",
    another_run_by_a_path_from_elsewhere: "run.name: RUN/config.yaml is of the run tiny, this one "
    "is other; run.name=",
    checkpoints_emptied: "RUN/metrics.jsonl has 20 steps, but there is no checkpoint in "
    "CHECKPOINTS .*step 20 is gone",
    checkpoints_emptied_and_no_logs: "RUN/metrics.jsonl has 20 steps, but .*there was one at step "
    "6",
    only_latest_is_left: "RUN/metrics.jsonl has 3 steps, but .*CHECKPOINTS/latest points to one "
    "that is gone",
    only_partial_ones_are_left: "RUN/metrics.jsonl has 20 steps, but there is no checkpoint in "
    "CHECKPOINTS",
    checkpoints_is_a_file: "run.dir: nothing can be written to CHECKPOINTS .Not a directory.",
    checkpoints_lead_nowhere: "run.dir: nothing can be written to CHECKPOINTS .a link to "
    "/nowhere/checkpoints, which",
    another_checkpoint_dir: "RUN/config.yaml they are in CHECKPOINTS, see checkpoint.dir.*--fresh",
    checkpoint_dir_not_mounted: "RUN/metrics.jsonl has 20 steps, but .*/mount .*not mounted",
    somebodys_config: "RUN/config.yaml is not a run's .*; move it away to go on with the "
    "checkpoints",
    a_config_cut_short: "RUN/config.yaml is not a run's .*; move it away to go on with the "
    "checkpoints",
    a_config_of_bytes: "RUN/config.yaml is not a run's .no YAML.; move it away to go on with the "
    "checkpoints",
    a_config_that_is_a_folder: "RUN/config.yaml is not a run's .a folder.; move it away to go on "
    "with the checkpoints",
    a_config_that_leads_nowhere: "RUN/config.yaml is not a run's .a link to what is not there.; "
    "move it away",
    another_run_in_its_folder: "run.name: RUN/config.yaml is of the run tiny, this one is other; "
    "run.name=tiny goes on",
    only_the_config_of_another_run: "run.name: RUN/config.yaml is of the run tiny, .* no "
    "checkpoint to go on from; --",
    somebodys_metrics: "RUN/metrics.jsonl is not a run's .its first line is none of training's.; "
    "move it away",
    metrics_of_zeros: "RUN/metrics.jsonl is not a run's .its first line is none of training's.; "
    "move it away",
    metrics_that_are_a_folder: "RUN/metrics.jsonl is not a run's .a folder.; move it away",
    logs_that_are_a_file: "RUN/logs is no folder, which a run needs there; move it away",
    a_sweeps_folder: "RUN is the folder of a sweep, by its sweep.json; take another run.name",
    a_folder_that_is_a_file: "run.dir: nothing can be written to RUN .Not a directory.; give "
    "another",
}
NOT_MENDED = {a_sweeps_folder, a_folder_that_is_a_file}  # by --fresh


def filled(text: str, case: Case) -> str:
    return (
        text.replace("RUN/", f"{case.run_dir}/")
        .replace("RUN ", f"{case.run_dir} ")
        .replace("CHECKPOINTS", str(case.checkpoints))
    )


@pytest.mark.parametrize("damage", GOES_ON, ids=lambda damage: damage.__name__)
def test_a_run_goes_on_from_its_newest_whole_checkpoint(
    case: Case, damage: Callable[[Case], None]
) -> None:
    damage(case)
    before = tree(case.run_dir)
    begun = begin(case.run, Typed(case.overrides))
    step, note = GOES_ON[damage]
    assert begun.start.state is not None and begun.start.state.step == step
    assert begun.notes == ((filled(note, case),) if note else ())
    assert not begun.start.aside
    make_room(begun)
    assert tree(case.run_dir) == before


@pytest.mark.parametrize("damage", BEGINS, ids=lambda damage: damage.__name__)
def test_a_run_begins_and_says_what_was_there(case: Case, damage: Callable[[Case], None]) -> None:
    damage(case)
    before = tree(case.run_dir)
    begun = begin(case.run, Typed(case.overrides))
    assert begun.start.state is None
    assert begun.start.dtype == ("fp32" if "done ag" in BEGINS[damage] else None)
    assert (
        begun.notes == ()
        if not BEGINS[damage]
        else begun.notes[0].startswith(filled(BEGINS[damage], case))
    )
    assert tree(case.run_dir) == before
    make_room(begun)  # nothing is lost where other lines are going to be written
    kept = tree(case.run_dir)
    if "done ag" not in BEGINS[damage]:
        aside = {
            name.partition("/")[2] if name.startswith("before-") else name: data
            for name, data in kept.items()
        }
        assert aside == before
        if "metrics.jsonl" in before and damage is not killed_before_the_first_step:
            assert "metrics.jsonl" not in kept
    else:
        assert kept == before


@pytest.mark.parametrize("damage", REFUSES, ids=lambda damage: damage.__name__)
def test_a_run_is_refused_and_fresh_moves_it_aside(
    case: Case, damage: Callable[[Case], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(case)
    before = tree(case.run_dir.parent)
    with pytest.raises(
        (ConfigError, CheckpointError), match=filled(REFUSES[damage], case)
    ) as caught:
        begin(case.run, Typed(case.overrides))
    assert "\n" not in str(caught.value)
    assert tree(case.run_dir.parent) == before
    if damage in NOT_MENDED:
        return
    begun = begin(case.run, Typed(case.overrides), fresh=True)
    assert tree(case.run_dir.parent) == before
    make_room(begun)
    assert begun.start.state is None and "moved into" in capsys.readouterr().err
    after = tree(case.run_dir.parent)
    assert sorted(after.values()) == sorted(before.values())  # all is still there, elsewhere
    again = begin(case.run, Typed(case.overrides))
    assert (again.start.state, again.start.aside, again.notes) == (None, (), ())


# what a refusal says, followed
ADVICE: dict[Callable[[Case], None], tuple[Callable[[Case], object], int]] = {
    a_state_is_missing: (lambda case: shutil.rmtree(case.checkpoints / LAST), 18),
    a_state_is_cut_short: (lambda case: shutil.rmtree(case.checkpoints / LAST), 18),
    a_copy_under_another_step: (lambda case: shutil.rmtree(case.checkpoints / "step-00000030"), 20),
    another_checkpoint_dir: (lambda case: case.overrides.pop(), 20),
    somebodys_config: (
        lambda case: (case.run_dir / "config.yaml").rename(case.run_dir / "mine.yaml"),
        20,
    ),
    a_config_that_is_a_folder: (
        lambda case: (case.run_dir / "config.yaml").rename(case.run_dir / "mine"),
        20,
    ),
    another_run_in_its_folder: (lambda case: case.overrides.append("run.name=tiny"), 20),
    somebodys_metrics: (
        lambda case: (case.run_dir / "metrics.jsonl").rename(case.run_dir / "mine.jsonl"),
        20,
    ),
    logs_that_are_a_file: (lambda case: (case.run_dir / "logs").rename(case.run_dir / "notes"), 20),
}


@pytest.mark.parametrize("damage", ADVICE, ids=lambda damage: damage.__name__)
def test_the_advice_of_a_refusal_helps(case: Case, damage: Callable[[Case], None]) -> None:
    damage(case)
    with pytest.raises((ConfigError, CheckpointError)):
        begin(case.run, Typed(case.overrides))
    follow, step = ADVICE[damage]
    follow(case)
    state = begin(case.run, Typed(case.overrides)).start.state
    assert state is not None and state.step == step


def test_fresh_moves_checkpoints_that_lie_elsewhere_and_nothing_else_there(case: Case) -> None:
    place = case.checkpoints.rename(case.run_dir.parent / "elsewhere")
    (place / "notes.txt").write_text("mine")
    case.overrides = [*case.overrides, f"checkpoint.dir={place}"]
    make_room(begin(case.run, Typed(case.overrides), fresh=True))
    (aside,) = place.glob("before-*")
    assert sorted(path.name for path in place.iterdir()) == [aside.name, "notes.txt"]
    assert {path.name for path in aside.iterdir()} >= {LAST, "latest"}
    case.overrides[-1] = f"checkpoint.dir=file://{aside}"
    with pytest.raises(
        ConfigError,
        match=r"checkpoint\.dir: --fresh moves nothing at a URL, .*another checkpoint\.dir",
    ):
        begin(case.run, Typed(case.overrides), fresh=True)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user, which takes root")
@pytest.mark.parametrize("hidden", ["", "checkpoints", "config.yaml", "metrics.jsonl"])
def test_what_cannot_be_read_is_not_begun_anew(case: Case, hidden: str) -> None:
    for place in case.run_dir.parents:
        if place.stat().st_mode & 0o1 == 0:
            place.chmod(place.stat().st_mode | 0o5)
    run = case.run
    (case.run_dir / hidden).chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(
            ConfigError, match=rf"run\.dir: {case.run_dir}.* cannot be read .Permission denied"
        ):
            begin(run, Typed(case.overrides))
    finally:
        os.seteuid(0)


def test_a_job_that_its_timeline_tells_of_keeps_others_out(tmp_path: Path) -> None:
    run_dir = submitted_run(tmp_path / "big", [queued(1.0, "7")], "7")
    with pytest.raises(
        ConfigError,
        match=rf"in use by job 7, .*`dnt cancel {run_dir}` ends that.*`dnt jobs {run_dir}`",
    ):
        check_no_job(run_dir)
    over = submitted_run(
        tmp_path / "over", [queued(1.0, "7"), ended(2.0, "7.0", "crashed", "none")], "7"
    )
    check_no_job(over)
    going = submitted_run(
        tmp_path / "going", [queued(1.0, "7"), ended(2.0, "7.0", "stopped", "requeued")], "7"
    )
    with pytest.raises(ConfigError, match="in use by job 7"):
        check_no_job(going)
    check_no_job(tmp_path / "never")


def test_print_config_shows_what_would_run(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in case.overrides if not word.startswith("optim.lr=")]
    assert main(["train", "--print-config", *words, "eval.every=7"]) == 0
    out, err = capsys.readouterr()
    shown = yaml.safe_load(out)
    assert (shown["optim"]["lr"], shown["eval"]["every"]) == (0.1, 7)
    assert err == "kept from the checkpoint: optim.lr 0.1 (the command alone says 1)\n"
    assert main(["train", "--print-config", "--fresh", *words]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["optim"]["lr"] == 1.0
    (case.run_dir / "config.yaml").write_text("mine: precious")
    assert main(["train", "--print-config", *words]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: run.dir: {case.run_dir}/config.yaml is not a run's"
    )


# --- real starts ----------------------------------------------------------------------------------


def test_strange_siblings_change_nothing_and_stay(
    corpus: Path, reference: Path, finished_run: Path
) -> None:
    """The run goes on from step 12, and writes steps whose names a file and a link have taken."""
    place = finished_run / "checkpoints"
    for step in (18, 20):
        shutil.rmtree(place / f"step-{step:08d}")
    (place / "step-00000018").write_text("a note")
    (place / "step-00000020").symlink_to("step-00000012")
    (place / "step-12").symlink_to("step-00000012")
    (place / ".old-step-00000003").write_text("somebody's")
    done = train(tiny(corpus, finished_run, "checkpoint.keep=9"), ranks=2).ok()
    assert "resuming from" in done.err and "step-00000018 is a file or a link" in done.err
    assert metrics(finished_run) == metrics(reference)
    assert same_tensors(place / LAST, reference / "checkpoints" / LAST)
    assert (place / "step-00000018.not-a-checkpoint").read_text() == "a note"
    assert (place / "step-00000020.not-a-checkpoint").readlink() == Path("step-00000012")
    assert (place / "step-12").is_symlink() and (
        place / ".old-step-00000003"
    ).read_text() == "somebody's"


def test_a_refused_start_leaves_somebodys_folder_as_it_was(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "proj"
    (folder / "logs").mkdir(parents=True)
    (folder / "profile").mkdir()
    (folder / "config.yaml").write_text("mine: precious\n")
    (folder / "metrics.jsonl").write_text('{"mine": 1}\n')
    error = train(tiny(corpus, folder)).error()
    assert error.startswith(f"error: run.dir: {folder}/config.yaml is not a run's")
    assert tree(folder) == {"config.yaml": b"mine: precious\n", "metrics.jsonl": b'{"mine": 1}\n'}
    begun = train([*tiny(corpus, folder, "train.steps=3", "eval.every=0"), "--fresh"]).ok()
    assert re.search(
        rf"dnt: config.yaml, logs, metrics.jsonl, profile of {folder} moved into {folder}/before-",
        begun.err,
    )
    (aside,) = folder.glob("before-*")
    assert (aside / "config.yaml").read_text() == "mine: precious\n" and len(metrics(folder)) == 3


def test_fresh_leaves_another_runs_checkpoints_alone(case: Case) -> None:
    place = case.checkpoints.rename(case.run_dir.parent / "elsewhere")
    shutil.rmtree(case.run_dir)
    thief = [*case.overrides, "run.name=thief", f"checkpoint.dir={place}"]
    with pytest.raises(
        ConfigError, match=r"checkpoint\.dir: .* is of the run tiny, this one is thief"
    ):
        begin(loaded(*thief), Typed(thief), fresh=True)


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_fresh_is_for_the_first_start(name: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv(name, "0")
    assert asked_anew(["--fresh", "run.name=x"]) and not asked_anew(["run.name=x"])
    monkeypatch.setenv(name, "2")
    assert not asked_anew(["--fresh", "run.name=x"])
    assert "this is restart 2" in capsys.readouterr().err
