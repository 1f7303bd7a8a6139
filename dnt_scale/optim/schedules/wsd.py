"""Warmup, stable, decay: 1, then a straight line down to ``final`` (arXiv 2404.06395)."""

from typing import Literal

from dnt_scale.config.optim import SCHEDULES, ScheduleConfig


@SCHEDULES.register
class WarmupStableDecay(ScheduleConfig):
    """Stay at 1 until the last ``decay_fraction`` of the run."""

    name: Literal["wsd"]

    def after_warmup(self, step: int, first: int, last: int) -> float:
        decay_steps = self._decay_steps(first, last)
        progress = max(0.0, (step - (last - decay_steps)) / decay_steps)
        return 1 - (1 - self.final) * min(1.0, progress)

    def steps_before_decay(self, total_steps: int) -> int | None:
        return total_steps - self._decay_steps(self.steps_of_warmup(total_steps), total_steps - 1)

    def _decay_steps(self, first: int, last: int) -> int:
        return min(last - first, round(self.decay_fraction * (last + 1))) or 1
