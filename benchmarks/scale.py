"""Memory and communication at scale, against the formulas of dnt_scale/costs/memory_plan.py.

The first table is a SIMULATION.

    python -m benchmarks.scale

Simulated: one process is rank 0 of 8, 256 and 1024. The sharding is the engine's own, over torch's
fake process group, and a forward and backward pass runs on fake tensors, which have sizes and no
storage. Bytes are those of the storages that weights, gradients and momentum would have.

Measured: bytes of every collective that a real step on 2 and 4 gloo ranks calls.
"""

import argparse
import datetime
import json
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dnt_scale.costs import memory_plan
from dnt_scale.model.flops import count_parameters
from dnt_scale.record.files import git_commit
from testbed.measure import answers, print_costs, print_simulated, run_config
from testbed.run import call

MODELS = {
    "dnt_1.4b": ["layers=48", "width=1536", "heads=24", "vocab_size=50304", "context=1024"],
    "70B": [
        "layers=86",
        "width=8192",
        "heads=64",
        "vocab_size=128256",
        "context=8192",
        "ffn_multiple=4",
    ],
}
WORLDS = (8, 256, 1024)
LAYOUTS = {"fsdp": ["engine=fsdp"], "hsdp, 8 copies": ["engine=hsdp", "engine.replicas=8"]}
KINDS = ("all_gather", "reduce_scatter", "all_reduce")
REAL = {
    "ddp": ["engine=ddp"],
    "fsdp": ["engine=fsdp"],
    "fsdp, weights kept": ["engine=fsdp", "engine.reshard_after_forward=false"],
    "hsdp": ["engine=hsdp", "engine.replicas=2"],
    "zero0": ["engine=zero0"],
    "zero1": ["engine=zero1"],
    "zero2": ["engine=zero2"],
    "zero3": ["engine=zero3"],
}
SMALL = ["model.width=512", "model.heads=8", "model.context=16", "optim=msgdw"]
# 4 micro-batches on 2 ranks, 2 on 4
BATCH = ["train.global_batch=8", "train.micro_batch=1", "train.dtype=bf16"]
WITHIN = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="JSON to write (default: benchmarks/results/scale-DEVICE.json)"
    )
    options = parser.parse_args()

    simulated = [
        simulate(model, layout, world)
        for model in MODELS
        for layout in LAYOUTS
        for world in WORLDS
        if layout == "fsdp" or world > 8
    ]
    measured = [count(engine, ranks) for engine in REAL for ranks in (2, 4)]
    worst = max(row["error"] for row in simulated + measured)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "device": f"{os.cpu_count()}-core CPU",
        "torch": torch.__version__,
        "simulated_bytes_a_rank": simulated,
        "measured_bytes_a_step": measured,
        "worst_error": worst,
        "wanted_error_at_most": WITHIN,
    }
    show(result)
    out = (
        options.out
        or Path(__file__).parent / "results" / f"scale-{result['device'].replace(' ', '-')}.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out}")


def simulate(model: str, layout: str, world: int) -> dict[str, Any]:
    overrides = [
        *(f"model.{field}" for field in MODELS[model]),
        *LAYOUTS[layout],
        "optim=msgdw",
        "train.dtype=bf16",
    ]
    run = run_config(overrides)
    (found,) = answers(call(print_simulated, overrides, world))
    expected = {field: getattr(memory_plan.memory(run, world), field) for field in found}
    return {
        "model": model,
        "parameters": count_parameters(run.model),
        "layout": layout,
        "ranks": world,
        "bytes": found,
        "formula": expected,
        "error": max(abs(found[field] / expected[field] - 1) for field in found),
    }


def count(engine: str, ranks: int) -> dict[str, Any]:
    overrides = [*SMALL, *BATCH, *REAL[engine]]
    traffic = memory_plan.traffic(run_config([*overrides, "model.layers=4"]), ranks)
    found = answers(call(print_costs, overrides, (1, 4), ranks=ranks))[0][0]["traffic"]
    found = {kind: found.get(kind, 0) for kind in KINDS}
    total = sum(found.values())
    return {
        "engine": engine,
        "ranks": ranks,
        "bytes": found,
        "formula": {kind: getattr(traffic, kind) for kind in KINDS},
        "error": max(abs(found[kind] - getattr(traffic, kind)) / total for kind in KINDS),
    }


def show(result: dict[str, Any]) -> None:
    title = f"{result['device']}, {result['date']}, {result['commit'][:12]}"
    table = Table(title=f"SIMULATED ranks: MB of rank 0\n{title}")
    for column in (
        "model",
        "weights",
        "layout",
        "ranks",
        "fp32 weights",
        "gradients",
        "momentum",
        "off the formula",
    ):
        table.add_column(column, justify="right")
    for row in result["simulated_bytes_a_rank"]:
        sizes = (
            f"{row['bytes'][field] / 1e6:,.1f}" for field in ("weights", "gradients", "buffers")
        )
        weights = f"{row['parameters'] / 1e9:.2f}B"
        table.add_row(
            row["model"], weights, row["layout"], str(row["ranks"]), *sizes, f"{row['error']:.2%}"
        )
    Console(width=120).print(table)
    table = Table(title="measured: MB of a step's collectives, a rank")
    for column in (
        "engine",
        "ranks",
        "all-gather",
        "reduce-scatter",
        "all-reduce",
        "off the formula",
    ):
        table.add_column(column, justify="right")
    for row in result["measured_bytes_a_step"]:
        sizes = (f"{row['bytes'][kind] / 1e6:,.1f}" for kind in KINDS)
        table.add_row(row["engine"], str(row["ranks"]), *sizes, f"{row['error']:.2%}")
    table.add_row("wanted, at most", "", "", "", "", f"{result['wanted_error_at_most']:.2%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
