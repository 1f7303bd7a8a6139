"""`train.dtype: auto`: what a machine is found to be good at is what a run computes in, and what
its records say.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from dnt_scale import config
from dnt_scale.config import RunConfig
from dnt_scale.distributed import compute_dtype, process_group
from testbed.run import call, tiny, train

ROOT = Path(__file__).parents[2]


def run_with(dtype: str, *overrides: str) -> RunConfig:
    return config.load(tiny(Path("set"), Path("run"), f"train.dtype={dtype}", *overrides))


@pytest.fixture
def me(monkeypatch: pytest.MonkeyPatch) -> process_group.Ranks:
    # a world of one needs no collective
    monkeypatch.setattr(compute_dtype, "highest", lambda *values: values)
    monkeypatch.setattr(compute_dtype, "together", lambda ranks, action: action())
    return process_group.Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def machine(monkeypatch: pytest.MonkeyPatch, cost: float) -> None:
    monkeypatch.setattr(compute_dtype, "bf16_cost", lambda device: cost)


GOOD, POOR = 0.25, 36.0


def test_auto_is_the_default() -> None:
    raw = yaml.safe_load((config.config_dir() / "train.yaml").read_text())
    assert raw["train"]["dtype"] == "auto"
    assert config.load(["run.name=x", "data.path=set"]).train.dtype == "auto"


@pytest.mark.parametrize(
    ("cost", "command", "recorded", "chosen", "said"),
    [
        (GOOD, "auto", None, "bf16", ""),
        (POOR, "auto", None, "fp32", ""),
        (0.95, "auto", None, "fp32", ""),
        (
            POOR,
            "bf16",
            None,
            "bf16",
            "bf16 was asked for, but a bf16 matmul takes 36 times as long",
        ),
        (GOOD, "bf16", None, "bf16", ""),
        (GOOD, "fp32", None, "fp32", ""),
        (
            POOR,
            "auto",
            "bf16",
            "bf16",
            "bf16 was recorded with the checkpoint, but a bf16 matmul takes 36 times",
        ),
        (
            POOR,
            "bf16",
            "bf16",
            "bf16",
            "bf16 was recorded with the checkpoint, but a bf16 matmul takes 36 times",
        ),
        (
            GOOD,
            "auto",
            "fp32",
            "fp32",
            "fp32, as recorded with the checkpoint; on this machine bf16 is faster",
        ),
        (GOOD, "fp32", "fp32", "fp32", ""),
        (GOOD, "auto", "bf16", "bf16", ""),
        (POOR, "auto", "fp32", "fp32", ""),
        (GOOD, "fp32", "bf16", "fp32", ""),
        (POOR, "bf16", "fp32", "bf16", "bf16 was asked for"),
    ],
)
def test_what_is_chosen_and_said(
    monkeypatch: pytest.MonkeyPatch,
    me: process_group.Ranks,
    cost: float,
    command: str,
    recorded: str | None,
    chosen: str,
    said: str,
) -> None:
    machine(monkeypatch, cost)
    # it may be kept already
    for asked in {command, recorded or command} if command == "auto" else {command}:
        resolved, line = compute_dtype.resolve(run_with(asked), me, command, recorded)
        assert resolved.train.dtype == chosen
        assert (said in line) if said else not line
        assert resolved == run_with(chosen)


def test_ranks_on_unlike_machines_choose_what_the_poorest_is_good_at(
    monkeypatch: pytest.MonkeyPatch, me: process_group.Ranks
) -> None:
    machine(monkeypatch, GOOD)
    monkeypatch.setattr(compute_dtype, "highest", lambda *values: (round(1000 * POOR),))
    assert compute_dtype.resolve(run_with("auto"), me, "auto", None)[0].train.dtype == "fp32"


def test_an_engine_that_does_not_go_with_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, me: process_group.Ranks
) -> None:
    """As it is where bf16 was asked for."""
    machine(monkeypatch, GOOD)
    odd = ["engine=zero1", "engine.deepspeed={zero_optimization: {reduce_bucket_size: 5}}"]
    with pytest.raises(config.ConfigError, match="zero1 in bf16"):
        compute_dtype.resolve(run_with("auto", *odd), me, "auto", None)


@pytest.mark.parametrize(
    ("recorded", "cost", "dtype", "said"),
    [
        ("bf16", GOOD, torch.bfloat16, ""),
        (
            "bf16",
            POOR,
            torch.float32,
            "computing in fp32: the run was trained in bf16, but a bf16 matmul takes 36",
        ),
        ("fp8", GOOD, torch.bfloat16, ""),
        ("fp8", POOR, torch.float32, "computing in fp32: the run was trained in fp8, but"),
        ("fp32", GOOD, torch.float32, ""),
        ("auto", POOR, torch.float32, ""),
    ],
)
def test_inference_computes_in_what_this_machine_is_good_at(
    monkeypatch: pytest.MonkeyPatch, recorded: str, cost: float, dtype: torch.dtype, said: str
) -> None:
    machine(monkeypatch, cost)
    found, line = compute_dtype.for_inference(recorded, torch.device("cpu"))
    assert found == dtype
    assert line.startswith(said) if said else not line


# --- fp8 ------------------------------------------------------------------------------------------

# its name, its compute capability, and whether it can
GPUS = [
    ("NVIDIA A100-SXM4-80GB", (8, 0), False),
    ("NVIDIA L4", (8, 9), True),
    ("NVIDIA H200", (9, 0), True),
    ("NVIDIA B200", (10, 0), True),
]


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What stands for torchao, which takes seconds to import, where it is there at all."""
    package, layers = ModuleType("torchao"), ModuleType("torchao.float8")
    package.float8 = layers  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.float8", layers)
    return layers


