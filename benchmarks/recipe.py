"""One buffer against two: losses of optimizers on DNT and GPT, each at its own best learning rate.

    dnt data prepare TEXT... --out data/recipe --vocab-size 2048 --seq-len 128 --val-fraction 0.01
    python -m benchmarks.recipe --table a --data data/recipe
    python -m benchmarks.recipe --table a --data data/recipe --only 'DNT S4 (adamw|rmnp)$'

    a    {GPT S1, DNT S4, DNT S5} x every optimizer
    b    S1 to S5 under vanilla mSGDW and rmnp
    c    rmnp with one of its parts left out or another way

All runs of a table see the same rows in the same order. Each optimizer is trained at the learning
rates of a grid by factors of two, which grows while its best value lies at an end. A run is
`python -m dnt_scale.train` on one thread; its folder below --runs is the journal: the same command
goes on after any stop, and trains no finished run again. A learning rate is `optim.lr`; groups with
one of their own keep it. The loss is that of the held-out rows at the last step. Several --seeds
are trained at the best learning rate only.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from dnt_scale.record.files import git_commit
from dnt_scale.record.metrics_file import last_metrics
from dnt_scale.report.sensitivity import sensitivity

SIZES = {  # by about how many weights they have with a vocabulary of 2,048
    "0.3M": ["model.layers=3", "model.width=64", "model.heads=2"],
    "1M": ["model.layers=4", "model.width=128", "model.heads=4"],
    "6M": ["model.layers=6", "model.width=256", "model.heads=4"],
}
MODELS = {
    "GPT S1": ["model=gpt_nano"],
    "DNT S4": ["model=dnt_nano", "model.setting=S4"],
    "DNT S5": ["model=dnt_nano", "model.setting=S5"],
}
# the optimizer's file and the first learning rate of its grid, the middle of five
OPTIMIZERS = {
    "adamw": 8e-3,
    "rmnp": 0.02,
    "rmnp_adam_gains": 0.02,
    "msgdw": 0.3,
    "msgdw_r": 1.0,
    "msgdw_adam": 1.0,
    "sgd_ll": 3.0,
    "lion": 1e-3,
    "signum": 1e-3,
    "muon": 0.02,
}
GROUPS = ("embedding", "matrices", "tall")
PARTS = {
    "whole": [],
    "no Nesterov": ["optim.nesterov=false"],
    "no tall factor": ["optim.groups.tall.tall_factor=false"],
    "tall factor on the embedding": ["optim.groups.embedding.tall_factor=true"],
    "no decay": ["optim.weight_decay=0"],
    "decay on the embedding": ["optim.groups.embedding.weight_decay=0.1"],
    "fixed norms": [f"optim.groups.{name}.fixed_norm=true" for name in ("matrices", "tall")],
    "no clipping": ["optim.clip_norm=null"],
    "down to 0": ["optim.schedule.final=0"],
    "momentum 0.9": ["optim.momentum=0.9", "optim.dampening=0.9"],
    "tensors, not rows": [f"optim.groups.{name}.update=tensor_normalized" for name in GROUPS],
    "gains normalized": [
        "optim.groups.gains.update=tensor_normalized",
        "optim.groups.gains.lr=8e-3",
    ],
}
MOST_GROWTH = 4  # times that a grid grows at one end


class Variant(NamedTuple):
    """What a row of a table trains, but for its learning rate and seed."""

    model: str
    optimizer: str
    overrides: list[str]
    lr: float


def variants(table: str) -> Iterator[Variant]:
    """Yield a table's rows."""
    if table == "a":
        for model, shape in MODELS.items():
            for name, lr in OPTIMIZERS.items():
                yield Variant(model, name, [*shape, f"optim={name}"], lr)
    elif table == "b":
        for setting in ("S1", "S2", "S3", "S4", "S5"):
            for name in ("msgdw", "rmnp"):
                overrides = ["model=dnt_nano", f"model.setting={setting}", f"optim={name}"]
                yield Variant(f"DNT {setting}", name, overrides, OPTIMIZERS[name])
    else:
        for part, changes in PARTS.items():
            overrides = [*MODELS["DNT S4"], "optim=rmnp", *changes]
            yield Variant("DNT S4", f"rmnp, {part}", overrides, OPTIMIZERS["rmnp"])


