"""`dnt plan`: what it prints, as text and as data, and its one-line errors."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dnt_scale.cli.main import main
from dnt_scale.config.hardware import hardware_names
from dnt_scale.tools.planner.machine import Rates
from testbed.run import synthetic_set

TINY = ["model=dnt_nano", "model.layers=2", "model.width=64", "model.heads=2"]


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    written = capsys.readouterr()
    assert not written.out
    assert written.err.startswith("error: ") and written.err.count("\n") == 1
    return written.err


def test_every_number_says_where_it_is_from(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "model=dnt_1.4b", "--gpu", "h100", "train.tokens=10e9")
    assert max(map(len, text.splitlines())) <= 100
    whole = " ".join(text.split())
    for expected in (
        r"machine 1 node of 8 ranks: NVIDIA H100",
        r"tokens, in rows of 1,024 tokens, model.context \(derived\)",
        r"of 78.00 GB a rank at the peak, at the loss \(derived\): weights .* \+ loss ",
        r"a rank sends \S+ GB a step \(derived\): all-gather .*% of it hidden \(assumed\)",
        r"speed [\d,]+ tokens/s, MFU \d+\.\d% \(assumed\)",
        r"of training, .* with failures; [\d,.]+ GPU-hours \(assumed\)",
        r"checkpoint 11.50 GB \(derived\), written in .* \(assumed: ",
        r"goodput \d+\.\d% \(assumed\): a failure every",
        r"optimizer msgdw: 2.16 GB a rank held.*fits on \d+ rank",
        r"optimizer adamw: 2.88 GB a rank held.*fits on \d+ rank",
    ):
        assert re.search(expected, whole), expected


def test_the_same_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["model=dnt_774m", "--gpu", "h200", "cluster.nodes=4", "train.global_batch=512"]
    found: dict[str, Any] = json.loads(shown(capsys, *given, "--json"))
    assert found["device"] == "NVIDIA H200" and found["nodes"] == 4
    numbers = found["numbers"]
    assert {number["source"] for number in numbers.values()} == {"derived", "assumed"}
    assert numbers["ranks"]["value"] == 32
    parts = [each["value"] for name, each in numbers.items() if name.startswith("memory.")]
    assert sum(parts) == numbers["peak_memory"]["value"] < numbers["memory"]["value"]
    steps = [each["value"] for name, each in numbers.items() if name.startswith("step.")]
    assert sum(steps) == pytest.approx(numbers["step"]["value"])
    assert numbers["best_tokens_per_s"]["value"] >= numbers["tokens_per_s"]["value"]
    assert [rival["optimizer"] for rival in found["optimizers"]] == ["msgdw", "adamw"]


def test_rows_of_a_prepared_set_and_more_failures(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = synthetic_set(tmp_path / "set")
    given = [*TINY, "model.vocab_size=512", f"data.path={data}", "--gpu", "h100"]
    assert f"rows of 64 tokens, those of {data}" in " ".join(shown(capsys, *given).split())
    often = json.loads(shown(capsys, *given, "--json", "--gpu-hours-a-failure", "10"))
    seldom = json.loads(shown(capsys, *given, "--json", "--gpu-hours-a-failure", "1e6"))
    shares = [found["numbers"]["goodput"]["value"] for found in (often, seldom)]
    assert 0 < shares[0] < shares[1] <= 1


def test_auto_is_the_fastest_micro_batch_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["model=dnt_774m", "engine=fsdp", "train.global_batch=512", "--gpu", "h100"]
    said = " ".join(shown(capsys, *given, "train.micro_batch=auto").split())
    found = re.search(r"engine=fsdp train.micro_batch=(\d+) \(assumed of auto\)", said)
    assert found is not None
    speeds = {}
    for size in (1, 2, 4, 8, 16, 32, 64):
        try:
            data = json.loads(shown(capsys, *given, f"train.micro_batch={size}", "--json"))
        except AssertionError:  # it does not fit
            continue
        speeds[size] = data["numbers"]["tokens_per_s"]["value"]
    assert speeds[int(found[1])] == max(speeds.values())


def test_this_machine_is_measured_once_and_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = [*TINY, "model.context=32", "run.device=cpu", "train.global_batch=4"]
    assert "--measure" in refused(capsys, *given)
    numbers = json.loads(shown(capsys, *given, "--measure", "--json"))["numbers"]
    assert numbers["tokens_per_s"]["source"] == "measured" and "mfu" not in numbers
    [kept] = json.loads((tmp_path / "dnt-scale" / "rates.json").read_text()).values()
    rates = Rates(**kept)
    assert rates.measured and min(rates.matmul, rates.copy, rates.pointwise) > 0
    again = json.loads(shown(capsys, *given, "--json"))["numbers"]
    assert again == numbers
    (tmp_path / "dnt-scale" / "rates.json").write_text("[")
    assert "rates.json: cannot be read" in refused(capsys, *given)


def test_a_gpu_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ours = tmp_path / "ours.yaml"
    fields = ("memory_gb", "bf16_tflops", "fp32_tflops", "memory_gb_s", "attention_tflops")
    text = "".join(f"{field}: 100\n" for field in (*fields, "link_gb_s", "network_gb_s"))
    ours.write_text(f"name: Ours\n{text}")
    assert "8 ranks: Ours" in shown(capsys, *TINY, "--gpu", str(ours))
    ours.write_text(f"name: Ours\n{text.replace('memory_gb: 100', 'memory_gb: 0')}")
    assert "memory_gb" in refused(capsys, *TINY, "--gpu", str(ours))
    ours.write_text("[")
    assert "not readable as YAML" in refused(capsys, *TINY, "--gpu", str(ours))
    assert "cannot be read" in refused(capsys, *TINY, "--gpu", str(tmp_path / "none.yaml"))


def test_one_line_for_what_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "model=dnt_124m", "--gpu", "h10")
    assert "did you mean h100?" in said and all(name in said for name in hardware_names())
    assert "model.kind is vit" in refused(capsys, "model=vit_tiny", "data=images", "--gpu", "h100")
    assert "no such field; did you mean model.width?" in refused(
        capsys, "model.widht=4", "--gpu", "h100"
    )
    said = refused(capsys, "model=dnt_llama_70b", "--gpu", "a100", "engine=ddp")
    assert re.search(r"it needs at least \d+ ranks, \d+ nodes of 8", said)
    assert "cluster.gpus_per_node is 8; say which GPU" in refused(capsys, *TINY, "cluster=gpu")
    assert "cluster.gpus_per_node is 0" in refused(
        capsys, "model=dnt_124m", "--gpu", "h100", "cluster=sandbox"
    )


def test_fp8_has_no_speed_to_plan_with(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "model=dnt_1.4b", "--gpu", "h100", "train.dtype=fp8")
    assert "train.dtype is fp8" in line and "plan with train.dtype=bf16" in line
