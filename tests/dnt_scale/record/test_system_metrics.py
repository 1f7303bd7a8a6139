import json
import socket
import threading
from pathlib import Path

import pytest
import torch

from dnt_scale import config
from dnt_scale.config import RunConfig
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.record.appended import read_new
from dnt_scale.record.system_metrics import folder, sampling
from testbed.run import tiny
from testbed.waiting import until

NODE = socket.gethostname()
CPU = torch.device("cpu")


def run_of(tmp_path: Path, *overrides: str) -> RunConfig:
    own = ["tracking.enabled=true", "tracking.system_every_s=0.01"]
    return config.load(tiny(tmp_path, tmp_path / "run", *own, *overrides))


def samples(run: RunConfig) -> list[dict]:
    file = folder(run.run.dir) / f"{NODE}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_nodes_first_rank_samples_it(tmp_path, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("what is shown here is a machine where NVML is missing")
    run, step = run_of(tmp_path), 0
    run.run.dir.mkdir()
    with sampling(run, Ranks(2, 0, 4, torch.device(device)), lambda: step):
        until(lambda: samples(run))
        step = 7
        until(lambda: samples(run)[-1]["step"] == 7)
    found = samples(run)
    assert [sample["step"] for sample in found] == sorted(sample["step"] for sample in found)
    for sample in found:
        assert list(sample) == [
            "time",
            "step",
            "cpu_percent",
            "memory_used_gb",
            "memory_percent",
            "disk_free_gb",
        ]
        assert 0 <= sample["cpu_percent"] <= 100
        assert 0 < sample["memory_percent"] < 100
        assert sample["memory_used_gb"] > 0
        assert sample["disk_free_gb"] >= 0
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("system metrics")
    ]


@pytest.mark.parametrize(
    ("local_rank", "override"),
    [(1, "run.seed=1"), (0, "tracking.system_every_s=0"), (0, "tracking.enabled=false")],
)
def test_nobody_else_does(tmp_path, local_rank, override):
    run = run_of(tmp_path, override)
    run.run.dir.mkdir()
    before = threading.active_count()
    with sampling(run, Ranks(0, local_rank, 2, CPU), lambda: 0):
        assert threading.active_count() == before


def test_a_folder_that_is_away_costs_its_samples_and_nothing_else(tmp_path, capfd):
    run = run_of(tmp_path)
    (tmp_path / "run").write_text("no folder")
    tried = threading.Semaphore(0)
    with sampling(run, Ranks(0, 0, 1, CPU), lambda: tried.release() or 0):
        assert tried.acquire(timeout=60)
        (tmp_path / "run").unlink()
        (tmp_path / "run").mkdir()
        until(lambda: samples(run))
    assert capfd.readouterr().err == ""


def test_what_is_new_is_read_once_and_whole(tmp_path):
    folder(tmp_path).mkdir(parents=True)
    one, two = (folder(tmp_path) / f"{node}.jsonl" for node in ("one", "two"))
    lines = [
        f'{{"time": {step}.5, "step": {step}, "cpu_percent": {step}, "gpu0/power_w": 300}}\n'
        for step in range(5)
    ]
    one.write_text("".join(lines[:3]) + lines[3][:20])  # the last is being written
    two.write_text("{torn\n" + lines[4])
    points, taken = read_new(tmp_path, {}, 4)
    assert [(point.name, point.step, point.time_ms) for point in points] == [
        ("system/one/cpu_percent", 0, 500),
        ("system/one/gpu0/power_w", 0, 500),
        ("system/one/cpu_percent", 1, 1500),
        ("system/one/gpu0/power_w", 1, 1500),
    ]
    more, taken = read_new(tmp_path, taken, 100)
    assert [(point.name, point.value) for point in more] == [
        ("system/one/cpu_percent", 2.0),
        ("system/one/gpu0/power_w", 300.0),
        ("system/two/cpu_percent", 4.0),
        ("system/two/gpu0/power_w", 300.0),
    ]
    assert read_new(tmp_path, taken, 100) == ([], taken)
    with one.open("a") as file:
        file.write(lines[3][20:])
    rest, taken = read_new(tmp_path, taken, 100)
    assert [point.step for point in rest] == [3, 3]
    assert taken == {"one": one.stat().st_size, "two": two.stat().st_size}
