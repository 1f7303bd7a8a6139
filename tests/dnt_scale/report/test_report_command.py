"""`dnt report`: its numbers against ones written out, its files, what it refuses."""

import json
import math
import re
from pathlib import Path

import orjson
import pytest
import yaml

from dnt_scale import config
from dnt_scale.cli.main import main as dnt
from dnt_scale.config import ConfigError
from dnt_scale.report.report import make_report, write_report
from testbed.run import tiny

STEPS, A_STEP = 10, 512  # tokens


def made_up(folder: Path, losses: list[float], *more: str, outcome: str = "FINISHED") -> Path:
    """A run's folder as training would leave it, with these validation losses at steps 0, 5 and
    10, or as many of these.
    """
    run = config.load(
        tiny(
            folder.parent / "set", folder, f"run.name={folder.name}", f"train.steps={STEPS}", *more
        )
    )
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    with (folder / "metrics.jsonl").open("wb") as file:
        for step in range(5 * (len(losses) - 1) + 1):
            line = {"step": step, "tokens": A_STEP * step, "time": 1e9 + step}
            if step:
                line |= {"train/loss": 5 - 0.1 * step, "lr": run.optim.lr, "tokens_per_s": 1024.0}
            if step % 5 == 0:
                line["val/loss"] = losses[step // 5]
            file.write(orjson.dumps(line) + b"\n")
    end = {"event": "end", "time": 1e9, "attempt": "a", "outcome": outcome, "step": 1}
    (folder / "logs" / "timeline-here.jsonl").write_text(json.dumps(end) + "\n")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Learning rates 0.01, 0.1 and 1 with two seeds each; of 10 both fail."""
    place = tmp_path_factory.mktemp("runs")
    ends = {"0.01": (4.02, 4.04), "0.1": (3.90, 3.94), "1": (4.10, 4.14)}
    found = [
        made_up(place / f"{lr}-{seed}", [6.0, 5.0, end], f"optim.lr={lr}", f"run.seed={seed}")
        for lr, both in ends.items()
        for seed, end in enumerate(both)
    ]
    found += [
        made_up(
            place / f"10-{seed}", [6.0, 7.0], "optim.lr=10", f"run.seed={seed}", outcome="FAILED"
        )
        for seed in (0, 1)
    ]
    return [str(folder) for folder in found]


def test_the_numbers_are_those_of_a_calculation_by_hand(runs: list[str], tmp_path: Path) -> None:
    write_report(make_report(runs, None, None), tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert [group["settings"] for group in found["groups"]] == [
        {"optim.lr": lr} for lr in (0.01, 0.1, 1.0, 10.0)
    ]
    assert [group["mean"] for group in found["groups"]] == [
        pytest.approx(4.03),
        pytest.approx(3.92),
        pytest.approx(4.12),
        None,
    ]
    second = found["groups"][1]
    assert (second["min"], second["max"]) == (3.90, 3.94)
    assert second["std"] == pytest.approx(0.04 / math.sqrt(2))
    run = second["runs"][1]
    assert (run["seed"], run["loss"], run["tokens"], run["seconds"]) == (1, 3.94, 5120, 5.0)
    assert [run["state"] for run in found["groups"][3]["runs"]] == ["failed", "failed"]
    # 3.97 on the way from 3.92 at 0.1 to 4.03 at 0.01, and to 4.12 at 1, in the logarithm
    [line] = found["lines"]
    assert line["width"]["best"] == 0.1
    assert line["width"]["low"] == pytest.approx(0.1 * 10 ** -(0.05 / 0.11))
    assert line["width"]["high"] == pytest.approx(0.1 * 10 ** (0.05 / 0.20))
    assert line["width"]["factor"] == pytest.approx(10 ** (0.05 / 0.11 + 0.05 / 0.20))


def test_the_pages_hold_table_and_pictures(runs: list[str], tmp_path: Path) -> None:
    files = write_report(make_report(runs, None, "Rates & seeds"), tmp_path / "a")
    assert [file.name for file in files] == [
        "report.md",
        "report.html",
        "report.json",
        "loss.png",
        "against.png",
    ]
    markdown = files[0].read_text()
    assert (
        "| **0.1** | **2** | **3.9200** | **3.9000 to 3.9400** | **5,120** | **5.0** |" in markdown
    )
    assert "| 10 | 0 of 2, 2 failed | - | - | 2,560 | 2.5 |" in markdown
    assert (
        "best at 0.1 (3.9200); within 0.05 nats from 0.0351 to 0.178, a factor of 5.06" in markdown
    )
    html = files[1].read_text()
    assert html.count("data:image/png;base64,") == 2
    assert "<h1>Rates &amp; seeds</h1>" in html
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", html)
    again = write_report(make_report(runs, None, "Rates & seeds"), tmp_path / "b")
    assert [one.read_bytes() for one in files] == [other.read_bytes() for other in again]


def test_what_the_grid_cuts_off_is_said(runs: list[str], tmp_path: Path) -> None:
    report = make_report(runs[:4], None, None)
    [line] = report.lines
    assert line.width
    assert (line.width.low_cut, line.width.high_cut) == (False, True)
    write_report(report, tmp_path)
    assert "a factor of at least" in (tmp_path / "report.md").read_text()
    assert "the highest value tried cuts it off" in (tmp_path / "report.md").read_text()


def test_settings_that_follow_from_a_choice_are_not_told(tmp_path: Path) -> None:
    runs = [
        made_up(tmp_path / f"{name}-{lr}", [6.0, 5.0, 4.0], f"optim={name}", f"optim.lr={lr}")
        for name in ("msgdw", "adamw")
        for lr in ("0.1", "0.2")
    ]
    report = make_report([str(run) for run in runs], None, None)
    assert list(report.groups[0].values) == ["optim.algorithm", "optim.lr"]
    assert [line.name for line in report.lines] == ["algorithm adamw", "algorithm msgdw"]


def test_a_run_that_stopped_early_has_no_final_loss(tmp_path: Path) -> None:
    whole = made_up(tmp_path / "whole", [6.0, 5.0, 4.0], "optim.lr=0.1")
    early = made_up(tmp_path / "early", [6.0, 4.5], "optim.lr=0.2")
    report = make_report([str(whole), str(early)], None, None)
    assert [group.mean for group in report.groups] == [4.0, None]
    assert [run.state for group in report.groups for run in group.runs] == ["finished", "stopped"]
    assert report.table.rows[1][1:3] == ["0 of 1", "-"]
    assert report.lines[0].values == [0.1]


def test_one_run_is_drawn_as_its_own_picture(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dnt(["report", runs[0], "--out", str(tmp_path)]) == 0
    assert "report.md, report.html, report.json, loss.png" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {
        "report.md",
        "report.html",
        "report.json",
        "loss.png",
    }


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "nowhere: neither it nor runs/nowhere is a run's folder"),
        (["$RUN", "--against", "optim.lr"], "--against optim.lr: no number that differs"),
        (["$SWEEP"], "a sweep of which no run has begun"),
        (["$EMPTY"], "holds no loss yet"),
    ],
)
def test_what_is_refused(
    runs: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    sweep, empty = tmp_path / "sweep", made_up(tmp_path / "empty", [6.0])
    sweep.mkdir()
    (sweep / "sweep.json").write_text('{"name": "s", "id": "1", "runs": []}')
    places = {"$RUN": runs[0], "$SWEEP": str(sweep), "$EMPTY": str(empty)}
    out = ["--out", str(tmp_path / "out")]
    assert dnt(["report", *[places.get(word, word) for word in words], *out]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_that_count_other_things_do_not_compare(runs: list[str], tmp_path: Path) -> None:
    other = made_up(tmp_path / "other", [6.0, 5.0, 4.0])
    text = (other / "metrics.jsonl").read_text().replace('"tokens', '"pictures')
    (other / "metrics.jsonl").write_text(text)
    with pytest.raises(ConfigError, match="these runs count pictures and tokens"):
        make_report([runs[0], str(other)], None, None)
