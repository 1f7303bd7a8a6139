"""Collect Python's garbage at fixed steps only, on all ranks at the same one.

Python looks for objects that refer to each other in a circle whenever it has made some hundred more
than it has freed. That takes a rank from a millisecond to half a second, each at a step of its own,
and all others wait for it: on 64 ranks most steps have one that waits. Tensors are freed as before,
as soon as nobody refers to them.
"""

import gc

from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.setup import Step, Training


class GarbageCollection(Hook):
    """Turns automatic collection off for a run, and collects every ``garbage.every`` steps."""

    def __init__(self) -> None:
        self.disabled = False
        self.frozen = False

    def before_training(self, run: Training) -> None:
        """Collect once, and leave what is alive now, and stays, out of the collections to come."""
        if run.config.garbage.every:
            self.disabled = gc.isenabled()
            gc.collect()
            gc.disable()
            if not gc.get_freeze_count():  # what others have frozen would be thawed with it
                gc.freeze()
                self.frozen = True

    def after_step(self, run: Training, step: Step) -> None:
        """Collect where it is due."""
        if run.config.garbage.every and step.number % run.config.garbage.every == 0:
            gc.collect()

    def close(self, run: Training) -> None:
        """Leave the collector as it was."""
        if self.frozen:
            gc.unfreeze()
        if self.disabled:
            gc.enable()
