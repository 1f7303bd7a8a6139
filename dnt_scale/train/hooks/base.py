"""What a hook is: something that a run does beside its steps, at moments of its choice."""

from dnt_scale.train.setup import Step, Training


class Hook:
    """Does nothing at each moment; a hook overrides those that it wants. Every rank has every hook.

    At each moment the hooks act in the order of ``hooks.HOOKS``, when they close the other way
    round. What a hook raises ends the run; an error that only one rank may meet has to be agreed on
    first (``distributed.agree``), or the others wait for that rank in their next collective until
    the watchdog ends them all.
    """

    def before_training(self, run: Training) -> None:
        """Act once, when all parts of the run are made."""

    def before_step(self, run: Training) -> None:
        """Act before step ``run.state.step + 1`` takes its batch. What is recorded on the device
        here comes with the step's loss."""

    def before_update(self, run: Training) -> None:
        """Act between backward and update, while ``run.engine.gradient_shards()`` is whole.

        All ranks are here; collectives may be called.
        """

    def after_step(self, run: Training, step: Step) -> None:
        """Act after a step; ``run.state`` is that after it."""

    def after_training(self, run: Training) -> None:
        """Act once after the step that ends the run, its last or a signal's; not after an error."""

    def close(self, run: Training) -> None:
        """Free what the hook holds, however the run ended (``run.outcome``).

        No collective: other ranks may be gone.
        """
