"""Make the tables and pictures of docs/results.md out of results/recipe-*.json and
results/image-recipe-*.json.

    python -m benchmarks.recipe_page            # write them
    python -m benchmarks.recipe_page --check    # exit status 1 if the page's tables are others

Tables stand between two comments of the page for each benchmark; all else on it is written by hand.
What a table has not got yet is listed. The pictures, docs/results/*.png, are drawn as `dnt report`
draws: losses over what was seen, of each optimizer's best runs with a band over seeds, and final
losses against the learning rate. docs/one-buffer.png, the README's, is AdamW beside the recipe in
table a at recipe.py's default --steps.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import image_recipe, recipe
from benchmarks.recipe_bench import RESULTS, Recipe, Row, cells, columns, ranked, unit_of
from dnt_scale.config import load
from dnt_scale.report.figures import Line, draw_against, draw_curves
from dnt_scale.report.groups import Group
from dnt_scale.report.runs import Run
from dnt_scale.report.sensitivity import sensitivity
from docs.make.wrap import wrapped

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "results.md"
PICTURES = DOCS / "results"
RECIPES = (recipe.RECIPE, image_recipe.RECIPE)
CLAIM = DOCS / "one-buffer.png"
CLAIMED = ("adamw", "muon_normalized")  # what it compares
END = "<!-- end -->\n"
NOTHING = (np.array([]), np.array([]))

Result = Mapping[str, Any]  # what a benchmark wrote of a table


class Pictured(NamedTuple):
    """Rows that make a pair of pictures: optimizers on one model, as long and at one batch.

    name: of the files, without `-loss.png` and `-lr.png`.
    """

    name: str
    title: str
    rows: list[Row]


def results_of(each: Recipe) -> dict[str, Result]:
    """Return what a benchmark wrote of its tables, by the files' names."""
    return {path.stem: json.loads(path.read_text()) for path in RESULTS.glob(f"{each.name}-*.json")}


def page(written: str, results: Mapping[str, Mapping[str, Result]]) -> str:
    """Return the page's text with the benchmarks' tables in it.

    Args:
        written: the page as it is.
        results: by the benchmark's name, then by the file's.

    Raises:
        ValueError: the page has not both comments of a benchmark.
    """
    for each in RECIPES:
        begin = f"<!-- {each.name}: made by benchmarks.recipe_page -->\n"
        before, found, rest = written.partition(begin)
        _, end, after = rest.partition(END)
        if not (found and end):
            raise ValueError(f"{PAGE.name}: no {begin.strip()} ... {END.strip()}; write both")
        parts = "\n".join(sections(each, results[each.name]))
        written = f"{before}{begin}\n{parts}\n{END}{after}"
    return wrapped(written)


def sections(each: Recipe, results: Mapping[str, Result]) -> Iterator[str]:
    """Yield a benchmark's tables in Markdown, and what was not run."""
    for name, result in sorted(results.items()):
        yield table(each, name, result)
    known = {result["table"] for result in results.values()}
    if left := {letter: words for letter, words in each.tables.items() if letter not in known}:
        lines = "".join(f"- {letter}: {words}\n" for letter, words in left.items())
        yield f"Tables that were not run yet:\n\n{lines}"


def table(each: Recipe, name: str, result: Result) -> str:
    """Return a table with its pictures, and the rows that it lacks."""
    letter, rows = result["table"], ranked(result["rows"])
    names = columns(rows)
    commit, _, dirty = result["commit"].partition("-")
    lines = [
        f"Table {letter}, {each.tables[letter]}, {result['size']} weights: `{result['command']}` "
        f"at {commit[:7]}{dirty and f' ({dirty})'}, {result['date']}, data {result['data']}.\n",
        f"| {' | '.join(names)} |",
        "|" + "---|" * len(names),
        *(f"| {' | '.join(cells(row))} |" for row in rows),
    ]
    there = {words_of(row) for row in rows}
    if begun := [f"{words_of(row)} ({row['runs_missing']})" for row in rows if row["runs_missing"]]:
        lines.append(f"\nRows with runs still missing, and how many: {', '.join(begun)}.")
    left: dict[str, list[str]] = {}  # optimizers by all else
    for variant in each.variants(letter, result["steps"]):
        if variant.words not in there:
            kind = f"{variant.model}, {variant.steps:,} x {variant.batch}"
            left.setdefault(kind, []).append(variant.optimizer)
    if left:
        lines.append("\nRows that were not run yet:\n")
        lines += [f"- {kind}: {', '.join(names)}" for kind, names in left.items()]
    for drawn in pictured(name, rows):
        for kind in ("loss", "lr"):
            lines.append(f"\n![{drawn.title}]({PICTURES.name}/{drawn.name}-{kind}.png)")
    return "\n".join(lines) + "\n"


