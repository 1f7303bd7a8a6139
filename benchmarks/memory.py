"""Memory of real training steps on 1, 2 and 4 gloo ranks: mSGDW beside AdamW on the same engines,
and sharding as 1/N.

    python -m benchmarks.memory

The model is deep and narrow, in bf16, with one short row a micro-batch: activations and a block's
gathered weights are small beside what is held for every weight. Bytes are what the process has
allocated in pieces of 32 KiB or more and not given back, by the C library's own count (mallinfo2),
less what was there before the engine was built; the peak is the most after any operation of the
second step that makes a piece of that size. A rank's bytes times the number of ranks, over the
number of weights, are bytes a weight; those of the first table are of the rank that takes most.

The second table, of fewer blocks, has what each rank holds between backward and update: it falls as
1/N where it is sharded.
"""

import argparse
import datetime
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dnt_scale.costs import memory_plan
from dnt_scale.model.flops import count_parameters
from dnt_scale.record.files import git_commit
from testbed.measure import answers, print_costs, run_config
from testbed.run import Ranks

WIDTH, CONTEXT = 256, 16
SHARED_LAYERS = 16  # of the second table, which has no peaks
PATIENCE_S = 900.0
UNBUFFERED = ["optim=msgdw", "optim.gradient_buffer=false", "optim.clip=previous"]
OPTIMIZERS = {
    "AdamW": ["optim=adamw"],
    "mSGDW": ["optim=msgdw"],
    "mSGDW, no gradient buffer": UNBUFFERED,
    "the same, momentum in bf16": [*UNBUFFERED, "optim.momentum_dtype=bf16"],
}
WANTED = {"mSGDW": 0.76, "mSGDW, no gradient buffer": 0.55}  # of AdamW's peak, at most
PEAKS = [("fsdp", 1), ("fsdp", 2), ("zero2", 2), ("zero3", 2)]
SHARDED = ["fsdp", "hsdp", "zero1", "zero2", "zero3"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument(
        "--out", type=Path, help="JSON to write (default: benchmarks/results/memory-DEVICE.json)"
    )
    options = parser.parse_args()

    @cache
    def measure(
        engine: str, ranks: int, optimizer: str, layers: int = options.layers
    ) -> list[dict[str, Any]]:
        print(f"{engine} on {ranks} ranks, {optimizer}, {layers} blocks", flush=True)
        overrides = overrides_of(engine, ranks, optimizer)
        found = answers(Ranks(print_costs, (overrides, (1, layers)), ranks, {}).wait(PATIENCE_S))
        return [depths[0] for depths in found]

    def weights_of(layers: int) -> int:
        return count_parameters(
            run_config([*overrides_of("fsdp", 1, "AdamW"), f"model.layers={layers}"]).model
        )

    weights = weights_of(options.layers)
    peaks = [
        {
            "engine": engine,
            "ranks": ranks,
            "optimizer": name,
            "peak": max(rank["peak"] for rank in measure(engine, ranks, name)) * ranks / weights,
            "held": max(rank["held"] for rank in measure(engine, ranks, name)) * ranks / weights,
            "of_adamw": max(rank["peak"] for rank in measure(engine, ranks, name))
            / max(rank["peak"] for rank in measure(engine, ranks, "AdamW")),
        }
        for engine, ranks in PEAKS
        for name in OPTIMIZERS
        if name in ("AdamW", "mSGDW") or not engine.startswith("zero")
    ]
    shares, fewer = [], weights_of(SHARED_LAYERS)
    for engine in SHARDED:
        for ranks in (1, 2, 4):
            run = run_config(
                [*overrides_of(engine, ranks, "mSGDW"), f"model.layers={SHARED_LAYERS}"]
            )
            found = measure(engine, ranks, "mSGDW", SHARED_LAYERS)
            shards, held = found[0]["shards"], max(rank["held"] for rank in found)
            shares.append(
                {
                    "engine": engine,
                    "ranks": ranks,
                    "weights": shards["model"] / fewer,
                    "momentum": shards["momentum_buffer"] / fewer,
                    "held": held / fewer,
                    "formula": memory_plan.memory(run, ranks).total() / fewer,
                }
            )
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "device": f"{os.cpu_count()}-core CPU",
        "torch": torch.__version__,
        "parameters": weights,
        "layers": options.layers,
        "width": WIDTH,
        "peak_bytes_a_weight": peaks,
        "bytes_a_weight_and_rank": shares,
        "wanted_of_adamw_at_most": WANTED,
    }
    show(result)
    out = (
        options.out
        or Path(__file__).parent / "results" / f"memory-{result['device'].replace(' ', '-')}.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out}")


def overrides_of(engine: str, ranks: int, optimizer: str) -> list[str]:
    """ZeRO's buckets, by default larger than this model, hold one or two blocks."""
    shape = [
        f"model.width={WIDTH}",
        "model.heads=4",
        f"model.context={CONTEXT}",
        "train.dtype=bf16",
    ]
    batch = [f"train.global_batch={2 * ranks}", "train.micro_batch=1"]
    buckets = "engine.deepspeed={zero_optimization: {reduce_bucket_size: 1000000}}"
    own = {
        "hsdp": [f"engine.replicas={max(1, ranks // 2)}"],
        "zero2": [buckets],
        "zero3": [buckets],
    }
    return [*shape, *batch, f"engine={engine}", *own.get(engine, []), *OPTIMIZERS[optimizer]]


def show(result: dict[str, Any]) -> None:
    title = (
        f"{result['parameters'] / 1e6:.0f}M weights in {result['layers']} blocks of width "
        f"{result['width']}, bf16"
    )
    table = Table(title=f"{title}\n{result['device']}, {result['date']}, {result['commit'][:12]}")
    for column in (
        "engine",
        "ranks",
        "optimizer",
        "held, bytes a weight",
        "peak",
        "peak over AdamW's",
        "wanted",
    ):
        table.add_column(column, justify="right")
    for row in result["peak_bytes_a_weight"]:
        wanted = (
            result["wanted_of_adamw_at_most"].get(row["optimizer"])
            if row["engine"] == "fsdp"
            else None
        )
        numbers = (
            f"{row['held']:.2f}",
            f"{row['peak']:.2f}",
            f"{row['of_adamw']:.3f}",
            f"{wanted}" if wanted else "",
        )
        table.add_row(row["engine"], str(row["ranks"]), row["optimizer"], *numbers)
    Console(width=120).print(table)
    table = Table(title=f"bytes that a rank holds, over all weights; {SHARED_LAYERS} blocks")
    for column in ("engine", "ranks", "fp32 weights", "momentum", "all that is held", "by formula"):
        table.add_column(column, justify="right")
    for row in result["bytes_a_weight_and_rank"]:
        numbers = (f"{row[name]:.3f}" for name in ("weights", "momentum", "held", "formula"))
        table.add_row(row["engine"], str(row["ranks"]), *numbers)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
