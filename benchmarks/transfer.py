"""Does the best learning rate stay where it is when the model gets wider, with and without
`optim.scale.width`?

    dnt data prepare TEXT... --out data/recipe --vocab-size 2048 --seq-len 128 --val-fraction 0.01
    python -m benchmarks.transfer --optimizer rmnp --data data/recipe
    python -m benchmarks.transfer --optimizer rmnp --data data/recipe --scale 64

Trains DNT S4 of 3 layers at each width with five learning rates a factor of two apart, for as many
steps on the same rows. The picture, results/transfer-....png, has final validation losses against
`optim.lr`, as it is given, and a line for each width: learning rates carry over where the lines are
lowest at the same one. With --scale they are scaled from that width.

Runs are kept in results/transfer-runs.jsonl (journaled_runs.py): none in it is trained again, and
the same command goes on after any stop.
"""

import argparse
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.journaled_runs import JournaledRuns
from dnt_scale.report.figures import Line, draw_against
from dnt_scale.report.sensitivity import sensitivity

RESULTS = Path(__file__).parent / "results"
WIDTHS = (32, 64, 128)  # heads of 32
# The middle of each grid: what was best at width 64 and 1,600 steps, or is near it.
MIDDLES = {
    "adamw": 1.6e-2,
    "muon_normalized": 3e-3,
    "normalized": 3e-3,
    "rmnp": 0.02,
    "msgdw": 0.3,
    "msgdw_r": 1.0,
    "lion": 2e-3,
    "signum": 2e-3,
}
POWERS = (0, 1, -1, 2, -2)  # of two, the likeliest first

Point = tuple[int, float]  # width, learning rate


def loss(options: argparse.Namespace, runs: JournaledRuns, point: Point) -> float:
    """Return a run's validation loss; infinite if it failed."""
    width, lr = point
    overrides = [
        *("model=dnt_nano", "model.setting=S4", "model.layers=3"),
        *(f"model.width={width}", f"model.heads={width // 32}"),
        *(f"optim={options.optimizer}", f"optim.lr={lr:g}"),
        *([f"optim.scale.width={options.scale}"] if options.scale else []),
        f"run.seed={options.seed}",
        *("train.global_batch=32", "train.micro_batch=32"),
    ]
    words = (options.optimizer, *point, options.scale or "plain", options.steps, options.seed)
    return runs.loss(words, overrides, options.steps)


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

    runs = JournaledRuns(options.journal, options.runs, options.data)
    points = [(w, MIDDLES[options.optimizer] * 2.0**power) for power in POWERS for w in WIDTHS]
    with ThreadPoolExecutor(options.workers) as pool:
        losses = dict(zip(points, pool.map(lambda p: loss(options, runs, p), points), strict=True))
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