def words_of(row: Row) -> str:
    """Return a row's name, as benchmarks' --only reads it."""
    return f"{row['model']} {row['optimizer']} {row['steps']}x{row['batch']}"


def pictured(name: str, rows: Sequence[Row]) -> Iterator[Pictured]:
    """Yield what is drawn of a result: nothing of a single row."""
    keys = dict.fromkeys((row["model"], row["steps"], row["batch"]) for row in rows)
    for model, steps, batch in keys:
        key = (model, steps, batch)
        own = [row for row in rows if (row["model"], row["steps"], row["batch"]) == key]
        if len(own) > 1:
            words = f"{name}-{model}-{steps}x{batch}".replace(" ", "-")
            yield Pictured(words, f"{model}, {steps:,} steps of {batch} rows", own)


def draw(each: Pictured, folder: Path) -> list[Path]:
    """Draw a pair of pictures and return their paths."""
    curves_path, lr_path = (folder / f"{each.name}-{kind}.png" for kind in ("loss", "lr"))
    draw_curves([curves(row) for row in each.rows], each.title, curves_path)
    unit = unit_of(each.rows[0])
    draw_against([against(row) for row in each.rows], "learning rate", unit, each.title, lr_path)
    return [curves_path, lr_path]


def draw_claim(rows: Sequence[Row]) -> Path | None:
    """Draw two optimizers on DNT S4 with what their state takes, if all have as many seeds."""
    found = [row for row in rows if row["model"] == "DNT S4" and row["optimizer"] in CLAIMED]
    if len(found) < len(CLAIMED) or len({len(row["seeds"]) for row in found}) > 1:
        return None
    groups = []
    for row in found:
        chosen = [f"optim={row['optimizer']}", "run.name=unused", "data.path=unused"]
        state = f"{load(chosen).optim.bytes_a_weight} bytes of state a weight"
        groups.append(Group({"optim": f"{row['optimizer']}\n{state}"}, curves(row).runs))
    title = f"One buffer and two: DNT, {found[0]['steps']:,} steps of {found[0]['batch']} rows"
    return draw_curves(groups, title, CLAIM)


def curves(row: Row) -> Group:
    """Return an optimizer's runs at its best learning rate, one a seed."""
    unit, steps, runs = unit_of(row), row["steps"], []
    for seed, losses in zip(row["seeds"], row["losses_by_step"], strict=True):
        seen = np.array([int(step) for step in losses]) * (row[unit] // steps)
        runs.append(
            Run(
                name=f"seed {seed}",
                folder=Path(),
                settings={},
                unit=unit,
                train=NOTHING,
                val=(seen, np.array(list(losses.values()))),
                units=row[unit],
                steps=steps,
                seconds=0,
                state="finished" if str(steps) in losses else "failed",
            )
        )
    return Group({"optim": row["optimizer"], "lr": row["lr"]}, runs)


def against(row: Row) -> Line:
    """Return an optimizer's losses against its learning rates."""
    rates = [float(lr) for lr in row["losses_by_lr"]]
    losses = list(row["losses_by_lr"].values())
    shown = [loss if math.isfinite(loss) else math.nan for loss in losses]
    failed = [not math.isfinite(loss) for loss in losses]
    return Line(row["optimizer"], rates, shown, shown, shown, failed, sensitivity(rates, losses))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args()
    results = {each.name: results_of(each) for each in RECIPES}
    written = PAGE.read_text("utf-8")
    made = page(written, results)
    if options.check:
        if made != written:
            raise SystemExit(f"{PAGE.name} is out of date: python -m benchmarks.recipe_page")
        return
    PAGE.write_text(made, "utf-8")
    print(PAGE)
    for found in results.values():
        for name, result in found.items():
            claims = result["table"] == "a" and result["steps"] == recipe.RECIPE.steps
            if claims and (claim := draw_claim(result["rows"])):
                print(claim)
            for each in pictured(name, ranked(result["rows"])):
                print(*draw(each, PICTURES), sep="\n")


if __name__ == "__main__":
    main()
