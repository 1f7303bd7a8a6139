"""Compare what several ranks hold of the same tensors."""

from dnt_scale.checkpoint.replicas import check_replicas
from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.setup import Step, Training


class ReplicaChecks(Hook):
    """Ends a run whose replicas diverge; compares first and every ``health.check_every`` steps."""

    def before_training(self, run: Training) -> None:
        """Compare what the run starts with."""
        check_replicas(run.ranks, run.engine.shards(), run.engine.scalars())

    def waits_after(self, run: Training, number: int) -> bool:
        """Say so where it compares."""
        every = run.config.health.check_every
        return bool(every) and number % every == 0

    def after_step(self, run: Training, step: Step) -> None:
        """Compare where it is due."""
        if self.waits_after(run, step.number):
            check_replicas(run.ranks, run.engine.shards(), run.engine.scalars())
