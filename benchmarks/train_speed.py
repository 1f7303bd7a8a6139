"""Training speed: tokens/s, MFU, memory and where a step's time goes, of runs of ours and of a
GPT-2 loop written by hand (benchmarks/peer_gpt.py), all in one go.

    python -m benchmarks.train_speed --data data/demo --run model=gpt_nano optim=adamw \\
        --run model=dnt_nano --run model=dnt_nano engine.compile=true --peer eager compiled

Each --run is what `dnt train` takes, on one rank; --common is for all of them. A peer has the
shape, the batch, the dtype and the threads of the first run. All train by turns of --turn-steps
steps in processes of their own: the first turn warms up and --turns are measured, so that other
load on the machine falls on all alike; in one more, the host waits for the device at the ends of
each part of a step. Ratios are medians over turns of the time against the first peer (else the
first run) in the same turn, by the clock and in processor time.

    MFU = tokens/s x (6 N + 12 layers width seq_len) / peak
    of matmul = the same FLOP/s / the rate of a large matmul measured here, now

Attention counts in full, N leaves out the position table; the matmul's rate is a physical limit.
"""

import argparse
import dataclasses
import datetime
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.peer_gpt import Shape
from benchmarks.turns import PHASES, Contender, Measured
from data_prep.shards import load_manifest
from dnt_scale import config
from dnt_scale.config import ModelConfig, RunConfig
from dnt_scale.distributed import compute_dtype
from dnt_scale.model.flops import flops_per_token
from dnt_scale.record.files import git_commit
from dnt_scale.record.speed import peak_flops

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> None:
    options = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends contenders too
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    name = torch.cuda.get_device_name(0) if cuda else f"{os.cpu_count()}-core CPU"
    dtype = options.dtype or compute_dtype.faster(compute_dtype.bf16_cost(device))
    seq_len = load_manifest(options.data).seq_len
    # a turn to warm up, those that are measured, one that is split
    steps = options.turn_steps * (options.turns + 2)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ending:
        words = [overrides(options, dtype, steps, folder, n) for n in range(len(options.run))]
        runs = [config.load(each) for each in words]
        labels = {
            " ".join(own): ["-m", "benchmarks.timed_run", str(options.turn_steps), *each]
            for own, each in zip(options.run, words, strict=True)
        }
        for peer in options.peer:
            shape = Path(folder, f"{peer}.json")
            shape.write_text(json.dumps(dataclasses.asdict(shaped(runs[0], seq_len, peer))))
            labels[f"peer, {peer}"] = [
                "-m",
                "benchmarks.peer_gpt",
                str(options.turn_steps),
                str(shape),
            ]
        contenders = []
        for label, arguments in labels.items():
            contenders.append(Contender(label, arguments))
            ending.enter_context(closing(contenders[-1]))
        warm, *turns, split = [
            {each.name: each.turn(order) for each in contenders}
            for order in ("go", *["go"] * options.turns, "split")
        ]
    del warm
    tokens = options.global_batch * seq_len
    models = [*(run.model for run in runs), *[runs[0].model] * len(options.peer)]
    flops = {
        label: tokens * flops_per_token(model, seq_len)
        for label, model in zip(labels, models, strict=True)
        if isinstance(model, ModelConfig)
    }
    against = next((label for label in labels if label.startswith("peer")), next(iter(labels)))
    peak = peak_flops(device) if dtype == "bf16" else None  # the data sheets' peaks are of bf16
    matmul = matmul_rate(device, dtype, options.matmul_side)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "device": name,
        "torch": torch.__version__,
        "dtype": dtype,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load": round(os.getloadavg()[0], 1),
        "matmul_flops": matmul,
        "seq_len": seq_len,
        "global_batch": options.global_batch,
        "micro_batch": options.micro_batch,
        "turns": options.turns,
        "turn_steps": options.turn_steps,
        "against": against,
        "rows": [
            row(label, turns, split[label], against, tokens, flops[label], matmul, peak)
            for label in labels
        ],
    }
    show(result)
    out = options.out or Path(__file__).parent / "results" / f"train_speed-{named(name)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="a set made by `dnt data prepare`")
    add("--run", nargs="+", action="append", required=True, metavar="KEY=VALUE")
    add("--common", nargs="+", default=[], metavar="KEY=VALUE")
    add("--peer", nargs="*", default=[], choices=["eager", "compiled"])
    add("--dtype", choices=["bf16", "fp32"], help="default: what train.dtype=auto takes here")
    add("--turns", type=int, default=5)
    add("--turn-steps", type=int, default=4)
    add("--global-batch", type=int, default=16)
    add("--micro-batch", type=int, default=16)
    add("--matmul-side", type=int, default=4096)
    add("--out", type=Path, help="JSON (default: benchmarks/results/train_speed-DEVICE.json)")
    options = parser.parse_args()
    if len({" ".join(run) for run in options.run}) < len(options.run):
        parser.error("--run: two are the same, expected each once; leave one out")
    return options


