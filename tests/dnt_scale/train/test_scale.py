"""A run with `optim.scale`: what it tells at its start and on a resume, and by what it steps."""

import json
from pathlib import Path

import pytest

from dnt_scale import config
from testbed.run import tiny, train

# 512 tokens a step where 128 were, width 64 where 16 was, 2,048 tokens in all where 128 were.
SCALE = ["optim.scale={width: 16, batch: 128, tokens: 128}", "train.steps=4", "optim.lr=0.1"]
FACTOR = 16.0**-0.32
LINE = (
    "learning rates by optim.scale: embedding 0.05 -> 0.04118, default 0.1 -> 0.1647, "
    "default.vectors 0.1 -> 0.1647"
)


def lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_rates_are_told_recorded_and_the_same_on_a_resume(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = tiny(corpus, run_dir, *SCALE, "eval.every=0")
    first = train([*overrides, "run.stop_at=2"]).ok()
    assert LINE in first.err
    text = (run_dir / "config.yaml").read_text()
    assert text.endswith(f"\n# {LINE}\n")
    run = config.from_yaml(run_dir / "config.yaml")
    assert (run.optim.lr, run.optim.scale.model_dump()) == (
        0.1,
        {"width": 16, "batch": 128, "tokens": 128},
    )
    assert lines(run_dir)[1]["lr"] == pytest.approx(
        0.1 * 4 * FACTOR, rel=1e-12
    )  # plain: by the batch

    alone = tiny(corpus, run_dir, "train.steps=4", "eval.every=0")  # nothing of the scale is typed
    second = train(alone).ok()
    assert LINE in second.err
    assert "learning rate of the next step" not in second.err
    straight = tmp_path / "straight"
    train([*overrides, f"run.dir={straight}"]).ok()
    for key in ("lr", "train/loss", "grad_norm"):
        assert [line[key] for line in lines(run_dir)] == [line[key] for line in lines(straight)]


def test_a_resume_with_another_scale_says_what_it_does(corpus: Path, tmp_path: Path) -> None:
    overrides = tiny(corpus, tmp_path / "run", *SCALE, "eval.every=0")
    train([*overrides, "run.stop_at=2"]).ok()
    changed = train([*overrides, "optim.scale={width: 16, batch: 128, tokens: 1024}"]).ok()
    assert "optim.scale.tokens 128 -> 1024" in changed.err
    assert "(by optim.scale.tokens)" in changed.err
    assert "default 0.1 -> 0.3204" in changed.err  # 0.4 by the batch, 2^-0.32 by the tokens
