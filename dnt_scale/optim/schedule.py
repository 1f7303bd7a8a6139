"""Learning-rate schedules: the factor of every step, a pure function of the step."""

import math
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
        """Factor for the update numbered ``step``, counted from 0: warmup ends at 1, the last
        step at ``final``.
        """
        warmup = self.config.steps_of_warmup(self.total_steps)
        final, last = self.config.final, self.total_steps - 1
        if step < warmup:
            return (step + 1) / warmup
        if self.config.name == "constant":
            return 1.0
        if self.config.name == "cosine":
            progress = (step - warmup) / (last - warmup) if last > warmup else 1.0
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        decay_steps = min(last - warmup, round(self.config.decay_fraction * self.total_steps)) or 1
        progress = max(0.0, (step - (last - decay_steps)) / decay_steps)
        return 1 - (1 - final) * min(1.0, progress)
