"""The learning rate's factor of every step: warmup, then a schedule of schedules/; times that of
the stage.
"""

from dataclasses import dataclass

from dnt_scale.config import ConfigError, ScheduleConfig, Spans, span_at


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor of a step: ``config`` spread over ``total_steps``, times the factor of
    the step's stage.

    Raises:
        ConfigError: the warmup is as long as the run.
    """

    config: ScheduleConfig
    total_steps: int
    spans: Spans = ()  # of a run with stages

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
            factor = (step + 1) / warmup
        else:
            factor = self.config.after_warmup(step, warmup, self.total_steps - 1)
        return factor * span_at(self.spans, step).factor(step) if self.spans else factor
