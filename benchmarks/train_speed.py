"""Training speed: tokens/s, MFU and memory of each model, beside the machine's own matmul rate in
the same run.

    python -m benchmarks.train_speed --models dnt_124m gpt_124m --data data/bench --steps 30
    python -m benchmarks.train_speed --models dnt_nano gpt_nano --data data/demo --steps 10 \\
        --global-batch 16 --micro-batch 16

Each model trains for --steps steps through `python -m dnt_scale.train`, as a user's run does. The
first half warms up; the table shows the median of the rest.

    MFU = tokens/s x (6 N + 12 layers width seq_len) / peak
    of matmul = the same FLOP/s / the rate of one 4096 x 4096 matmul measured here, now

Attention counts in full, N leaves out the position table; the matmul's rate is a physical limit.
Both are in the dtype that `train.dtype=auto` takes on this machine.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from data_prep.shards import load_manifest
from dnt_scale import config
from dnt_scale.distributed import compute_dtype
from dnt_scale.model.flops import flops_per_token
from dnt_scale.record.files import git_commit
from dnt_scale.record.speed import peak_flops


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["dnt_124m", "gpt_124m"])
    parser.add_argument("--data", type=Path, required=True, help="a set made by `dnt data prepare`")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--global-batch", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON to write (default: benchmarks/results/train_speed-DEVICE.json)",
    )
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    name = torch.cuda.get_device_name(0) if cuda else f"{os.cpu_count()}-core CPU"
    dtype = compute_dtype.faster(compute_dtype.bf16_cost(device))
    matmul = matmul_rate(device, dtype)
    seq_len = load_manifest(options.data).seq_len
    peak = peak_flops(device) if dtype == "bf16" else None  # the data sheets' peaks are of bf16
    rows = [measure(model, options, dtype, matmul, seq_len, peak) for model in options.models]

    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "device": name,
        "torch": torch.__version__,
        "dtype": dtype,
        "matmul_flops": matmul,
        "seq_len": seq_len,
        "steps": options.steps,
        "global_batch": options.global_batch,
        "micro_batch": options.micro_batch,
        "models": rows,
    }
    show(result)
    out = (
        options.out
        or Path(__file__).parent / "results" / f"train_speed-{name.replace(' ', '-')}.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out}")


def matmul_rate(device: torch.device, dtype: str) -> float:
    """Return the FLOP/s of the best of 12 matmuls of 4096 x 4096 in bf16 or fp32."""
    a = torch.ones(
        4096, 4096, device=device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32
    )
    best = float("inf")
    for _ in range(12):
        started = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * 4096**3 / best


def measure(
    model: str,
    options: argparse.Namespace,
    dtype: str,
    matmul: float,
    seq_len: int,
    peak: float | None,
) -> dict[str, Any]:
    """Train once; median over the second half of the steps."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"model={model}",
            f"data.path={options.data}",
            f"run.name={model}",
            f"run.dir={folder}/{model}",
            f"train.steps={options.steps}",
            f"train.global_batch={options.global_batch}",
            f"train.micro_batch={options.micro_batch}",
            f"train.dtype={dtype}",
            "optim.schedule.warmup_steps=1",
            "eval.every=0",
            "checkpoint.every=0",
            "tracking.enabled=false",
        ]
        subprocess.run([sys.executable, "-m", "dnt_scale.train", *overrides], check=True)
        lines = [
            json.loads(line)
            for line in Path(folder, model, "metrics.jsonl").read_text().splitlines()
        ]
    warm = lines[len(lines) // 2 :]
    tokens_per_s = statistics.median(line["tokens_per_s"] for line in warm)
    flops = tokens_per_s * flops_per_token(config.load(overrides).model, seq_len)
    return {
        "model": model,
        "tokens_per_s": tokens_per_s,
        "mfu": flops / peak if peak else None,
        "of_matmul": flops / matmul,
        "peak_memory_gb": warm[-1].get("memory_gb"),
        "last_loss": warm[-1]["train/loss"],
    }


def show(result: dict[str, Any]) -> None:
    title = [
        result["device"],
        f"torch {result['torch']}",
        result["dtype"],
        result["date"],
        result["commit"][:12],
    ]
    table = Table(title=", ".join(title))
    for column in (
        "model",
        "tokens/s",
        "MFU",
        "of matmul",
        "peak memory GB",
        "tokens/s against the first",
    ):
        table.add_column(column, justify="right")
    for row in result["models"]:
        table.add_row(
            row["model"],
            f"{row['tokens_per_s']:,.0f}",
            "unknown" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['of_matmul']:.1%}",
            "-" if row["peak_memory_gb"] is None else f"{row['peak_memory_gb']:.2f}",
            f"{row['tokens_per_s'] / result['models'][0]['tokens_per_s']:.3f}",
        )
    Console(width=110).print(table)
    print(
        "MFU = tokens/s x (6 N + 12 layers width seq_len) / peak; of matmul: over this run's own "
        "matmul rate"
    )


if __name__ == "__main__":
    main()