def on_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]
) -> process_group.Ranks:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return process_group.Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cuda", 0))


@pytest.mark.parametrize(("name", "capability", "can"), GPUS)
@pytest.mark.parametrize(
    ("command", "recorded"), [("fp8", None), ("fp8", "bf16"), ("auto", "fp8"), ("fp8", "fp8")]
)
def test_fp8_is_taken_where_gpus_have_it(
    monkeypatch: pytest.MonkeyPatch,
    me: process_group.Ranks,
    torchao: ModuleType,
    name: str,
    capability: tuple[int, int],
    can: bool,
    command: str,
    recorded: str | None,
) -> None:
    me = on_gpu(monkeypatch, name, capability)
    if can:
        found = compute_dtype.resolve(run_with(command), me, command, recorded)
        assert found == (run_with("fp8"), "")
        assert compute_dtype.float8_layers() is torchao
    else:
        with pytest.raises(config.ConfigError, match=r"8\.9 or higher.*A100.*8\.0; use .*=bf16"):
            compute_dtype.resolve(run_with(command), me, command, recorded)
    # the rest of a step is in bf16
    assert compute_dtype.for_preflight(run_with("fp8"), me) == torch.bfloat16


def test_what_was_begun_in_fp8_goes_on_in_bf16_where_that_is_typed(
    monkeypatch: pytest.MonkeyPatch, me: process_group.Ranks
) -> None:
    machine(monkeypatch, GOOD)
    assert compute_dtype.resolve(run_with("bf16"), me, "bf16", "fp8") == (run_with("bf16"), "")


def test_without_torchao_it_is_said_what_to_install(
    monkeypatch: pytest.MonkeyPatch, me: process_group.Ranks
) -> None:
    me = on_gpu(monkeypatch, "NVIDIA H200", (9, 0))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(config.ConfigError, match=r"pip install 'dnt-scale\[fp8\]', or use .*=bf16"):
        compute_dtype.resolve(run_with("fp8"), me, "fp8", None)


def test_a_run_in_fp8_is_refused_on_a_cpu(tmp_path: Path) -> None:
    overrides = tiny(Path("no-data"), tmp_path / "run", "train.dtype=fp8")
    line = train(overrides).error()
    assert "train.dtype is fp8" in line and "this is a CPU; use train.dtype=bf16" in line
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("engine", ["zero0", "zero3"])
def test_deepspeed_has_no_fp8(engine: str) -> None:
    with pytest.raises(config.ConfigError, match=f"fp8, which engine={engine} does not have"):
        run_with("fp8", f"engine={engine}")


# --- estimates ------------------------------------------------------------------------------------


def test_estimates_before_the_start_take_what_is_likely() -> None:
    assert (
        compute_dtype.expected(run_with("auto", "run.device=auto"), gpus=True).train.dtype == "bf16"
    )
    assert (
        compute_dtype.expected(run_with("auto", "run.device=auto"), gpus=False).train.dtype
        == "fp32"
    )
    assert (
        compute_dtype.expected(run_with("auto", "run.device=cpu"), gpus=True).train.dtype == "fp32"
    )
    assert compute_dtype.expected(run_with("bf16"), gpus=False).train.dtype == "bf16"


def test_the_measurement_agrees_with_what_onednn_says_of_the_processor() -> None:
    """Where oneDNN may use no more than AVX2 there is no bf16 arithmetic, whatever the processor
    has.
    """
    code = (
        "import torch; from dnt_scale.distributed import compute_dtype; before = "
        "torch.get_num_threads();print(torch.ops.mkldnn._is_mkldnn_bf16_supported(), "
        "compute_dtype.bf16_cost(torch.device('cpu')));assert torch.get_num_threads() == before"
    )
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True
    )
    native, cost = done.stdout.split()
    if native == "False":
        assert compute_dtype.faster(float(cost)) == "fp32", cost


def test_what_was_taken_is_recorded_and_kept(corpus: Path, tmp_path: Path) -> None:
    """In config.yaml and in the checkpoint; a resume on a machine that is good at the other one
    computes as before.
    """
    run_dir = tmp_path / "run"
    overrides = tiny(corpus, run_dir, "train.dtype=auto", "eval.every=0")
    train([*overrides, "train.steps=3"], env={"ONEDNN_MAX_CPU_ISA": "AVX2"}).ok()
    recorded = yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["dtype"]
    state = json.loads((run_dir / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert recorded in ("bf16", "fp32") and state["config"]["train"]["dtype"] == recorded

    other = "fp32" if recorded == "bf16" else "bf16"
    cost = {"bf16": GOOD, "fp32": POOR}[other]
    finished = call(resumed_where_bf16_costs, [*overrides, "train.steps=4"], cost).ok()
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["dtype"] == recorded
    assert f"train.dtype: {recorded}" in finished.err and f"{other} is faster" in finished.err


def resumed_where_bf16_costs(overrides: list[str], cost: float) -> None:
    from dnt_scale.train.rank import main

    compute_dtype.bf16_cost = lambda device: cost
    sys.exit(main(overrides))
