"""Let all ranks know what any of them has met: the one exchange that every step has."""

from signal import Signals

from dnt_scale.distributed.agree import highest, on_first
from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.setup import Step, Training


class Agreement(Hook):
    """Agrees on the signal that ends a run, on writers still at work, and on a line not written."""

    def after_step(self, run: Training, step: Step) -> None:
        """Exchange three numbers, and end the run where rank 0 could not write the step's line.

        Raises:
            AgreedError: the line could not be written; a checkpoint that was begun is in place
            then.
        """
        received = run.signals[0] if run.signals else 0
        run.stopped_by, writing, failed = highest(
            received, run.saver.busy, run.unwritten is not None
        )
        step.writing = bool(writing)
        if run.stopped_by:  # A checkpoint and MLflow may take half a minute.
            name = Signals(run.stopped_by).name
            run.progress.say(f"{name}: stopping, with a checkpoint of step {step.number}")
        if failed:
            # A checkpoint that was begun is whole then, or there is a better reason to end.
            run.saver.commit(wait=True)
            on_first(run.ranks, lambda: raise_unwritten(run))


def raise_unwritten(run: Training) -> None:
    """Raise the error of a line that could not be written, if there is one."""
    if run.unwritten is not None:
        raise run.unwritten