class Bench:
    """Runs of one table, at one size and length."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.runs: list[dict[str, Any]] = []
        self.environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def loss(self, variant: Variant, lr: float, seed: int) -> float:
        """Train a run, or find it trained, and return its validation loss; infinite if it fails."""
        options = self.options
        words = [
            variant.model,
            variant.optimizer,
            f"{options.size}-{options.steps}",
            f"{lr:g}",
            seed,
        ]
        name = "-".join(re.sub(r"[^\w.]+", "_", str(word)) for word in words)
        folder = options.runs / name
        overrides = [
            *variant.overrides,
            *SIZES[options.size],
            f"model.vocab_size={options.vocab_size}",
            f"model.context={options.seq_len}",
            f"optim.lr={lr:g}",
            f"run.seed={seed}",
            f"train.steps={options.steps}",
            f"train.global_batch={options.batch}",
            f"train.micro_batch={min(options.batch, 32)}",
            "train.dtype=fp32",
            f"eval.every={max(1, options.steps // 8)}",
            "eval.rows=3000",
            "checkpoint.every=1000",
            "checkpoint.keep=1",
            "tracking.enabled=false",
        ]
        begin, done = time.monotonic(), True
        if not finished(folder, options.steps):
            print(f"{name} ...", flush=True)
            places = [f"data.path={options.data}", f"run.name={name}", f"run.dir={folder}"]
            done = self.train(overrides, places, folder)
        last = last_metrics(folder)[-1] if done else {}
        loss = last.get("val/loss") or float("inf")
        print(f"{name}: {loss:.4f} ({time.monotonic() - begin:.0f} s)", flush=True)
        self.runs.append(
            {
                "model": variant.model,
                "optimizer": variant.optimizer,
                "lr": lr,
                "seed": seed,
                "val_loss": loss if done else None,
                "train_loss": last.get("train/loss"),
                "overrides": overrides,
            }
        )
        return loss

    def train(self, overrides: list[str], places: list[str], folder: Path) -> bool:
        """Run it. A failure is kept beside the folder, so that it is not tried again."""
        failed = folder.with_suffix(".failed")
        if failed.exists():
            return False
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_suffix(".log")
        with log.open("ab") as out:
            command = [sys.executable, "-m", "dnt_scale.train", *overrides, *places]
            code = subprocess.run(command, env=self.environment, stdout=out, stderr=out).returncode
        if code in (-2, 130):
            raise KeyboardInterrupt
        if code:
            shutil.copy(log, failed)
            return False
        return True

    def row(self, variant: Variant) -> dict[str, Any]:
        """Train a row's grid, then the other seeds at the best."""
        first, *others = self.options.seeds
        found = {variant.lr * 2.0**power: 0.0 for power in range(-2, 3)}
        for lr in found:
            found[lr] = self.loss(variant, lr, first)
        for _ in range(MOST_GROWTH):
            best = min(found, key=lambda lr: found[lr])
            ends = {min(found): min(found) / 2, max(found): max(found) * 2}
            if best not in ends or found[best] == float("inf"):
                break
            found[ends[best]] = self.loss(variant, ends[best], first)
        best = min(found, key=lambda lr: found[lr])
        losses = [found[best], *(self.loss(variant, best, seed) for seed in others)]
        width = sensitivity(sorted(found), [found[lr] for lr in sorted(found)])
        return {
            "model": variant.model,
            "optimizer": variant.optimizer,
            "lr": best,
            "val_loss": sum(losses) / len(losses),
            "spread": max(losses) - min(losses),
            "seeds": len(losses),
            "within_0.05_nats": width.factor if width else None,
            "width_is_cut": bool(width and (width.low_cut or width.high_cut)),
        }


def finished(folder: Path, steps: int) -> bool:
    """Say whether a run has come to its end."""
    lines = last_metrics(folder) if folder.exists() else []
    return bool(lines) and lines[-1]["step"] == steps and "val/loss" in lines[-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=["a", "b", "c"], required=True)
    parser.add_argument("--data", type=Path, required=True, help="a set made by `dnt data prepare`")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipe"))
    parser.add_argument("--size", choices=SIZES, default="0.3M")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=32, help="rows a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", default="", help="rows whose 'MODEL OPTIMIZER' has this regex")
    parser.add_argument("--out", type=Path, help="JSON (default: results/recipe-TABLE-....json)")
    options = parser.parse_args()
    manifest = json.loads((options.data / "manifest.json").read_text())
    options.vocab_size = manifest["tokenizer"]["vocab_size"]
    options.seq_len = manifest["seq_len"]
    options.data, options.runs = options.data.absolute(), options.runs.absolute()

    bench = Bench(options)
    chosen = [v for v in variants(options.table) if re.search(options.only, f"{v[0]} {v[1]}")]
    rows = []
    for number, variant in enumerate(chosen, 1):
        print(f"row {number} of {len(chosen)}: {variant.model}, {variant.optimizer}", flush=True)
        rows.append(bench.row(variant))
        write(options, bench, rows)
    show(options, rows)


def write(options: argparse.Namespace, bench: Bench, rows: list[dict[str, Any]]) -> None:
    """Write what is known so far, so that a stop loses one row at most."""
    name = f"recipe-{options.table}-{options.size}-{options.steps}.json"
    out = options.out or Path(__file__).parent / "results" / name
    result = {
        "command": f"python -m benchmarks.recipe {' '.join(sys.argv[1:])}",
        "commit": git_commit(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, 1 thread a run",
        "tokens": options.steps * options.batch * options.seq_len,
        "rows": rows,
        "runs": bench.runs,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")


def show(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"table {options.table}, {options.size} weights, {options.steps} steps")
    for column in (
        "model",
        "optimizer",
        "learning rate",
        "validation loss",
        "spread",
        "within .05",
    ):
        table.add_column(column, justify="left" if column in ("model", "optimizer") else "right")
    for row in sorted(rows, key=lambda row: (row["model"], row["val_loss"])):
        width = row["within_0.05_nats"]
        least = "at least " if row["width_is_cut"] else ""
        table.add_row(
            row["model"],
            row["optimizer"],
            f"{row['lr']:g}",
            f"{row['val_loss']:.4f}",
            f"{row['spread']:.4f} ({row['seeds']})",
            f"{least}x {width:.3g}" if width else "-",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
