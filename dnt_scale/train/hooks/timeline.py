"""Tell :mod:`dnt_scale.record.timeline` how far the run is, and where its seconds went."""

from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.setup import Step, Training


class Timeline(Hook):
    """Tells of the beginning of training, of its progress now and then, and of its end."""

    def before_training(self, run: Training) -> None:
        """Tell that the first step may begin."""
        steps = run.total_steps
        run.clock.tell(
            "ready",
            step=run.state.step,
            restored=round(run.restored_s, 3),
            of={"step": steps, run.unit.name: run.stages.units_at(steps)},
        )

    def after_step(self, run: Training, step: Step) -> None:
        """Tell the seconds so far, where it is time to."""
        run.clock.progress(step.number)

    def close(self, run: Training) -> None:
        """Tell the last of it, before MLflow is told."""
        run.clock.progress(run.state.step, now=True)
        run.clock.tell("end", outcome=run.outcome, step=run.state.step)
