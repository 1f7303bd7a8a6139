"""One buffer against two: losses of optimizers on DNT and GPT, each at its own best learning rate.

    dnt data prepare TEXT... --out data/recipe --vocab-size 2048 --seq-len 128 --val-fraction 0.01
    python -m benchmarks.recipe --table a --data data/recipe
    python -m benchmarks.recipe --table a --data data/recipe --only 'DNT S4 (adamw|normalized) '

    a    {GPT S1, DNT S4, DNT S5} x every optimizer
    b    S1 to S5 under vanilla mSGDW and normalized
    c    normalized with one of its parts left out or another way
    d    AdamW, normalized and mSGDW at 1/4, 1 and 4 times --steps, and at other batches
    e    with and without clipping and a gradient buffer
    f    AdamW, normalized and mSGDW, for other --data

All runs of a table see the same rows in the same order. Each optimizer is trained at the learning
rates of a grid by factors of two, which grows while its best value lies at an end; then, at the
best one, without weight decay and with three times as much; then with the other --seeds. A learning
rate is `optim.lr`; groups with one of their own keep it. The loss is that of the held-out rows at
the last step.

Runs are kept in results/recipe-runs.jsonl (journaled_runs.py): none in it is trained again, but by
--again, which compares; the same command goes on after any stop.
"""

import argparse
import datetime
import json
import math
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.journaled_runs import JournaledRuns
from benchmarks.recipe_tables import SIZES, Variant, variants
from dnt_scale.report.sensitivity import sensitivity

RESULTS = Path(__file__).parent / "results"
ORDER = (0, -1, 1, -2, 2)  # powers of two, the likeliest first
MOST_GROWTH = 4  # times that a grid grows at one end


class Bench:
    """Runs of one table, at one size."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.runs = JournaledRuns(options.journal, options.runs, options.data, again=options.again)

    def loss(self, variant: Variant, lr: float, decay: float, seed: int) -> float:
        """Return a run's validation loss; infinite if it failed."""
        return self.result(variant, lr, decay, seed)["val_loss"] or math.inf

    def result(self, variant: Variant, lr: float, decay: float, seed: int) -> dict[str, Any]:
        """Return the journal's line of a run."""
        size = self.options.size
        overrides = [
            *variant.overrides,
            *SIZES[size],
            *(f"{key}={lr:g}" for key in variant.grid.keys),
            f"optim.weight_decay={decay:g}",
            f"run.seed={seed}",
            f"train.global_batch={variant.batch}",
            f"train.micro_batch={min(variant.batch, 32)}",
        ]
        words = [variant.words, size, f"{lr:g}", f"{decay:g}", seed]
        return self.runs.result(words, overrides, variant.steps)

    def row(self, variant: Variant) -> dict[str, Any]:
        """Train a row's grid, then weight decays, then the other seeds at the best."""
        first, *others = self.options.seeds
        grid = variant.grid
        found: dict[float, float] = {}
        for power in ORDER:
            lr = grid.lr * 2.0**power
            found[lr] = self.loss(variant, lr, grid.decay, first)
        for _ in range(MOST_GROWTH):
            best = min(found, key=lambda lr: found[lr])
            ends = {min(found): min(found) / 2, max(found): max(found) * 2}
            if best not in ends or found[best] == float("inf"):
                break
            found[ends[best]] = self.loss(variant, ends[best], grid.decay, first)
        best = min(found, key=lambda lr: found[lr])
        decays = {grid.decay: found[best]}
        if grid.decay:
            for decay in (0.0, 3 * grid.decay):
                decays[decay] = self.loss(variant, best, decay, first)
        decay = min(decays, key=lambda decay: decays[decay])
        ends = [self.result(variant, best, decay, seed) for seed in (first, *others)]
        losses = [end["val_loss"] or math.inf for end in ends]
        width = sensitivity(sorted(found), [found[lr] for lr in sorted(found)])
        return {
            "model": variant.model,
            "optimizer": variant.optimizer,
            "steps": variant.steps,
            "batch": variant.batch,
            "tokens": variant.steps * variant.batch * self.runs.seq_len,
            "lr": best,
            "weight_decay": decay,
            "val_loss": sum(losses) / len(losses),
            "spread": max(losses) - min(losses),
            "seeds": self.options.seeds,
            "within_0.05_nats": width.factor if width else None,
            "width_is_cut": bool(width and (width.low_cut or width.high_cut)),
            "losses_by_seed": losses,
            "losses_by_step": [end["val_losses"] for end in ends],
            "losses_by_decay": {f"{value:g}": decays[value] for value in sorted(decays)},
            "losses_by_lr": {f"{lr:g}": found[lr] for lr in sorted(found)},
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=list("abcdef"), required=True)
    parser.add_argument("--data", type=Path, required=True, help="a set made by `dnt data prepare`")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipe"))
    parser.add_argument("--journal", type=Path, default=RESULTS / "recipe-runs.jsonl")
    parser.add_argument("--size", choices=SIZES, default="0.3M")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", default="", help="rows whose 'MODEL OPTIMIZER STEPSxROWS' has it")
    parser.add_argument("--workers", type=int, default=1, help="rows trained at a time")
    parser.add_argument("--again", action="store_true", help="train all again, and compare")
    parser.add_argument("--out", type=Path, help="JSON (default: results/recipe-TABLE-....json)")
    options = parser.parse_args()

    bench = Bench(options)
    chosen = [v for v in variants(options.table, options.steps) if re.search(options.only, v.words)]
    with ThreadPoolExecutor(options.workers) as pool:
        rows = list(pool.map(bench.row, chosen))
    if not options.again:
        write(options, bench, rows)
    show(options, rows)


def write(options: argparse.Namespace, bench: Bench, rows: list[dict[str, Any]]) -> None:
    name = f"recipe-{options.table}-{options.size}-{options.steps}-{options.data.name}.json"
    result = {
        "command": f"python -m benchmarks.recipe {' '.join(sys.argv[1:])}",
        "commit": bench.runs.commit,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, 1 thread a run",
        "data": bench.runs.data_id,
        "rows": rows,
    }
    (options.out or RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")


def show(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"table {options.table}, {options.size} weights")
    names = ("model", "optimizer", "steps x rows", "learning rate", "decay", "validation loss")
    for column in (*names, "spread", "within .05"):
        table.add_column(column, justify="left" if column in ("model", "optimizer") else "right")
    for row in sorted(rows, key=lambda row: (row["model"], row["tokens"], row["val_loss"])):
        width = row["within_0.05_nats"]
        least = "at least " if row["width_is_cut"] else ""
        table.add_row(
            row["model"],
            row["optimizer"],
            f"{row['steps']} x {row['batch']}",
            f"{row['lr']:g}",
            f"{row['weight_decay']:g}",
            f"{row['val_loss']:.4f}",
            f"{row['spread']:.4f} ({len(row['seeds'])})",
            f"{least}x {width:.3g}" if width else "-",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
