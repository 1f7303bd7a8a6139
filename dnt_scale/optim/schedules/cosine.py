"""Half a cosine from 1 down to ``final`` (Loshchilov and Hutter, arXiv 1608.03983, no restarts)."""

import math
from typing import Literal

from dnt_scale.config.optim import SCHEDULES, ScheduleConfig


@SCHEDULES.register
class Cosine(ScheduleConfig):
    """Fall from the end of warmup to the last step."""

    name: Literal["cosine"] = "cosine"

    def after_warmup(self, step: int, first: int, last: int) -> float:
        progress = min(1.0, (step - first) / (last - first)) if last > first else 1.0
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
