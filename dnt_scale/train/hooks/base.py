"""What a hook is: something that a run does beside its steps, at moments of its choice."""

from typing import ClassVar

from dnt_scale.train.setup import Step, Training


class Hook:
    """Does nothing at each moment; a hook overrides those that it wants. Every rank has every hook.

    At each moment the hooks act in the order of ``hooks.HOOKS``, when they close the other way
    round. What a hook raises ends the run; an error that only one rank may meet has to be agreed on
    first (``distributed.agree``), or the others wait for that rank in their next collective until
    the watchdog ends them all.

    On CUDA the host is ahead of the device, and has a step's loss, norm and verdict only once it
    waits for them: at the first look at ``step.stats.loss`` and its like, or while the next step's
    backward is at work. ``after_step`` of a hook that ``reads_numbers`` is called then, before the
    next step's ``before_update``; ``run.state`` is still that after the step.
    """

    # Whether the hook acts on the loss, norm or verdict of every step, so that it comes late.
    reads_numbers: ClassVar[bool] = False

    def before_training(self, run: Training) -> None:
        """Act once, when all parts of the run are made."""

    def before_step(self, run: Training) -> None:
        """Act before step ``run.state.step + 1`` takes its batch. What is recorded on the device
        here comes with the step's loss.

        Called again where a rollback has changed the weights since, and what was recorded is gone.
        """

    def before_update(self, run: Training) -> None:
        """Act between backward and update, while ``run.engine.gradient_shards()`` is whole.

        All ranks are here; collectives may be called.
        """

    def after_step(self, run: Training, step: Step) -> None:
        """Act after a step; ``run.state`` is that after it."""

    def waits_after(self, run: Training, number: int) -> bool:
        """Say whether the hook is going to wait for the device after step ``number``: then all act
        in their order at once. The same on all ranks.
        """
        return False

    def after_training(self, run: Training) -> None:
        """Act once after the step that ends the run, its last or a signal's; not after an error."""

    def close(self, run: Training) -> None:
        """Free what the hook holds, however the run ended (``run.outcome``).

        No collective: other ranks may be gone.
        """
