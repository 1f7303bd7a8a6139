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

    def after_step(self, run: Training, step: Step) -> None:
        """Add the held-out rows' loss to the step's line."""
        every = run.config.eval.every
        if every and (step.number % every == 0 or step.last):
            with run.clock.spending("eval"):
                step.metrics |= validation(run.config, run.engine, run.source, run.ranks)
