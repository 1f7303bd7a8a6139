"""Undo a bad step, with ``health.spike: rollback``."""

from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.setup import Step, Training


class Rollback(Hook):
    """Lets the guard go back to its snapshot, before anything measures or saves the weights."""

    reads_numbers = True

    def after_step(self, run: Training, step: Step) -> None:
        """Undo the step where it was bad; `BadSteps` tells of it once it is on record."""
        run.guard.undo(run.engine)
