import json
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

from data_prep.options import PrepareOptions
from data_prep.pipeline import prepare
from testbed.corpus import python_source_files
from testbed.run import complete_checkpoints, stop_midway, tiny, train
from tests.helpers.once import Once


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The tensors are tiny: more threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def packed(corpus: Path, once: Once) -> Path:
    """A set of packing "best_fit" with the tokenizer and row length of `corpus`, to be read only.

    Most documents take more than half a row, so that there is padding; some are shorter, some
    longer than a row.
    """

    def make(folder: Path) -> None:
        text = "\n\n".join(path.read_text() for path in python_source_files(300_000))
        long = [part for part in text.split("\n\n") if len(part) > 150]
        sizes = [10_000, 100, 100, 30, 100]
        paragraphs = [part[: sizes[number % len(sizes)]] for number, part in enumerate(long)]
        (folder / "paragraphs.jsonl").write_text(
            "".join(json.dumps({"text": part}) + "\n" for part in paragraphs)
        )
        prepare(
            PrepareOptions(
                inputs=[folder / "paragraphs.jsonl"],
                out=folder / "set",
                tokenizer=corpus / "tokenizer.model",
                seq_len=64,
                packing="best_fit",
                val_fraction=0.1,
                workers=1,
            ),
            Console(quiet=True),
        )

    return once("packed", make) / "set"


@pytest.fixture(scope="session")
def mixed(corpus: Path, packed: Path) -> list[str]:
    """Overrides of a run on two sets, two rows of `corpus` to one of `packed`."""
    sets = {"docs": (corpus, 2), "packed": (packed, 1)}
    entries = (
        f"data.mixture.{name}={{path: {path}, weight: {weight}}}"
        for name, (path, weight) in sets.items()
    )
    return ["data.path=null", *entries]


@pytest.fixture(scope="session")
def mixed_run(mixed: list[str], once: Once) -> Path:
    """The folder of a run on `mixed` with documents masked: 6 steps, stopped at 3. To be read
    only.
    """

    def make(folder: Path) -> None:
        overrides = tiny(
            Path(),
            folder / "tiny",
            *mixed,
            "data.document_mask=true",
            "eval.every=2",
            "optim.schedule.name=constant",
        )
        for steps in (3, 6):
            train([*overrides, f"train.steps={steps}"]).ok()

    return once("mixed", make) / "tiny"


@pytest.fixture(scope="session")
def killed(corpus: Path, once: Once) -> Path:
    """The folder of a run on 2 ranks, killed between its first checkpoint and its end. To be
    read only.
    """

    def make(folder: Path) -> None:
        run_dir = folder / "tiny"
        overrides = tiny(corpus, run_dir, "checkpoint.every=3", "checkpoint.background=false")
        stopped = stop_midway(overrides, run_dir, lambda group: group.kill(signal.SIGKILL), after=4)
        assert set(stopped.codes) == {-signal.SIGKILL}
        assert complete_checkpoints(run_dir)

    return once("killed", make) / "tiny"
