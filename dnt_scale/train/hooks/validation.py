"""Measure the loss on held-out rows."""

from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.setup import Step, Training
from dnt_scale.train.validation import validation


class Validation(Hook):
    """Validates before a new run's first step, every ``eval.every`` steps, and after the last."""

    def before_step(self, run: Training) -> None:
        """Measure the loss of the initial weights, as a line of its own at step 0."""
        if run.state.step == 0 and run.newest is None and run.config.eval.every:
            with run.clock.spending("eval"):
                metrics = validation(run.config, run.engine, run.source, run.ranks)
            run.report(metrics)

    def due(self, run: Training, number: int) -> bool:
        """Say whether to validate after step ``number``."""
        every = run.config.eval.every
        return bool(every) and (number % every == 0 or number == run.total_steps)

    def waits_after(self, run: Training, number: int) -> bool:
        """Say so where it validates."""
        return self.due(run, number)

    def after_step(self, run: Training, step: Step) -> None:
        """Add the held-out rows' loss to the step's line."""
        if self.due(run, step.number):
            with run.clock.spending("eval"):
                step.metrics |= validation(run.config, run.engine, run.source, run.ranks)
