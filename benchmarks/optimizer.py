"""Time of an optimizer step on the CPU: ours with weight decay beside torch's fused ones and bare
memory traffic.

    python -m benchmarks.optimizer

The tensors are those of --model, in fp32, each a parameter of its own. All take turns, in rounds;
what is compared is the median over rounds of the ratio within a round. Bytes alone say 20 a
parameter for a momentum step (three reads, two writes) and 28 for AdamW's. Bare traffic is one loop
over three long arrays that reads all and writes two, with a multiplication or two on the way.
"""

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from dnt_scale import config
from dnt_scale.config import GroupConfig, ModelConfig
from dnt_scale.model.dnt import DNT
from dnt_scale.optim import fused_cpu
from dnt_scale.optim.algorithms.adamw import AdamWConfig
from dnt_scale.optim.algorithms.msgdw import MSGDWConfig
from dnt_scale.optim.build import build_optimizer
from dnt_scale.record.files import git_commit

OURS, ADAMW, SGD, BARE = (
    "mSGDW with weight decay",
    "torch AdamW, fused",
    "torch SGD, fused",
    "bare memory traffic",
)
WANTED = {ADAMW: 0.75, SGD: 1.05, BARE: 1.3}  # our time over theirs, at most
SEED = 1
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="dnt_124m", help="a file in configs/model")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--out", type=Path, help="JSON to write (default: benchmarks/results/optimizer-DEVICE.json)"
    )
    options = parser.parse_args()

    with torch.device("meta"):
        model = DNT(model_config(options.model))
    steps = contestants({name: parameter.shape for name, parameter in model.named_parameters()})
    for step in steps.values():
        step()
    rounds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds):
        first = number % len(steps)  # another one begins: what ran before has filled the cache
        for name in [*steps][first:] + [*steps][:first]:
            started = time.perf_counter()
            steps[name]()
            rounds[name].append(time.perf_counter() - started)

    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "device": f"{os.cpu_count()}-core CPU",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compiled": fused_cpu.load() is not None,
        "model": options.model,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": {name: statistics.median(found) for name, found in rounds.items()},
        "ours_over": {
            name: statistics.median(a / b for a, b in zip(rounds[OURS], found, strict=True))
            for name, found in rounds.items()
        },
        "wanted_at_most": WANTED,
        "seconds_of_rounds": rounds,
    }
    show(result)
    out = (
        options.out
        or Path(__file__).parent
        / "results"
        / f"optimizer-{result['device'].replace(' ', '-')}.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out}")


def model_config(name: str) -> ModelConfig:
    return config.load([f"model={name}", "run.name=none", "data.path=none"]).model


def contestants(shapes: dict[str, torch.Size]) -> dict[str, Step]:
    """One step of each; the optimizers share weights and gradients, and each has its own state."""
    generator = torch.Generator().manual_seed(SEED)
    named = [
        (name, nn.Parameter(0.02 * torch.randn(shape, generator=generator)))
        for name, shape in shapes.items()
    ]
    for _, parameter in named:
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
    msgdw = MSGDWConfig(algorithm="msgdw", lr=1e-4, weight_decay=0.1)
    embedding = GroupConfig(pattern=r"^tok_emb\.", update="row_normalized")
    configs: dict[str, MSGDWConfig | AdamWConfig] = {
        OURS: msgdw,
        ADAMW: AdamWConfig(algorithm="adamw", lr=1e-4, weight_decay=0.1),
        "mSGDW, embedding by rows": msgdw.model_copy(update={"groups": {"embedding": embedding}}),
        "mSGDW, momentum in bf16": msgdw.model_copy(update={"momentum_dtype": "bf16"}),
    }
    steps: dict[str, Step] = {}
    for name, settings in configs.items():
        optimizer = build_optimizer(named, settings, SEED)
        optimizer.allocate()
        steps[name] = optimizer.step
    steps[SGD] = torch.optim.SGD([p for _, p in named], lr=1e-4, momentum=0.9, fused=True).step
    count = sum(p.numel() for _, p in named)
    p, v, g = (torch.full((count,), 1e-3) for _ in range(3))
    steps[BARE] = lambda: torch._fused_sgd_(
        [p],
        [g],
        [v],
        weight_decay=0.0,
        momentum=0.5,
        lr=1e-6,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )
    return steps


def show(result: dict[str, Any]) -> None:
    compiled = "compiled" if result["compiled"] else "no C compiler"
    title = (
        f"{result['parameters'] / 1e6:.0f}M parameters of {result['model']}, {result['threads']} "
        f"threads, {compiled}"
    )
    table = Table(title=f"{title}\n{result['device']}, {result['date']}, {result['commit'][:12]}")
    for column in ("one step", "ms", "ours over it", "wanted, at most"):
        table.add_column(column, justify="right")
    for name, seconds in result["seconds"].items():
        wanted = result["wanted_at_most"].get(name)
        ratio = f"{result['ours_over'][name]:.2f}"
        table.add_row(name, f"{seconds * 1e3:.1f}", ratio, f"{wanted:.2f}" if wanted else "")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
