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
from typing import Any

from dnt_scale.record.files import git_commit
from dnt_scale.record.metrics_file import METRICS, whole_lines

COMMON = [
    "train.dtype=fp32",
    "eval.rows=1600",
    "checkpoint.every=1000",
    "checkpoint.keep=1",
    "tracking.enabled=false",
]


class JournaledRuns:
    """Runs on one set of data; safe among threads.

    Args:
        journal: JSON lines, made if need be.
        folder: of the runs' folders.
        data: a set made by `dnt data prepare`.
        again: train what the journal has too, and say where it gives another loss.
    """

    def __init__(self, journal: Path, folder: Path, data: Path, *, again: bool = False) -> None:
        self.journal, self.folder, self.data = journal, folder.absolute(), data.absolute()
        self.again = again
        manifest = json.loads((data / "manifest.json").read_text())
        self.seq_len: int = manifest["seq_len"]
        self.shape = [
            f"model.vocab_size={manifest['tokenizer']['vocab_size']}",
            f"model.context={self.seq_len}",
        ]
        shards = json.dumps([manifest["tokenizer"]["sha256"], manifest["splits"]], sort_keys=True)
        self.data_id = f"{data.name} {hashlib.sha256(shards.encode()).hexdigest()[:12]}"
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
        """
        every = max(1, steps // 8)
        made_of = [*overrides, *self.shape, f"train.steps={steps}", f"eval.every={every}", *COMMON]
        name = "-".join(re.sub(r"[^\w.]+", "_", str(word)) for word in words)
        known = self._runs.get(frozenset([self.data_id, *made_of]))
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
        losses = {line["step"]: line["val/loss"] for line in lines if "val/loss" in line}
        return {
            "run": name,
            "data": self.data_id,
            "overrides": overrides,
            "commit": self.commit,
            "date": datetime.date.today().isoformat(),
            "seconds": round(time.monotonic() - begin),
            "val_loss": None if code else losses[lines[-1]["step"]],
            "train_loss": None if code else lines[-1]["train/loss"],
            "val_losses": losses,
        }
