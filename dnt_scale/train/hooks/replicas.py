"""Compare what several ranks hold of the same tensors."""

from dnt_scale.checkpoint.replicas import check_replicas
from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.setup import Step, Training


class ReplicaChecks(Hook):
    """Ends a run whose replicas diverge; compares first and every ``health.check_every`` steps."""

    def before_training(self, run: Training) -> None:
        """Compare what the run starts with."""
        check_replicas(run.ranks, run.engine.shards(), run.engine.scalars())

    def after_step(self, run: Training, step: Step) -> None:
        """Compare where it is due."""
        every = run.config.health.check_every
        if every and step.number % every == 0:
            check_replicas(run.ranks, run.engine.shards(), run.engine.scalars())
