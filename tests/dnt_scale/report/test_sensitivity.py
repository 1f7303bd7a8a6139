"""The range of a setting within a tolerance of the best loss."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dnt_scale.report.sensitivity import sensitivity

LOSSES = st.lists(st.floats(2.0, 4.0), min_size=2, max_size=12)


def grid(size: int) -> list[float]:
    return [0.01 * 2.0**number for number in range(size)]


def test_written_out() -> None:
    found = sensitivity([0.1, 1.0, 10.0], [3.1, 3.0, 3.2])
    assert found
    assert (found.best, found.loss) == (1.0, 3.0)
    assert found.low == pytest.approx(10**-0.5)
    assert found.high == pytest.approx(10**0.25)
    assert found.words == "x 5.62"
    assert sensitivity([], []) is None
    assert sensitivity([1.0], [math.nan]) is None


def test_a_value_that_failed_ends_the_range_at_the_last_good_one() -> None:
    found = sensitivity([0.1, 1.0, 10.0], [3.01, 3.0, math.inf])
    assert found
    assert (found.low, found.low_cut, found.high, found.high_cut) == (0.1, True, 1.0, False)
    assert found.words == "at least x 10"


@settings(deadline=None)
@given(losses=LOSSES, tolerance=st.floats(0.001, 1.0))
def test_the_range_is_that_of_a_dense_interpolation(losses: list[float], tolerance: float) -> None:
    values = grid(len(losses))
    found = sensitivity(values, losses, tolerance)
    assert found
    dense = np.linspace(math.log(values[0]), math.log(values[-1]), 20_001)
    height = np.interp(dense, np.log(values), losses)
    step = dense[1] - dense[0]
    within = height <= min(losses) + tolerance
    first = last = int(np.argmin(np.abs(dense - math.log(found.best))))
    while first > 0 and within[first - 1]:
        first -= 1
    while last < len(dense) - 1 and within[last + 1]:
        last += 1
    # where the loss touches the limit, rounding decides whether the range goes on
    slopes = np.abs(np.array(losses) - (min(losses) + tolerance))
    assume(slopes.min() > 1e-6)
    assert math.log(found.low) == pytest.approx(dense[first], abs=2 * step)
    assert math.log(found.high) == pytest.approx(dense[last], abs=2 * step)
    assert found.low_cut == bool(within[: first + 1].all() and first == 0)
    assert found.high_cut == bool(last == len(dense) - 1)


@settings(deadline=None)
@given(
    losses=LOSSES,
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-1.0, 1.0),
    tolerance=st.floats(0.01, 0.5),
)
def test_units_of_the_setting_and_the_height_of_the_loss_do_not_matter(
    losses: list[float], scale: float, shift: float, tolerance: float
) -> None:
    values = grid(len(losses))
    limit = np.array(losses) - min(losses) - tolerance
    assume(np.abs(limit).min() > 1e-6 and losses.count(min(losses)) == 1)
    assume(sorted(losses)[1] - min(losses) > 1e-9)
    one = sensitivity(values, losses, tolerance)
    other = sensitivity(
        [value * scale for value in values], [loss + shift for loss in losses], tolerance
    )
    assert one and other
    assert other.factor == pytest.approx(one.factor, rel=1e-6)
    assert (other.low_cut, other.high_cut) == (one.low_cut, one.high_cut)
    wider = sensitivity(values, losses, 2 * tolerance)
    assert wider and wider.low <= one.low and wider.high >= one.high
    flipped = sensitivity([1 / value for value in reversed(values)], losses[::-1], tolerance)
    assert flipped
    assert flipped.factor == pytest.approx(one.factor, rel=1e-6)


def test_of_a_parabola_the_range_is_found_as_the_grid_gets_finer() -> None:
    """0.2 (log10 x)^2 is 0.05 at a factor of 10 ** 0.5 on both sides: a factor of 10."""
    values = list(np.logspace(-2.03, 1.9, 400))
    found = sensitivity(values, [0.2 * math.log10(value) ** 2 for value in values])
    assert found
    assert found.factor == pytest.approx(10, rel=1e-2)
