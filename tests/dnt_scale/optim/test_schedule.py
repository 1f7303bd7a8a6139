"""The learning rate over a run."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnt_scale.config import ConfigError, ScheduleConfig
from dnt_scale.config.optim import SCHEDULES
from dnt_scale.optim.schedule import Schedule

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


def section(**fields: object) -> ScheduleConfig:
    found = SCHEDULES.validate(fields, None)
    assert isinstance(found, ScheduleConfig)
    return found


def factors(total: int, **fields: object) -> list[float]:
    schedule = Schedule(section(**fields), total)
    return [schedule.factor(step) for step in range(total)]


def test_cosine_by_hand() -> None:
    got = factors(11, name="cosine", warmup_steps=2, final=0.2)
    cosine = [0.2 + 0.8 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(9)]
    assert got == pytest.approx([0.5, 1.0, *cosine], abs=1e-15)
    assert got[2] == 1.0 and got[6] == pytest.approx(0.6) and got[-1] == pytest.approx(0.2)


def test_wsd_by_hand() -> None:
    got = factors(20, name="wsd", warmup_steps=3, final=0.1, decay_fraction=0.2)
    assert got == pytest.approx([1 / 3, 2 / 3, *[1.0] * 14, 0.775, 0.55, 0.325, 0.1])
    assert factors(20, name="wsd", final=0.0, decay_fraction=0.01)[-2:] == [1.0, 0.0]


def test_constant_and_warmup() -> None:
    assert factors(6, name="constant", warmup_steps=4, final=0.0) == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
        1.0,
    ]
    assert factors(1, name="constant") == [1.0]
    assert factors(3, name="constant") == [1.0] * 3


@PROPERTY
@given(
    data=st.data(), total=st.integers(3, 300), final=st.floats(0, 1), fraction=st.floats(0.01, 1)
)
@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_a_schedule_rises_once_then_never_again(
    name: str, data: st.DataObject, total: int, final: float, fraction: float
) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    got = factors(total, name=name, warmup_steps=warmup, final=final, decay_fraction=fraction)
    assert all(0 <= factor <= 1 + 1e-12 for factor in got)
    assert all(a < b for a, b in pairwise(got[:warmup]))
    assert warmup == 0 or got[warmup - 1] == 1.0
    after = got[warmup:]
    assert after[0] == 1.0 or len(after) == 1  # the decay never starts inside the warmup
    assert all(a >= b - 1e-12 for a, b in pairwise(after))
    assert got[-1] == pytest.approx(final, abs=1e-9)
    schedule = Schedule(section(name=name, warmup_steps=warmup, final=final), total)
    # a step too many does not climb again
    assert schedule.factor(total + 5) == pytest.approx(final, abs=1e-9)


@pytest.mark.parametrize(("warmup", "total"), [(5, 5), (9, 5), (1, 1), (0, 0)])
def test_warmup_as_long_as_the_run_is_refused(warmup: int, total: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"optim\.schedule\.warmup_steps is {warmup}.*{total} steps"
    ):
        Schedule(section(warmup_steps=warmup), total)


def test_a_share_of_the_run_is_as_many_steps_whatever_its_length() -> None:
    share = ScheduleConfig(warmup=0.05)
    assert [share.steps_of_warmup(total) for total in (1, 9, 12, 400, 10_000)] == [0, 0, 1, 20, 500]
    assert factors(12, warmup=0.3) == factors(12, warmup_steps=4)
    assert ScheduleConfig(warmup=0.999).steps_of_warmup(10) == 9  # one step is left
    assert ScheduleConfig(warmup=0.5, warmup_steps=3).steps_of_warmup(100) == 3
    assert ScheduleConfig().steps_of_warmup(100) == 0  # as in the files of old