def overrides(
    options: argparse.Namespace, dtype: str, steps: int, folder: str, number: int
) -> list[str]:
    """Return what the run of this number is started with; its own words come last."""
    return [
        f"data.path={options.data}",
        f"run.name=run-{number}",
        f"run.dir={folder}/run-{number}",
        f"train.steps={steps}",
        f"train.global_batch={options.global_batch}",
        f"train.micro_batch={options.micro_batch}",
        f"train.dtype={dtype}",
        "optim.schedule.warmup_steps=1",
        "eval.every=0",
        "checkpoint.every=0",
        "tracking.enabled=false",
        "health.hang_s=3600",  # the others' turns
        *options.common,
        *options.run[number],
    ]


def shaped(run: RunConfig, seq_len: int, peer: str) -> Shape:
    """Return the shape of a peer of ``run``."""
    assert isinstance(run.model, ModelConfig)
    return Shape(
        layers=run.model.layers,
        width=run.model.width,
        heads=run.model.heads,
        vocab_size=run.model.vocab_rows,
        seq_len=seq_len,
        global_batch=run.train.global_batch,
        micro_batch=run.train.rows_a_forward,
        dtype=run.train.dtype,
        compiled=peer == "compiled",
        steps=run.train.steps or 0,
    )


def row(
    label: str,
    turns: Sequence[Mapping[str, Measured]],
    split: Measured,
    against: str,
    tokens: int,
    flops: float,
    matmul: float,
    peak: float | None,
) -> dict[str, Any]:
    """Return what the turns say of one contender."""
    tokens_per_s = tokens / statistics.median(turn[label]["wall_s"] for turn in turns)
    rate = tokens_per_s / tokens * flops
    ratios = {
        clock: statistics.median(turn[against][clock] / turn[label][clock] for turn in turns)
        for clock in ("wall_s", "cpu_s")
    }
    return {
        "run": label,
        "tokens_per_s": tokens_per_s,
        "mfu": rate / peak if peak else None,
        "of_matmul": rate / matmul,
        "memory_gb": turns[-1][label]["memory_gb"],
        "speed_by_clock": ratios["wall_s"],
        "speed_by_processor_time": ratios["cpu_s"],
        "split_s": split["split_s"],
        "turns": [turn[label] for turn in turns],
    }


def named(device: str) -> str:
    """Return a device's name as part of a file's."""
    return device.replace(" ", "-")


def show(result: dict[str, Any]) -> None:
    about = (
        f"{result['device']}, torch {result['torch']}, {result['dtype']}, threads "
        f"{result['threads']}, load {result['load']}, {result['date']}, {result['commit'][:12]}"
    )
    table, parts = Table(title=about), Table(title="a step with waits between its parts, by part")
    memory = "GPU" if torch.cuda.is_available() else "resident"
    columns = ("tokens/s", "MFU", "of matmul", f"peak {memory} GB", "speed", "in processor time")
    table.add_column("run")
    for column in columns:
        table.add_column(column, justify="right")
    parts.add_column("run")
    for column in (*PHASES, "ms a step"):
        parts.add_column(column, justify="right")
    for each in result["rows"]:
        table.add_row(
            each["run"],
            f"{each['tokens_per_s']:,.0f}",
            "unknown" if each["mfu"] is None else f"{each['mfu']:.1%}",
            f"{each['of_matmul']:.1%}",
            f"{each['memory_gb']:.2f}",
            f"{each['speed_by_clock']:.3f}",
            f"{each['speed_by_processor_time']:.3f}",
        )
        split = each["split_s"]
        whole = sum(split.values())
        shares = [f"{split[p] / whole:.1%}" if p in split else "-" for p in PHASES]
        parts.add_row(each["run"], *shares, f"{1000 * whole:,.1f}")
    console = Console(width=150)
    console.print(table)
    console.print(parts)
    print(
        f"speed: against {result['against']}\nMFU = tokens/s x (6 N + 12 layers width seq_len) / "
        "peak; of matmul: over this run's own matmul rate"
    )


def matmul_rate(device: torch.device, dtype: str, side: int) -> float:
    """Return the FLOP/s of the best of 12 matmuls of side x side in bf16 or fp32."""
    a = torch.ones(side, side, device=device, dtype=DTYPES[dtype])
    best = float("inf")
    for _ in range(12):
        started = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


if __name__ == "__main__":
    main()
