"""Tell how long torch.compile took, once a start (``engine.compile``)."""

import os

from dnt_scale.engine import compiled
from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.setup import Step, Training


class Compilation(Hook):
    """Says it after the first step, in which blocks are compiled, or found in the cache."""

    def __init__(self) -> None:
        self.told = False

    def after_step(self, run: Training, step: Step) -> None:
        """Say it, on rank 0."""
        if self.told or not run.config.engine.compile:
            return
        self.told = True
        place = os.environ.get(compiled.CACHE, "a temporary folder")
        run.progress.say(
            f"engine.compile: {compiled.seconds():.0f} s until the first step was done; kept for "
            f"the next start in {place}"
        )
