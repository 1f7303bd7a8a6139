"""Go over to another stage of a run (`train.stages`)."""

from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.setup import Training


class StageBegins(Hook):
    """Before a stage's first step, and at a start inside of it: what is not in the batches.

    Those change by themselves (:mod:`dnt_scale.train.stages`), learning rates by the schedule.
    """

    def before_training(self, run: Training) -> None:
        """Take the micro-batch of the stage that the run is in."""
        run.engine.micro_batch = run.stage.run.train.rows_a_forward

    def waits_after(self, run: Training, number: int) -> bool:
        """Say so of a stage's last step: the guard forgets it too."""
        return number == run.stages.at(number - 1).span.end

    def before_step(self, run: Training) -> None:
        """Take the stage's micro-batch, tell of it, and let the guard forget the stage before: its
        losses and norms say little of other data and batches.
        """
        stage = run.stage
        if not stage.span.name or run.state.step != stage.span.begin:
            return
        run.engine.micro_batch = stage.run.train.rows_a_forward
        run.guard.forget()
        span, unit = stage.span, stage.source.unit.name
        run.progress.say(
            f"stage {span.name}: steps {span.begin + 1:,} to {span.end:,} of "
            f"{span.global_batch:,} rows of {span.a_row:,} {unit}; "
            f"{'; '.join(stage.source.describe())}"
        )
