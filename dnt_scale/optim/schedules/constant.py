"""1 after warmup."""

from typing import Literal

from dnt_scale.config.optim import SCHEDULES, ScheduleConfig


@SCHEDULES.register
class Constant(ScheduleConfig):
    """Stay where warmup ends; ``final`` says nothing here."""

    name: Literal["constant"]

    def after_warmup(self, step: int, first: int, last: int) -> float:
        return 1.0
