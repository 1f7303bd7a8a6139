"""What the benchmarks recipe.py and image_recipe.py do: train the rows of a table, each at its own
best learning rate and weight decay, and write and show what came out.
"""

import argparse
import contextlib
import datetime
import json
import math
import platform
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.journaled_runs import JournaledRuns, NotRun
from benchmarks.recipe_tables import Optimizer, Variant
from dnt_scale.report.sensitivity import sensitivity

RESULTS = Path(__file__).parent / "results"
ORDER = (0, -1, 1, -2, 2)  # powers of two, the likeliest first
MOST_GROWTH = 4  # times that a grid grows at one end
LEAST_RATES = 3  # that --known makes a row of

Row = dict[str, Any]  # of a table, of what JSON is made of


class Recipe(NamedTuple):
    """A benchmark of tables.

    name: what its files in results/ begin with.
    tables: what each holds, by its letter.
    variants: the rows of a table, of a letter and the steps of a run.
    sizes: overrides by name; the first is the default.
    steps, seeds: defaults.
    """

    name: str
    tables: Mapping[str, str]
    variants: Callable[[str, int], Iterable[Variant]]
    sizes: Mapping[str, Sequence[str]]
    steps: int
    seeds: Sequence[int]


class Bench:
    """Runs of one table, at one size.

    Args:
        size: its name and its overrides.
        seeds: the first one's runs choose learning rate and weight decay.
    """

    def __init__(
        self, runs: JournaledRuns, size: tuple[str, Sequence[str]], seeds: Sequence[int]
    ) -> None:
        self.runs, self.size, self.seeds = runs, size, seeds

    def result(self, variant: Variant, lr: float, decay: float, seed: int) -> dict[str, Any]:
        """Return the journal's line of a run."""
        size, shape = self.size
        overrides = [
            *variant.overrides,
            *shape,
            *(f"{key}={lr:g}" for key in variant.grid.keys),
            f"optim.weight_decay={decay:g}",
            f"run.seed={seed}",
            f"train.global_batch={variant.batch}",
            f"train.micro_batch={min(variant.batch, variant.micro_batch)}",
        ]
        words = [variant.words, size, f"{lr:g}", f"{decay:g}", seed]
        return self.runs.result(words, overrides, variant.steps)

    def row(self, variant: Variant) -> Row:
        """Train a row's grid, then weight decays, then the other seeds at the best.

        Raises:
            NotRun: the journal has too little of it, and nothing is to be trained.
        """
        missing = 0

        def known(lr: float, decay: float, seed: int) -> dict[str, Any] | None:
            nonlocal missing
            try:
                return self.result(variant, lr, decay, seed)
            except NotRun:
                missing += 1
                return None

        def loss(lr: float, decay: float) -> float | None:
            run = known(lr, decay, self.seeds[0])
            return run and (run["val_loss"] or math.inf)

        by_lr, by_decay = search(variant.grid, loss)
        if len(by_lr) < LEAST_RATES:
            raise NotRun(f"{variant.words}: fewer than {LEAST_RATES} learning rates")
        lr, decay = lowest(by_lr), lowest(by_decay)
        found = {seed: known(lr, decay, seed) for seed in self.seeds}
        ends = {seed: run for seed, run in found.items() if run}
        losses = [end["val_loss"] or math.inf for end in ends.values()]
        width = sensitivity(list(by_lr), list(by_lr.values()))
        prepared = self.runs.set
        return {
            "model": variant.model,
            "optimizer": variant.optimizer,
            "steps": variant.steps,
            "batch": variant.batch,
            prepared.unit: variant.steps * variant.batch * prepared.a_row,
            "lr": lr,
            "weight_decay": decay,
            "val_loss": statistics.fmean(losses),
            "spread": max(losses) - min(losses),
            **(top1_of(ends.values()) if prepared.unit == "images" else {}),
            "seeds": list(ends),
            "within_0.05_nats": width.factor if width else None,
            "width_is_cut": bool(width and (width.low_cut or width.high_cut)),
            "runs": [end["run"] for end in ends.values()],
            "runs_missing": missing,
            "losses_by_seed": losses,
            "losses_by_step": [end["val_losses"] for end in ends.values()],
            "losses_by_decay": {f"{value:g}": by_decay[value] for value in sorted(by_decay)},
            "losses_by_lr": {f"{value:g}": loss for value, loss in by_lr.items()},
        }

    def known_rows(self, variants: Iterable[Variant]) -> Iterator[Row]:
        """Yield the rows of which the journal has enough."""
        for variant in variants:
            with contextlib.suppress(NotRun):
                yield self.row(variant)


def search(
    grid: Optimizer, loss: Callable[[float, float], float | None]
) -> tuple[dict[float, float], dict[float, float]]:
    """Return losses by learning rate, ascending, and at the best one by weight decay.

    Learning rates are five, a factor of two apart, and one more while the best lies at an end, at
    most MOST_GROWTH. Decays are the grid's own, none, a third and three times as much, and on by
    factors of three while the best lies at an end.

    Args:
        loss: of a learning rate and a weight decay; infinite if the run failed, None if it is not
            known, which leaves the value out.
    """
    found: dict[float, float] = {}
    for power in ORDER:
        add_known(found, grid.lr * 2.0**power, lambda lr: loss(lr, grid.decay))
    for _ in range(MOST_GROWTH):
        if not found:
            return {}, {}
        best = lowest(found)
        ends = {min(found): min(found) / 2, max(found): max(found) * 2}
        if best not in ends or found[best] == math.inf:
            break
        if not add_known(found, ends[best], lambda lr: loss(lr, grid.decay)):
            break
    best = lowest(found)
    decays, at_best = {grid.decay: found[best]}, partial(loss, best)
    if grid.decay:
        for factor in (3, 1 / 3):
            decay = grid.decay
            while decay == lowest(decays) and add_known(decays, decay * factor, at_best):
                decay *= factor
        add_known(decays, 0.0, at_best)
    return dict(sorted(found.items())), decays


