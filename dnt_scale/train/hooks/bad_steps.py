"""Act on a step whose loss or gradient is not as it should be."""

from functools import partial

from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.setup import Step, Training
from dnt_scale.train.spike_guard import HopelessRun


class BadSteps(Hook):
    """Lets the guard, which has judged the step, act on it (:mod:`dnt_scale.train.spike_guard`)."""

    reads_numbers = True

    def after_step(self, run: Training, step: Step) -> None:
        """Tell of a bad step, and write down where its rows lie.

        Raises:
            HopelessRun: too many steps in a row were lost; a checkpoint that was begun is in place
            then.
        """
        if bad := run.guard.told():
            run.progress.say(f"step {step.number}: {bad}")
        log = run.config.run.dir / "logs" / "bad_steps.jsonl" if run.ranks.first else None
        places = partial(step.stage.rows_behind, step.first_row, run.state.consumed_rows)
        try:
            run.guard.after(step.number, places, log)
        except HopelessRun:
            run.saver.commit(wait=True)  # its step was good
            raise
