"""One buffer against two: losses of optimizers on DNT and GPT, each at its own best learning rate.

    dnt data prepare TEXT... --out data/recipe --vocab-size 2048 --seq-len 128 --val-fraction 0.01
    python -m benchmarks.recipe --table a --data data/recipe
    python -m benchmarks.recipe --table a --data data/recipe --only 'DNT S4 (adamw|normalized) '

All runs of a table see the same rows in the same order. Each optimizer is trained at the learning
rates of a grid by factors of two, which grows while its best value lies at an end; then, at the
best one, with a third and three times the weight decay, on while it helps, and with none; then with
the other --seeds. A learning rate is `optim.lr`; groups with one of their own keep it. The loss is
that of the held-out rows at the last step.

Runs are kept in results/recipe-runs.jsonl (journaled_runs.py): none in it is trained again, but by
--again, which compares; the same command goes on after any stop. `--help` lists the tables,
recipe_page.py puts them on a page.
"""

from benchmarks.recipe_bench import Recipe, train_table
from benchmarks.recipe_tables import SIZES, TABLES, variants

RECIPE = Recipe("recipe", TABLES, variants, SIZES, steps=1600, seeds=[1])


def main() -> None:
    train_table(RECIPE, __doc__)


if __name__ == "__main__":
    main()
