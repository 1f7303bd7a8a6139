"""Write down what each step was like: in metrics.jsonl, so in MLflow, and for whoever watches."""

from contextlib import suppress

from dnt_scale.record.plots import plot_run
from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.setup import Step, Training


class Records(Hook):
    """Reports every step, and ends the record with the run's outcome."""

    reads_numbers = True

    def after_step(self, run: Training, step: Step) -> None:
        """Write and show the step's line, with what was measured on the device during the step."""
        # What came with the loss is here; for what was measured in the update the host may wait.
        step.metrics |= {name: float(value) for name, value in step.stats.metrics.items()}
        run.report(step.metrics)

    def close(self, run: Training) -> None:
        """Draw the run's pictures, and tell MLflow how it ended."""
        if run.tracker:
            # Without a loss to draw, or on a full disk, what ended the run is told anyway.
            with suppress(ValueError, OSError):
                plot_run(run.config.run.dir)
            run.tracker.finish(run.outcome)
