"""The hook `diagnose` on real runs: it changes nothing, resumes, says the same on any engine."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from dnt_scale.train.hooks.diagnose import Diagnose
from testbed.run import metrics, same_tensors, synthetic_set, tensors, tiny, train
from tests.helpers.engines import ENGINES, overrides_of

SHORT = ["train.steps=4", "eval.every=0", "optim.schedule.warmup_steps=1", "checkpoint.keep=9"]
HOOKED = [*SHORT, "diagnose.every=2"]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A set that takes no time to make, to be read only."""
    return synthetic_set(tmp_path_factory.mktemp("made_up") / "set")


@pytest.fixture(scope="module")
def hooked(made_up, tmp_path_factory):
    """A run of 4 steps on one rank, of which 2 and 4 are measured; a checkpoint of each step."""
    run_dir = tmp_path_factory.mktemp("hooked") / "run"
    train(tiny(made_up, run_dir, *HOOKED, "engine=fsdp", "checkpoint.every=1")).ok()
    return run_dir


def lines(run_dir):
    found = [json.loads(line) for line in (run_dir / "diagnostics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in found]


def without_diagnose(run_dir):
    return [
        {key: value for key, value in line.items() if not key.startswith("diagnose/")}
        for line in metrics(run_dir)
    ]


def test_a_line_of_each_measured_step_and_a_handful_of_metrics(hooked):
    assert [line["step"] for line in lines(hooked)] == [2, 4]
    last = lines(hooked)[-1]
    names = {name.removeprefix("model.") for name in tensors(last_checkpoint(hooked))}
    assert last["tensors"].keys() == {name for name in names if "momentum" not in name}
    matrix = last["tensors"]["blocks.1.ffn.w_1.weight"]
    assert matrix["elements"] == 64 * 256 and None not in matrix.values()
    assert last["tensors"]["norm_in.gain"]["grad_hill"] is None  # of 64 entries
    found = metrics(hooked)[-1]
    blocks = [v for k, v in last["tensors"].items() if k.startswith("blocks.") and "norm" not in k]
    worst = max(each["grad_kurtosis"] for each in blocks)
    assert found["diagnose/kurtosis_max"] == pytest.approx(worst, rel=1e-5)
    low, high = sorted(last["block_grad_rms"])
    assert found["diagnose/grad_rms_spread"] == pytest.approx(high / low, rel=1e-5)
    assert "diagnose/kurtosis_max" not in metrics(hooked)[-2]


def last_checkpoint(run_dir):
    return run_dir / "checkpoints" / "step-00000004"


def test_ratio_angle_and_groups_are_those_between_two_checkpoints(hooked):
    old = tensors(hooked / "checkpoints" / "step-00000003")
    new = tensors(last_checkpoint(hooked))
    line = lines(hooked)[-1]
    squares = {"embedding": [0.0, 0], "default": [0.0, 0]}
    for name, found in line["tensors"].items():
        a, b = (x[f"model.{name}"].double().flatten().numpy() for x in (old, new))
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert found["update_ratio"] == pytest.approx(
            np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-5
        )
        assert found["angle"] == pytest.approx(np.arccos(min(1.0, cosine)), rel=1e-3, abs=1e-7)
        group = squares["embedding" if name.startswith("tok_emb") else "default"]
        group[0] += ((b - a) ** 2).sum()
        group[1] += a.size
    expected = {label: (total / size) ** 0.5 for label, (total, size) in squares.items()}
    assert line["update_rms"] == pytest.approx(expected, rel=1e-5)


def test_the_hook_changes_no_bit_of_a_run(made_up, hooked, tmp_path):
    plain = tmp_path / "plain"
    train(tiny(made_up, plain, *SHORT, "engine=fsdp")).ok()
    assert not (plain / "diagnostics.jsonl").exists()
    assert without_diagnose(hooked) == metrics(plain)
    assert same_tensors(last_checkpoint(hooked), last_checkpoint(plain))


def test_a_resume_writes_the_lines_again(made_up, hooked, tmp_path):
    resumed = tmp_path / "run"
    shutil.copytree(hooked, resumed, symlinks=True)
    for step in (3, 4):
        shutil.rmtree(resumed / "checkpoints" / f"step-{step:08d}")
    (resumed / "checkpoints" / "latest").unlink(missing_ok=True)
    train(tiny(made_up, resumed, *HOOKED, "engine=fsdp", "checkpoint.every=1")).ok()
    assert lines(resumed) == lines(hooked) and metrics(resumed) == metrics(hooked)


@pytest.mark.parametrize("label", [label for label in ENGINES if label != "fsdp"])
def test_every_engine_shows_the_same_gradients(label, made_up, hooked, tmp_path):
    chosen = [*HOOKED, *overrides_of(label, 2), "train.micro_batch=2"]
    train(tiny(made_up, tmp_path / "run", *chosen), ranks=2).ok()
    for own, one in zip(lines(tmp_path / "run"), lines(hooked), strict=True):
        assert own["block_grad_rms"] == pytest.approx(one["block_grad_rms"], rel=1e-4)
        for name, found in own["tensors"].items():
            for measure, value in one["tensors"][name].items():
                near = value if value is None else pytest.approx(value, rel=2e-3, abs=1e-9)
                assert found[measure] == near, f"{name}: {measure}"


def test_without_a_gradient_buffer_it_says_what_it_leaves_out(made_up, tmp_path):
    chosen = [*HOOKED, "optim.gradient_buffer=false", "optim.clip=previous"]
    said = train(tiny(made_up, tmp_path / "run", *chosen)).ok().err
    assert said.count("its statistics are left out") == 1
    last = lines(tmp_path / "run")[-1]
    assert "block_grad_rms" not in last and last["update_rms"]["default"] > 0
    assert "grad_rms" not in last["tensors"]["blocks.0.attn.w_q.weight"]


def test_a_step_that_is_skipped_has_no_update(made_up, tmp_path):
    # the first step's norm is above any such limit, but skipping needs a window: so a nan
    chosen = [*HOOKED, "optim.lr=1e30", "optim.clip_norm=null", "train.max_skipped=9"]
    train(tiny(made_up, tmp_path / "run", *chosen)).ok()
    last = lines(tmp_path / "run")[-1]
    assert metrics(tmp_path / "run")[-1]["skipped"] == 1
    assert "update_rms" not in last
    assert last["tensors"]["blocks.0.attn.w_q.weight"]["grad_kurtosis"] is None


def test_an_update_far_above_the_last_ones_is_told_once():
    said = []
    run = SimpleNamespace(progress=SimpleNamespace(say=said.append))
    hook = Diagnose()
    for step, rms in enumerate([1.0, 2.0, 3.0, 2.0, 99.0, 9.9, 12.6, 2.0]):
        hook.tell_of_spikes(run, {"step": step, "update_rms": {"default": rms, "other": 1.0}})
    assert (
        len(said) == 1
    )  # 99 is too early to tell; 9.9 is below 5 times the median, 2, 12.6 above that of 2.5
    assert said[0].startswith("step 6: the update of group default has RMS 12.6")
