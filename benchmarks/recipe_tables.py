"""What the tables of recipe.py train: models, optimizers and their grids, as data."""

from collections.abc import Iterator
from typing import NamedTuple

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
TABLES = {
    "a": "{GPT S1, DNT S4, DNT S5} x every optimizer",
    "b": "S1 to S5 under vanilla mSGDW and muon_normalized",
    "c": "muon_normalized with one of its parts left out or another way",
    "d": "AdamW, muon_normalized, normalized and mSGDW at 1/4, 1 and 4 times --steps, and at other "
    "batches",
    "e": "with and without clipping and a gradient buffer",
    "f": "AdamW, muon_normalized, normalized and mSGDW, for other --data",
}
ROWS_A_STEP = 32


class Optimizer(NamedTuple):
    """What is tried of one of configs/optim.

    lr: the first value of its grid, the middle of five.
    decay: its weight decay; a third and three times as much are tried at the best learning rate, on
        while it helps, and none. 0: only that.
    overrides: what else is not as in its file.
    keys: what the grid sets, if not the learning rate.
    """

    lr: float
    decay: float
    overrides: tuple[str, ...] = ()
    keys: tuple[str, ...] = ("optim.lr",)


# AdamW's best learning rate at 1,600 steps, for what AdamW trains beside another rule
BESIDE = 1.6e-2
OPTIMIZERS = {
    "adamw": Optimizer(1.6e-2, 0.1),
    "muon_normalized": Optimizer(3e-3, 0.1),
    "normalized": Optimizer(3e-3, 0.1),
    "rmnp": Optimizer(0.02, 0.1),
    "rmnp_adam_gains": Optimizer(0.02, 0.1),
    "msgdw": Optimizer(0.3, 1e-4),
    "msgdw_r": Optimizer(1.0, 1e-4),
    "msgdw_adam": Optimizer(1.0, 1e-4, (f"optim.groups.rest.lr={BESIDE}",)),
    "sgd_ll": Optimizer(2e-3, 0.0, keys=("optim.groups.head.limit", "optim.groups.rest.limit")),
    "lion": Optimizer(2e-3, 0.6),
    "signum": Optimizer(2e-3, 0.6),
    "muon": Optimizer(1.6e-2, 0.1, (f"optim.groups.rest.lr={BESIDE}",)),
}
EMBEDDING = r"^(tok_emb|head)\.weight$"


def apart(name: str, pattern: str, settings: str) -> list[str]:
    """Return the override that gives some matrices but hidden ones a group of their own."""
    return [f"+optim.groups.{name}={{pattern: '{pattern}', {settings}}}"]


COMPARED = ("adamw", "muon_normalized", "normalized", "msgdw")
PARTS = {  # of the recipe, optim=muon_normalized
    "whole": [],
    "no Nesterov": ["optim.nesterov=false"],
    "momentum 0.9": ["optim.momentum=0.9", "optim.dampening=0.9"],
    "hidden by rows and columns": [
        "optim.groups.hidden.update=row_column_normalized",
        "~optim.groups.hidden.scale",
    ],
    "embedding by rows": apart("embedding", EMBEDDING, "update: row_normalized, lr: 0.02"),
    "embedding as a whole": apart("embedding", EMBEDDING, "update: tensor_normalized"),
    "no decay on the embedding": apart(
        "embedding", EMBEDDING, "update: row_column_normalized, weight_decay: 0"
    ),
    "plain gains": ["optim.groups.gains.update=plain", "+optim.groups.gains.lr=1"],
    "gains by AdamW": [
        "+optim.groups.gains.optimizer={algorithm: adamw}",
        f"+optim.groups.gains.lr={BESIDE}",
        "optim.groups.gains.update=plain",
    ],
    "fixed norms": ["+optim.groups.hidden.fixed_norm=true"],
    "down to 0": ["optim.schedule.final=0"],
}
NO_BUFFER = ["optim.nesterov=false", "optim.gradient_buffer=false", "optim.clip_norm=null"]
CLIPPING = {
    "clipped": [],
    "not clipped": ["optim.clip_norm=null"],
    "no gradient buffer": NO_BUFFER,
}


class Variant(NamedTuple):
    """A row of a table: what it trains, but for learning rate and seed."""

    model: str
    optimizer: str
    overrides: list[str]
    grid: Optimizer
    steps: int
    batch: int = ROWS_A_STEP
    micro_batch: int = ROWS_A_STEP  # at most

    @property
    def words(self) -> str:
        """Return its name, as --only reads it."""
        return f"{self.model} {self.optimizer} {self.steps}x{self.batch}"


def variant(
    model: str,
    optimizer: str,
    steps: int,
    *,
    part: str = "",
    changes: list[str] | None = None,
    batch: int = ROWS_A_STEP,
) -> Variant:
    """Return a row, whose model may be a setting of DNT."""
    shape = MODELS.get(model) or ["model=dnt_nano", f"model.setting={model.split()[1]}"]
    grid = OPTIMIZERS[optimizer]
    overrides = [*shape, f"optim={optimizer}", *grid.overrides, *(changes or [])]
    name = f"{optimizer}, {part}" if part else optimizer
    return Variant(model, name, overrides, grid, steps, batch)


def variants(table: str, steps: int) -> Iterator[Variant]:
    """Yield a table's rows.

    Args:
        steps: of a run; table d has a quarter and four times as many as well.
    """
    if table in ("a", "f"):
        models = MODELS if table == "a" else ["DNT S4"]
        optimizers = list(OPTIMIZERS) if table == "a" else COMPARED
        yield from (variant(model, name, steps) for model in models for name in optimizers)
    elif table == "b":
        for setting in ("S1", "S2", "S3", "S4", "S5"):
            for name in ("msgdw", "muon_normalized"):
                yield variant(f"DNT {setting}", name, steps)
    elif table == "c":
        for part, changes in PARTS.items():
            yield variant("DNT S4", "muon_normalized", steps, part=part, changes=changes)
    elif table == "d":
        for times in (0.25, 1, 4):  # at the batch of the other tables
            for name in COMPARED:
                yield variant("DNT S4", name, int(steps * times))
        for times in (0.25, 4, 16):  # as many tokens
            for name in COMPARED:
                batch = int(ROWS_A_STEP * times)
                yield variant("DNT S4", name, int(steps / times), batch=batch)
    else:
        for name in ("msgdw", "muon_normalized"):
            for part, changes in CLIPPING.items():
                yield variant("DNT S4", name, steps, part=part, changes=changes)
