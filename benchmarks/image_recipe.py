"""One buffer against two on images: V-DNT and ViT, each optimizer at its own best learning rate.

    dnt data images data/images-idx --val "$(ls data/images-idx/t10k-images*)" \\
        --out data/fashion-mnist                     # IDX files; `make demo-images` fetches them
    python -m benchmarks.image_recipe --table a --data data/fashion-mnist
    python -m benchmarks.image_recipe --table b --data data/fashion-mnist

All runs see the same images in the same order, as often, without augmentation. Learning rates and
weight decays are looked for as in recipe.py, by the validation loss of the first of the --seeds;
the best has all of them. Loss and top-1 are those of the whole validation split at the last step.
A table ends with the command that draws gradients of its models, trained with mSGDW, beside each
other: `dnt diagnose` on the runs.

Runs are kept in results/image-recipe-runs.jsonl (journaled_runs.py): none in it is trained again,
but by --again, which compares; the same command goes on after any stop. `--help` lists the tables,
recipe_page.py puts them on a page.
"""

from collections.abc import Iterator

from benchmarks.recipe_bench import Recipe, train_table
from benchmarks.recipe_tables import Optimizer, Variant

SIZES = {  # by about how many weights they have with 10 classes
    "0.2M": ["model.layers=3", "model.width=64", "model.heads=2", "model.patch_size=7"],
}
IMAGES = ["data.augment=none", "data.center=1.0", "data.workers=0"]
SETTINGS = ("S1", "S2", "S3", "S4", "S5")
MODELS = {
    "ViT S1": ["model=vit_tiny"],
    **{f"V-DNT {each}": ["model=vdnt_tiny", f"model.setting={each}"] for each in SETTINGS},
}
OPTIMIZERS = {
    "adamw": Optimizer(1e-3, 0.1),
    "msgdw": Optimizer(2**-5, 1e-4),
    "muon_normalized": Optimizer(1.5e-3, 0.9),
}
TABLES = {
    "a": "{ViT S1, V-DNT S4, V-DNT S5} x {AdamW, vanilla mSGDW, muon_normalized}",
    "b": "V-DNT S1 to S5 under vanilla mSGDW and muon_normalized",
}
IMAGES_A_STEP = 64


def variants(table: str, steps: int) -> Iterator[Variant]:
    """Yield a table's rows."""
    models = ["ViT S1", "V-DNT S4", "V-DNT S5"] if table == "a" else list(MODELS)[1:]
    for model in models:
        for name in OPTIMIZERS if table == "a" else ("msgdw", "muon_normalized"):
            yield Variant(
                model,
                name,
                [*MODELS[model], *IMAGES, f"optim={name}"],
                OPTIMIZERS[name],
                steps,
                batch=IMAGES_A_STEP,
                micro_batch=IMAGES_A_STEP,
            )


RECIPE = Recipe("image-recipe", TABLES, variants, SIZES, steps=1000, seeds=[1, 2, 3])


def main() -> None:
    options, rows = train_table(RECIPE, __doc__)
    if drawn := [row["runs"][0] for row in rows if row["optimizer"] == "msgdw"]:
        folders = " ".join(str(options.runs / run) for run in drawn)
        out = f"docs/results/{RECIPE.name}-{options.table}"
        print(f"dnt diagnose {folders} --batches 8 --out {out}")


if __name__ == "__main__":
    main()
