"""Write checkpoints: every ``checkpoint.every`` steps, and after the step that ends the run."""

from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.setup import Step, Training


class Saving(Hook):
    """Begins checkpoints, and puts them in place once all ranks have written their parts."""

    def due(self, run: Training, number: int) -> bool:
        """Say whether a checkpoint of step ``number`` is due, whatever may end the run there."""
        every = run.config.checkpoint.every
        return bool(every) and number % every == 0

    def waits_after(self, run: Training, number: int) -> bool:
        """Say so where a checkpoint is due."""
        return self.due(run, number)

    def after_step(self, run: Training, step: Step) -> None:
        """Settle the checkpoint that every rank has written, and begin one where it is due."""
        if run.saver.pending and not step.writing:
            with run.clock.spending("save"):
                run.saver.commit()
        step.saved = self.due(run, step.number) or step.last or run.halted or bool(run.stopped_by)
        if step.saved:
            numbers = {"engine": run.engine.scalars(), "health": run.guard.state()}
            with run.clock.spending("save"):
                run.saver.save(run.state.model_copy(update=numbers), run.engine.shards())

    def after_training(self, run: Training) -> None:
        """Wait until the last checkpoint is in place."""
        with run.clock.spending("save"):
            run.saver.commit(wait=True)