def add_known(
    found: dict[float, float], value: float, loss: Callable[[float], float | None]
) -> bool:
    """Add a value's loss, if it is known, and return whether it is."""
    known = loss(value)
    if known is not None:
        found[value] = known
    return known is not None


def lowest(losses: Mapping[float, float]) -> float:
    """Return the value of the lowest loss, the first of several."""
    return min(losses, key=lambda value: losses[value])


def top1_of(ends: Iterable[Mapping[str, Any]]) -> Row:
    """Return the share of images whose class is the likeliest, of runs of several seeds."""
    shares = [end["val_top1"] or 0.0 for end in ends]
    return {
        "val_top1": statistics.fmean(shares),
        "top1_spread": max(shares) - min(shares),
        "top1_by_seed": shares,
    }


def train_table(recipe: Recipe, about: str) -> tuple[argparse.Namespace, list[Row]]:
    """Do what the command line asks: train a table's rows, write and show them.

    Args:
        about: the benchmark's docstring.
    """
    options = read_options(recipe, about)
    runs = JournaledRuns(
        options.journal, options.runs, options.data, again=options.again, known_only=options.known
    )
    bench = Bench(runs, (options.size, recipe.sizes[options.size]), options.seeds)
    rows_of = recipe.variants(options.table, options.steps)
    chosen = [variant for variant in rows_of if re.search(options.only, variant.words)]
    if options.known:
        rows = list(bench.known_rows(chosen))
    else:
        with ThreadPoolExecutor(options.workers) as pool:
            rows = list(pool.map(bench.row, chosen))
    if not options.again:
        write(recipe, options, runs, rows)
    show(options, rows)
    return options, rows


def read_options(recipe: Recipe, about: str) -> argparse.Namespace:
    tables = "\n".join(f"    {letter}    {words}" for letter, words in recipe.tables.items())
    journal = RESULTS / f"{recipe.name}-runs.jsonl"
    parser = argparse.ArgumentParser(
        description=f"{about}\ntables:\n{tables}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", choices=list(recipe.tables), required=True)
    parser.add_argument("--data", type=Path, required=True, help="a prepared set")
    parser.add_argument("--runs", type=Path, default=Path("runs", recipe.name))
    parser.add_argument("--journal", type=Path, default=journal)
    parser.add_argument("--size", choices=recipe.sizes, default=next(iter(recipe.sizes)))
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(recipe.seeds))
    parser.add_argument("--only", default="", help="rows whose 'MODEL OPTIMIZER STEPSxROWS' has it")
    parser.add_argument("--workers", type=int, default=1, help="rows trained at a time")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--again", action="store_true", help="train all again, and compare")
    what.add_argument("--known", action="store_true", help="train nothing: rows as far as they are")
    parser.add_argument("--out", type=Path, help="JSON (default: results/NAME-TABLE-....json)")
    return parser.parse_args()


def write(
    recipe: Recipe, options: argparse.Namespace, runs: JournaledRuns, rows: list[Row]
) -> None:
    words = (recipe.name, options.table, options.size, options.steps, options.data.name)
    module = recipe.name.replace("-", "_")
    result = {
        "table": options.table,
        "size": options.size,
        "steps": options.steps,
        "command": f"python -m benchmarks.{module} {' '.join(sys.argv[1:])}",
        "commit": runs.commit,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, 1 thread a run",
        "data": runs.set.id,
        "rows": rows,
    }
    path = options.out or RESULTS / f"{'-'.join(map(str, words))}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


def show(options: argparse.Namespace, rows: list[Row]) -> None:
    table = Table(title=f"table {options.table}, {options.size} weights")
    for column in columns(rows):
        table.add_column(column, justify="left" if column in ("model", "optimizer") else "right")
    for row in ranked(rows):
        table.add_row(*cells(row))
    Console().print(table)


def columns(rows: Sequence[Row]) -> list[str]:
    """Return the names of what `cells` gives."""
    names = ["model", "optimizer", "steps x rows", "best lr", "decay", "validation loss"]
    names += ["top-1"] if any("val_top1" in row for row in rows) else []
    return [*names, "lr within 0.05 nats"]


def ranked(rows: Iterable[Row]) -> list[Row]:
    """Return rows by model and by how much was seen, the best first."""
    return sorted(rows, key=lambda row: (row["model"], row[unit_of(row)], row["val_loss"]))


def unit_of(row: Row) -> str:
    """Return what a row's runs were counted in."""
    return "images" if "images" in row else "tokens"


def cells(row: Row) -> list[str]:
    """Return a row as people read it: means over seeds, with highest - lowest of how many."""
    count = len(row["seeds"])

    def spread(difference: str) -> str:
        return f" ({difference}, {count} seeds)" if count > 1 else " (1 seed)"

    found = [
        row["model"],
        row["optimizer"],
        f"{row['steps']:,} x {row['batch']}",
        f"{row['lr']:g}",
        f"{row['weight_decay']:g}",
        f"{row['val_loss']:.4f}{spread(format(row['spread'], '.4f'))}",
    ]
    if "val_top1" in row:
        points = f"{100 * row['top1_spread']:.2f}"
        found.append(f"{100 * row['val_top1']:.2f} %{spread(points)}")
    width, least = row["within_0.05_nats"], "at least " if row["width_is_cut"] else ""
    return [*found, f"{least}x {width:.3g}" if width else "-"]
