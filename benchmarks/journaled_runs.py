"""Small training runs whose results are kept, so that no run is trained twice.

A run is `python -m dnt_scale.train` on one thread. What it gave is a line of a journal, a file that
is committed: a run in it is not trained again, and one that was stopped goes on.
"""

import datetime
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from dnt_scale.record.files import git_commit
from dnt_scale.record.metrics_file import METRICS, whole_lines

COMMON = [
    "train.dtype=fp32",
    "checkpoint.every=1000",
    "checkpoint.keep=1",
    "tracking.enabled=false",
]
# glibc keeps large blocks: else a quarter of a small run's time goes to the kernel's pages
KEEP_BLOCKS = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}


class PreparedSet(NamedTuple):
    """What runs on a set have to know of it.

    id: its folder's name and a hash of what is in it.
    unit: what its rows are counted in, tokens or images.
    a_row: units a row.
    overrides: of a run that reads and validates on it.
    """

    id: str
    unit: str
    a_row: int
    overrides: list[str]


def prepared_set(folder: Path) -> PreparedSet:
    """Read the manifest of a set made by `dnt data prepare` or `dnt data images`.

    Raises:
        OSError: there is none.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["format"] == "dnt-images":
        identity: list[Any] = [manifest["classes"], manifest["splits"]]
        unit, a_row = "images", 1
        overrides = [
            "data=images",
            f"model.classes={len(manifest['classes'])}",
            "eval.rows=null",  # the whole split, as top-1 is reported
        ]
    else:
        identity = [manifest["tokenizer"]["sha256"], manifest["splits"]]
        unit, a_row = "tokens", manifest["seq_len"]
        overrides = [
            f"model.vocab_size={manifest['tokenizer']['vocab_size']}",
            f"model.context={a_row}",
            "eval.rows=1600",
        ]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return PreparedSet(f"{folder.name} {digest[:12]}", unit, a_row, overrides)


class NotRun(LookupError):
    """A run that the journal has not got."""


class JournaledRuns:
    """Runs on one set of data; safe among threads.

    Args:
        journal: JSON lines, made if need be.
        folder: of the runs' folders.
        data: a set made by `dnt data prepare` or `dnt data images`.
        again: train what the journal has too, and say where it gives another loss.
        known_only: train nothing.
    """

    def __init__(
        self,
        journal: Path,
        folder: Path,
        data: Path,
        *,
        again: bool = False,
        known_only: bool = False,
    ) -> None:
        self.journal, self.folder, self.data = journal, folder.absolute(), data.absolute()
        self.again, self.known_only = again, known_only
        self.set = prepared_set(data)
        self.commit = git_commit()
        lines = journal.read_text().splitlines() if journal.exists() else []
        self._runs = {self._key(run): run for run in map(json.loads, lines)}
        self._lock = Lock()

    @staticmethod
    def _key(run: dict[str, Any]) -> frozenset[str]:
        return frozenset([run["data"], *run["overrides"]])

    def loss(self, words: Sequence[object], overrides: Sequence[str], steps: int) -> float:
        """Return a run's validation loss at its last step; infinite if it failed. See `result`."""
        return self.result(words, overrides, steps)["val_loss"] or math.inf

    def result(
        self, words: Sequence[object], overrides: Sequence[str], steps: int
    ) -> dict[str, Any]:
        """Return the journal's line of a run, trained now or before.

        Args:
            words: that name it.
            overrides: what it is made of, but for its length, and what all runs have.

        Raises:
            NotRun: the journal has it not, and nothing is to be trained.
        """
        every = max(1, steps // 8)
        length = [f"train.steps={steps}", f"eval.every={every}"]
        made_of = [*overrides, *self.set.overrides, *length, *COMMON]
        name = "-".join(re.sub(r"[^\w.]+", "_", str(word)) for word in words)
        known = self._runs.get(frozenset([self.set.id, *made_of]))
        if known is None and self.known_only:
            raise NotRun(name)
        if known is None or self.again:
            print(f"{name} ...", flush=True)
            run = self._train(name, made_of)
            print(f"{name}: {run['val_loss'] or 'failed'} ({run['seconds']} s)", flush=True)
            if known is None:
                self._add(run)
            elif known["val_loss"] != run["val_loss"]:
                print(f"{name}: the journal has {known['val_loss']}", flush=True)
            known = known or run
        return known

    def _add(self, run: dict[str, Any]) -> None:
        with self._lock, self.journal.open("a") as file:
            self._runs[self._key(run)] = run
            file.write(json.dumps(run) + "\n")

    def _train(self, name: str, overrides: list[str]) -> dict[str, Any]:
        """Train a run, or go on with one that was stopped.

        Raises:
            KeyboardInterrupt: it was stopped by a signal.
        """
        folder = self.folder / (f"{name}-again" if self.again else name)
        places = [f"data.path={self.data}", f"run.name={name}", f"run.dir={folder}"]
        environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            **KEEP_BLOCKS,
            "CUDA_VISIBLE_DEVICES": "",
        }
        folder.parent.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        with folder.with_name(f"{folder.name}.log").open("ab") as out:
            command = [sys.executable, "-m", "dnt_scale.train", *overrides, *places]
            code = subprocess.run(command, env=environment, stdout=out, stderr=out).returncode
        if code in (-2, -15, 130, 143):
            raise KeyboardInterrupt
        lines = whole_lines(folder / METRICS)
        losses = {str(line["step"]): line["val/loss"] for line in lines if "val/loss" in line}
        kept = ("val/loss", "train/loss", *(["val/top1"] if self.set.unit == "images" else []))
        ends = {name.replace("/", "_"): None if code else lines[-1][name] for name in kept}
        return {
            "run": name,
            "data": self.set.id,
            "overrides": overrides,
            "commit": self.commit,
            "date": datetime.date.today().isoformat(),
            "seconds": round(time.monotonic() - begin),
            **ends,
            "val_losses": losses,
        }
