"""Does the best learning rate stay where it is when the model gets wider, with and without
`optim.scale.width`?

    dnt data prepare TEXT... --out data/recipe --vocab-size 2048 --seq-len 128 --val-fraction 0.01
    python -m benchmarks.transfer --optimizer rmnp --data data/recipe
    python -m benchmarks.transfer --optimizer rmnp --data data/recipe --scale 64

Trains DNT S4 of 3 layers at each width with five learning rates a factor of two apart, for as many
steps on the same rows. The picture, results/transfer-....png, has final validation losses against
`optim.lr`, as it is given, and a line for each width: learning rates carry over where the lines are
lowest at the same one. With --scale they are scaled from that width.

A run is `python -m dnt_scale.train` on one thread. What it gave is a line of the journal,
results/transfer-runs.jsonl: no run in it is trained again, and the same command goes on after any
stop.
"""

import argparse
import datetime
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from dnt_scale.record.files import git_commit
from dnt_scale.record.metrics_file import METRICS, whole_lines
from dnt_scale.report.figures import Line, draw_against
from dnt_scale.report.sensitivity import sensitivity

RESULTS = Path(__file__).parent / "results"
WIDTHS = (32, 64, 128)  # heads of 32
# The middle of each grid: what was best at width 64 and 1,600 steps, or is near it.
MIDDLES = {
    "adamw": 1.6e-2,
    "rmnp": 0.02,
    "msgdw": 0.3,
    "msgdw_r": 1.0,
    "lion": 2e-3,
    "signum": 2e-3,
}
POWERS = (0, 1, -1, 2, -2)  # of two, the likeliest first
LOCK = Lock()  # of the journal, and what is printed

Point = tuple[int, float]  # width, learning rate


def overrides_of(options: argparse.Namespace, manifest: dict[str, Any], point: Point) -> list[str]:
    """Return what a run is made of, but for its places."""
    width, lr = point
    return [
        *("model=dnt_nano", "model.setting=S4", "model.layers=3"),
        *(f"model.width={width}", f"model.heads={width // 32}"),
        f"model.vocab_size={manifest['tokenizer']['vocab_size']}",
        f"model.context={manifest['seq_len']}",
        *(f"optim={options.optimizer}", f"optim.lr={lr:g}"),
        *([f"optim.scale.width={options.scale}"] if options.scale else []),
        *(f"run.seed={options.seed}", f"train.steps={options.steps}"),
        *("train.global_batch=32", "train.micro_batch=32", "train.dtype=fp32"),
        *(f"eval.every={max(1, options.steps // 8)}", "eval.rows=1600"),
        *("checkpoint.every=1000", "checkpoint.keep=1", "tracking.enabled=false"),
    ]


def train(folder: Path, data: Path, overrides: list[str]) -> dict[str, Any]:
    """Train a run, or go on with one that was stopped; return its line of the journal but for what
    it is.

    Raises:
        KeyboardInterrupt: the run was stopped by a signal.
    """
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    places = [f"data.path={data}", f"run.name={folder.name}", f"run.dir={folder}"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with folder.with_suffix(".log").open("ab") as out:
        command = [sys.executable, "-m", "dnt_scale.train", *overrides, *places]
        environment = {**os.environ, **one_thread, "CUDA_VISIBLE_DEVICES": ""}
        code = subprocess.run(command, env=environment, stdout=out, stderr=out).returncode
    if code in (-2, -15, 130, 143):
        raise KeyboardInterrupt
    lines = whole_lines(folder / METRICS)
    losses = {line["step"]: line["val/loss"] for line in lines if "val/loss" in line}
    return {
        "seconds": round(time.monotonic() - begin),
        "val_loss": None if code else losses[lines[-1]["step"]],
        "lr_at_the_top": max((line["lr"] for line in lines if "lr" in line), default=None),
    }


def loss(options: argparse.Namespace, manifest: dict[str, Any], point: Point) -> float:
    """Return a run's validation loss, trained now or before; infinite if it failed."""
    overrides = overrides_of(options, manifest, point)
    shards = json.dumps([manifest["tokenizer"]["sha256"], manifest["splits"]], sort_keys=True)
    data = f"{options.data.name} {hashlib.sha256(shards.encode()).hexdigest()[:12]}"
    with LOCK:
        file = options.journal
        known = map(json.loads, file.read_text().splitlines() if file.exists() else [])
        found = [run for run in known if (run["data"], run["overrides"]) == (data, overrides)]
    if not found:
        words = (options.optimizer, *point, options.scale or "plain", options.steps, options.seed)
        name = "-".join(re.sub(r"[^\w.]+", "_", f"{word}") for word in words)
        run = {"run": name, "data": data, "overrides": overrides, "commit": git_commit()}
        run["date"] = datetime.date.today().isoformat()
        run |= train(options.runs / name, options.data, overrides)
        found = [run]
        with LOCK, file.open("a") as out:
            out.write(json.dumps(run) + "\n")
            print(f"{name}: {run['val_loss'] or 'failed'} ({run['seconds']} s)", flush=True)
    return found[0]["val_loss"] or math.inf


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimizer", choices=MIDDLES, required=True)
    parser.add_argument("--data", type=Path, required=True, help="a set made by `dnt data prepare`")
    parser.add_argument("--scale", type=int, help="optim.scale.width (default: not scaled)")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="runs trained at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--journal", type=Path, default=RESULTS / "transfer-runs.jsonl")
    parser.add_argument("--out", type=Path, help="the picture (default: results/transfer-....png)")
    options = parser.parse_args()
    options.data, options.runs = options.data.absolute(), options.runs.absolute()

    manifest = json.loads((options.data / "manifest.json").read_text())
    points = [(w, MIDDLES[options.optimizer] * 2.0**power) for power in POWERS for w in WIDTHS]
    with ThreadPoolExecutor(options.workers) as pool:
        losses = dict(
            zip(points, pool.map(lambda p: loss(options, manifest, p), points), strict=True)
        )
    how = f"scaled from width {options.scale}" if options.scale else "not scaled"
    name = f"transfer-{options.optimizer}-{options.scale or 'plain'}-{options.steps}.png"
    title = f"{options.optimizer}, {options.steps:,} steps, {how}"
    lines = [line(width, losses) for width in WIDTHS]
    print(draw_against(lines, "optim.lr", "tokens", title, options.out or RESULTS / name))
    for each in lines:
        best = f"{each.width.best:g}, {each.width.loss:.4f}" if each.width else "none"
        print(f"{each.name}: best {best}; " + ", ".join(f"{value:.4f}" for value in each.mean))


def line(width: int, losses: dict[Point, float]) -> Line:
    """Return a width's line of the picture."""
    values = sorted(lr for other, lr in losses if other == width)
    found = [losses[width, lr] for lr in values]
    shown = [each if math.isfinite(each) else math.nan for each in found]
    failed = [not math.isfinite(each) for each in found]
    return Line(f"width {width}", values, shown, shown, shown, failed, sensitivity(values, found))


if __name__ == "__main__":
    main()
