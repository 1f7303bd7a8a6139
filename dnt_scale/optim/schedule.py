"""The learning rate's factor of every step: warmup, then a schedule of schedules/."""

from dataclasses import dataclass

from dnt_scale.config import ConfigError, ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor of a step: ``config`` spread over ``total_steps``.

    Raises:
        ConfigError: the warmup is as long as the run.
    """

    config: ScheduleConfig
    total_steps: int

    def __post_init__(self) -> None:
        warmup = self.config.steps_of_warmup(self.total_steps)
        if warmup >= self.total_steps:
            raise ConfigError(
                f"optim.schedule.warmup_steps is {warmup}, but the run has "
                f"{self.total_steps} steps; warm up for fewer steps or train for more"
            )

    def factor(self, step: int) -> float:
        """Return the factor of the update numbered ``step``, counted from 0; warmup ends at 1."""
        warmup = self.config.steps_of_warmup(self.total_steps)
        if step < warmup:
            return (step + 1) / warmup
        return self.config.after_warmup(step, warmup, self.total_steps - 1)
