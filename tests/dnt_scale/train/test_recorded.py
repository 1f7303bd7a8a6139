"""A resume keeps what was given once and is left out now, takes what is typed now, and tells
both.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from dnt_scale import config
from dnt_scale.config import ConfigError, RunConfig
from dnt_scale.train.recorded import Typed, differences, kept, shown, together, told, typed_keys
from dnt_scale.train.resume import check_fixed
from testbed.run import metrics, tiny, train

BASE = [
    "model=dnt_nano",
    "run.name=x",
    "data.path=set",
    "train.steps=30",
    "optim.schedule.warmup_steps=2",
]


@functools.cache
def run_of(*overrides: str) -> RunConfig:
    return config.load([*BASE, *overrides])


UNBUFFERED = ["optim.gradient_buffer=false", "optim.clip=previous"]


def resumed(
    first: Sequence[str],
    now: Sequence[str],
    *,
    alone: Sequence[str] | None = None,
    known: bool = True,
) -> tuple[RunConfig, tuple[str, ...]]:
    """The run that was begun with BASE and ``first``, and is started again with ``alone`` (None:
    BASE) and ``now``.
    """
    recorded = run_of(*first).model_dump(mode="json")
    again = [*(BASE if alone is None else alone), *now]
    given = [*BASE, *first] if known else []
    return kept(config.load(again), Typed(again), recorded, given, "step-00000030")


KEEPS = [  # given once, typed now, a setting and its value then
    (["optim.lr=0.05"], [], "optim.lr", 0.05),
    (["optim.lr=0.05"], ["optim.lr=0.5"], "optim.lr", 0.5),
    (["optim.lr=0.05"], ["optim.weight_decay=0.3"], "optim.lr", 0.05),
    (["optim.lr=0.05"], ["optim.weight_decay=0.3"], "optim.weight_decay", 0.3),
    (["optim=adamw"], [], "optim.eps", 1e-8),
    (["optim=adamw", "optim.betas=[0.8,0.9]"], ["optim=adamw"], "optim.betas", "[0.8, 0.9]"),
    (["optim=adamw", "optim.lr=0.01"], ["optim=adamw"], "optim.lr", 0.01),
    (["optim=msgdw", "optim.lr=0.01"], ["optim=msgdw_r"], "optim.lr", 1.0),  # another file
    (["optim=msgdw"], ["optim=msgdw_r"], "optim.groups.embedding.lr", 0.05),
    (["optim.lr=0.05"], ["optim=muon_normalized"], "optim.lr", 0.05),  # what it had by default
    (["preset=demo", "optim.lr=0.05"], ["preset=demo"], "optim.lr", 0.05),
    (["preset=demo", "optim.weight_decay=0.2"], ["preset=demo"], "optim.weight_decay", 0.2),
    (["optim.lr=0.05"], ["preset=demo"], "optim.lr", 0.05),
    (["train.global_batch=4"], ["preset=demo"], "train.global_batch", 8),  # the preset sets it
    (
        ["optim.schedule.name=wsd"],
        ["optim.schedule.final=0.2"],
        "optim.schedule.name",
        "wsd",
    ),
    (["optim.schedule.name=wsd"], ["optim.schedule={final: 0.2}"], "optim.schedule.name", "wsd"),
    (["optim.schedule.name=wsd"], ["optim.schedule={final: 0.2}"], "optim.schedule.final", 0.2),
    (["+optim.groups.g.pattern=gain", "+optim.groups.g.lr=0.1"], [], "optim.groups.g.lr", 0.1),
    (
        ["+optim.groups.g.pattern=gain"],
        ["optim.groups.gains.lr=0.3"],
        "optim.groups.g.pattern",
        "gain",
    ),
    (["~optim.groups.gains"], [], "optim.groups.gains.update", None),
    ([], ["~optim.groups.gains"], "optim.groups.gains.update", None),
    (["train.max_skipped=3"], [], "train.max_skipped", 3),
    (["train.micro_batch=2"], ["train.micro_batch=4"], "train.micro_batch", 4),
    (["model.norm_eps=1e-5"], [], "model.norm_eps", 1e-5),
    (["model.layers=3"], ["model.layers=3"], "model.layers", 3),
    (["eval.every=7"], [], "eval.every", 250),  # follows the command
    (["checkpoint.every=7"], [], "checkpoint.every", 500),
    (["run.device=cpu"], [], "run.device", "auto"),
]


@pytest.mark.parametrize(("first", "now", "key", "value"), KEEPS, ids=lambda item: str(item))
def test_what_is_left_out_stays_and_what_is_typed_counts(
    first: list[str], now: list[str], key: str, value: object
) -> None:
    made, _ = resumed(first, now)
    assert config.flat(made).get(key) == value


def test_the_budget_is_one_setting() -> None:
    bare = [word for word in BASE if not word.startswith("train.steps")]
    for now, expected in (
        ([], (30, None)),
        (["train.steps=40"], (40, None)),
        (["train.tokens=9e9"], (None, 9_000_000_000)),
    ):
        made, _ = resumed([], now, alone=bare)
        assert (made.train.steps, made.train.tokens) == expected
    recorded = config.load([*bare, "train.tokens=5e6"]).model_dump(mode="json")
    again = [*bare, "train.steps=40"]
    made, _ = kept(config.load(again), Typed(again), recorded, [*bare, "train.tokens=5e6"], "step")
    assert (made.train.steps, made.train.tokens) == (40, None)
    made, notes = kept(config.load(bare), Typed(bare), recorded, bare, "step")
    assert (made.train.steps, made.train.tokens) == (None, 5_000_000)
    kept_line = (
        "train.steps null (the command alone says 10000), train.tokens 5000000 (the command alone "
        "says null)"
    )
    assert notes == (f"kept from the checkpoint: {kept_line}",)


def test_a_line_tells_what_is_kept_and_nothing_where_nothing_is() -> None:
    assert resumed(["optim.lr=0.05"], [])[1] == (
        "kept from the checkpoint: optim.lr 0.05 (the command alone says 0.002)",
    )
    assert resumed(["optim.lr=0.05"], ["optim.lr=0.05"])[1] == ()
    assert resumed([], [])[1] == ()
    assert resumed(["+optim.groups.g.pattern=gain"], [])[1] == (
        "kept from the checkpoint: optim.groups.g.pattern gain (the command alone says not there), "
        "optim.groups.g.update plain (the command alone says not there), optim.groups.g.fixed_norm "
        "false (the command alone says not there)",
    )
    [line] = resumed(["optim=msgdw_r"], [])[1]
    assert line.startswith("kept from the checkpoint: optim.lr 1 (the command alone says 0.002), ")
    assert re.search(r", and \d\d more, which --print-config shows$", line)


def test_of_an_old_checkpoint_a_choice_counts_where_its_name_is_another() -> None:
    """It does not tell which files were chosen; a preset may have been typed as before, and have
    changed since.
    """
    assert resumed(["optim.lr=0.05"], ["optim=msgdw"], known=False)[0].optim.lr == 0.05
    assert resumed(["optim.lr=0.05"], ["optim=adamw"], known=False)[0].optim.algorithm == "adamw"
    assert resumed(["optim.lr=0.05"], ["model=dnt_124m"], known=False)[0].model.name == "dnt_124m"
    assert resumed(["optim.lr=0.05"], ["preset=demo"], known=False)[0].optim.lr == 0.05
    assert resumed(["optim.lr=0.05"], [], known=False)[0].optim.lr == 0.05


def test_a_preset_that_is_damaged_or_gone_by_now_costs_no_resume(tmp_path: Path) -> None:
    for text in ("", "defaults: [", "- 1"):
        (file := tmp_path / "mine.yaml").write_text(text)
        given = [*BASE, f"preset={file}"]
        recorded = run_of("optim.lr=0.05").model_dump(mode="json")
        assert kept(run_of(), Typed(BASE), recorded, given, "step")[0].optim.lr == 0.05


def test_a_dtype_that_was_not_chosen_yet_is_the_commands() -> None:
    """As in the checkpoint of step 0 that `dnt checkpoint convert` makes."""
    recorded = run_of("train.dtype=auto").model_dump(mode="json")
    for asked in ("auto", "fp32", "bf16"):
        assert (
            kept(run_of(f"train.dtype={asked}"), Typed(BASE), recorded, BASE, "step")[0].train.dtype
            == asked
        )


def test_a_jobs_configuration_leaves_nothing_out() -> None:
    recorded = run_of("optim.lr=0.05").model_dump(mode="json")
    assert kept(run_of(), Typed(["optim.lr=0.05"], whole=True), recorded, [], "step") == (
        run_of(),
        (),
    )


def test_what_is_typed_must_go_with_what_is_kept() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^what was typed, with what step-00000030 records for the rest: .*_buffer",
    ):
        resumed([*UNBUFFERED, "optim=msgdw"], ["engine=zero1"])


def test_words_that_hydra_cannot_read_are_no_trouble() -> None:
    typed = ["data.path=/data/a(b)/set", "run.name=1.10", "optim.lr=1", "train={"]
    assert typed_keys(typed, BASE) == {
        "optim.lr",
        "train",
    }


def test_the_last_word_is_kept() -> None:
    assert together(["a=1", "optim=adamw", "b=2"], ["+a=3", "optim=msgdw"]) == [
        "+a=3",
        "optim=msgdw",
        "b=2",
    ]


def test_differences_are_told_with_old_and_new_values() -> None:
    before, now = (
        run_of("optim=msgdw_r"),
        run_of("optim=msgdw_r", "train.steps=40", "checkpoint.keep_every=5", *UNBUFFERED),
    )
    (line, rate) = told(before, now, 10, 64)
    assert line == (
        "other than in the checkpoint: optim.gradient_buffer true -> false, optim.clip global -> "
        "previous, train.steps 30 -> 40, checkpoint.keep_every null -> 5"
    )
    assert (
        rate
        == "learning rate of the next step: 0.8187 -> 0.9001, of embedding 0.04094 -> 0.04501 (by "
        "train.steps)"
    )
    assert list(told(before, before, 10, 64)) == []
    written_out = run_of(f"run.dir={Path('runs/x').absolute()}")
    assert list(told(run_of(), written_out, 10, 64)) == []
    (moved,) = told(run_of(), run_of("run.dir=runs/y"), 10, 64)
    assert moved == "other than in the checkpoint: run.dir runs/x -> runs/y"


@pytest.mark.parametrize(
    ("change", "step", "said"),
    [
        (["optim.lr=2"], 10, "0.8187 -> 1.637 (by optim.lr)"),
        (["optim.schedule.warmup_steps=20"], 10, "0.8187 -> 0.55, of embedding 0.04094 -> 0.0275"),
        (["optim.schedule.name=constant"], 30, None),  # over: there is no next step
        (["train.steps=60"], 30, "0.1 -> 0.5624, of embedding 0.005 -> 0.02812 (by train.steps)"),
        (
            ["optim.groups.embedding.lr=0.1"],
            10,
            "of embedding 0.04094 -> 0.08187 (by optim.groups.embedding.lr)",
        ),
        (["eval.every=3"], 10, None),
        (["optim.lr=1.000001"], 10, None),  # no jump
        (["optim.momentum=0.5"], 10, None),
    ],
)
def test_a_learning_rate_that_jumps_is_told(change: list[str], step: int, said: str | None) -> None:
    lines = [
        line
        for line in told(run_of("optim=msgdw_r"), run_of("optim=msgdw_r", *change), step, 64)
        if line.startswith("learning rate")
    ]
    if said is None:
        assert lines == []
    else:
        assert len(lines) == 1 and lines[0].startswith(f"learning rate of the next step: {said}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ["model.width=128"],
            r"^model\.width: step was trained with 256, this run asks for 128; model\.width=256 "
            r"goes",
        ),
        (
            ["model.norm=layernorm"],
            r"^model\.norm: step was trained with rmsnorm, this run asks for layernorm; model",
        ),
        (
            ["run.seed=7"],
            r"^run\.seed: step was trained with 1234, this run asks for 7; run\.seed=1234 goes on "
            r"with",
        ),
        (
            ["data.document_mask=true"],
            r"^data\.document_mask: .* false, .* true; data\.document_mask=false goes on with it",
        ),
        (
            ["optim=adamw"],
            r"^optim\.algorithm: step was trained with msgdw, this run asks for adamw; change it "
            r"back",
        ),
        (
            ["model.layers=3", "model.heads=8"],
            r"^model\.layers: .* \(also model\.heads \d+ -> 8\); change it back",
        ),
    ],
)
def test_a_refused_change_names_the_very_setting(change: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_fixed(run_of(), run_of(*change), "step")
    check_fixed(run_of(), run_of("optim.lr=3"), "step")


def test_values_as_a_line_tells_them() -> None:
    assert [shown(value) for value in (None, True, False, 0.1, 1e-6, 3, "a b")] == [
        "null", "true", "false", "0.1", "1e-06", "3", "a b",
    ]  # fmt: skip
    assert differences(run_of(), run_of()) == []


def test_a_run_goes_on_with_the_learning_rate_that_it_was_given(corpus, tmp_path) -> None:
    """Row 4 of the reports: lr left out, more steps."""
    run_dir = tmp_path / "run"
    words = [
        word for word in tiny(corpus, run_dir, "eval.every=0") if not word.startswith("optim.lr")
    ]
    train([*words, "optim.lr=0.05", "train.steps=6"]).ok()
    said = train([*words, "train.steps=9", "optim.schedule.final=0.5"]).ok().err
    assert "dnt: kept from the checkpoint: optim.lr 0.05 (the command alone says 1)" in said
    assert (
        "other than in the checkpoint: optim.schedule.final 0.1 -> 0.5, train.steps 6 -> 9" in said
    )
    assert (
        "learning rate of the next step: 0.005 -> " in said
        and "(by optim.schedule.final, train.steps)" in said
    )
    assert metrics(run_dir)[-1]["lr"] == pytest.approx(0.025)
