"""Keep a copy in memory to go back to, with ``health.spike: rollback``."""

from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.setup import Step, Training


class Snapshots(Hook):
    """Lets the guard take a snapshot where one is due; the run's first is taken with its parts."""

    def waits_after(self, run: Training, number: int) -> bool:
        """Say so where one is due."""
        return run.guard.snapshot_due(number)

    def after_step(self, run: Training, step: Step) -> None:
        """Take a snapshot at every checkpoint, and every ``health.snapshot_every`` steps."""
        run.guard.keep(step.number, run.engine, at_checkpoint=step.saved)
