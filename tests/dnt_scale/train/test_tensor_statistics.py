"""Statistics of tensors of known tails, and of a step that is written out, on one rank and two."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from dnt_scale.checkpoint.tensor_shards import TensorShard
from dnt_scale.train.tensor_statistics import (
    BINS_PER_OCTAVE,
    EDGES,
    Changes,
    Entries,
    change,
    gradient_statistics,
)
from testbed.run import call

ENTRIES = 1 << 19
SCALE = 1e-12  # its fourth power is far below the least fp32


def of_known_tails() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {
        "normal": rng.standard_normal(ENTRIES),
        "student 5": rng.standard_t(5, ENTRIES),
        "pareto 3": 1.0 + rng.pareto(3.0, ENTRIES),
        "pareto 1.5": 1.0 + rng.pareto(1.5, ENTRIES),
        "mostly zeros": rng.standard_normal(ENTRIES) * (rng.random(ENTRIES) < 0.2),
    }


@pytest.fixture(scope="module")
def tails():
    return of_known_tails()


def statistics_of(values):
    seen = Entries.none(1, torch.device("cpu"))
    seen.add(0, torch.from_numpy(np.asarray(values, dtype=np.float32) * np.float32(SCALE)))
    return seen.statistics()[0]


def test_the_theory_of_each_distribution(tails):
    normal = statistics_of(tails["normal"])
    assert normal.kurtosis == pytest.approx(3.0, abs=0.03)
    assert normal.rms == pytest.approx(SCALE, rel=0.01)
    norm = scipy.stats.norm
    assert normal.q999_q50 == pytest.approx(norm.ppf(0.9995) / norm.ppf(0.75), rel=0.02)
    assert 8.0 < normal.hill < 9.5  # no power law: its index only grows with the threshold
    student = scipy.stats.t(5)
    heavy = statistics_of(tails["student 5"])
    assert heavy.kurtosis == pytest.approx(9.0, rel=0.25)  # its eighth moment is infinite
    assert heavy.q999_q50 == pytest.approx(student.ppf(0.9995) / student.ppf(0.75), rel=0.03)
    for alpha in (3.0, 1.5):
        found = statistics_of(tails[f"pareto {alpha:g}"])
        # the standard error of k entries is alpha / sqrt(k), here 1.4 %
        assert found.hill == pytest.approx(alpha, rel=0.05)
        assert found.q999_q50 == pytest.approx((1000 / 2) ** (1 / alpha), rel=0.1)


@pytest.mark.parametrize("name", ["normal", "student 5", "pareto 3", "pareto 1.5"])
def test_bins_tell_what_all_entries_sorted_tell(tails, name):
    found = statistics_of(tails[name])
    x = np.sort(np.abs(tails[name].astype(np.float32).astype(np.float64)))
    tail = ENTRIES // 100
    assert found.kurtosis == pytest.approx(np.mean(x**4) / np.mean(x**2) ** 2, rel=1e-5)
    assert found.max_rms == pytest.approx(x[-1] / np.sqrt(np.mean(x**2)), rel=1e-5)
    assert found.q999_q50 == pytest.approx(np.quantile(x, 0.999) / np.quantile(x, 0.5), rel=0.005)
    hill = 1 / np.mean(np.log(x[-tail:] / x[-tail - 1]))
    assert found.hill == pytest.approx(hill, rel=0.005)


def test_what_has_no_meaning_is_nan(tails):
    zeros = statistics_of(tails["mostly zeros"])
    assert zeros.zeros == pytest.approx(0.8, abs=0.01) and math.isnan(zeros.q999_q50)
    assert statistics_of(np.zeros(5000))[1:] == pytest.approx(
        (0, *[math.nan] * 4, 1.0), nan_ok=True
    )
    few = statistics_of(tails["normal"][:999])
    assert math.isnan(few.hill) and math.isnan(few.q999_q50) and few.kurtosis > 2
    for bad in (np.nan, np.inf):
        assert math.isnan(statistics_of([*tails["normal"][:2000], bad]).kurtosis)
    assert Entries.none(1, torch.device("cpu")).statistics()[0].elements == 0


def test_a_bin_is_as_wide_as_is_said():
    normal = EDGES[BINS_PER_OCTAVE:]  # not of the least numbers
    assert normal[:-1].log2().diff().max() < 1 / 22  # log2(1 + 1/32)
    assert (EDGES.diff() > 0).all()


@given(st.floats(-300.0, 300.0), st.floats(-20.0, 0.0))
def test_an_angle_is_exact_however_small(turn, size):
    w = np.array([3.0, 4.0])
    angle = math.radians(abs(turn) % 180) * 10**size
    after = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) @ w
    d = after - w
    found = change(float(w @ w), float(d @ d), float(w @ d), 2)
    assert found.angle == pytest.approx(angle, rel=1e-6, abs=1e-15)
    assert found.update_ratio == pytest.approx(np.linalg.norm(d) / 5.0)


# --- on ranks


def rows(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).view(-1, 64)


def measure(how: str) -> None:
    """Print what all ranks find in the tensors of known tails, each with rows of its own or all
    with a copy; the second tensor is rank 0's alone.
    """
    from dnt_scale.distributed import process_group

    me = process_group.start("cpu")
    gradients, weights, names = [], [], list(of_known_tails())
    for number, (name, values) in enumerate(of_known_tails().items()):
        whole = rows(values)
        if how == "copies":
            place, replica = slice(None), (me.rank, me.world_size)
        else:
            size = len(whole) if number == 1 else -(-len(whole) // me.world_size) - 5
            first = me.rank * size
            place = slice(
                first, None if me.rank == me.world_size - 1 and number != 1 else first + size
            )
            replica = (0, 1)
        if (part := whole[place]).numel():
            for kind, into in (("grad", gradients), ("model", weights)):
                offset = (place.start or 0, 0)
                shard = TensorShard(f"{kind}.{name}", tuple(whole.shape), offset, part, *replica)
                into.append(shard)
    found = [list(each) for each in gradient_statistics(gradients, names, me.device)]
    before = Changes(weights)
    for shard in weights:
        shard.data.mul_(0.75)
    moved = [list(each) for each in before.since(weights, names, me.device)]
    if me.first:
        print(json.dumps([found, moved]))
    process_group.stop()


def test_the_same_on_any_number_of_ranks():
    one, *others = (
        json.loads(call(measure, how, ranks=ranks).ok().out)
        for how, ranks in (("rows", 1), ("rows", 2), ("copies", 2))
    )
    for other in others:
        for a, b in zip(one[0] + one[1], other[0] + other[1], strict=True):
            # an angle of 0 is so to 1e-8 of the update
            assert a == pytest.approx(b, rel=1e-9, abs=1e-7 if len(a) == 5 else 0, nan_ok=True)
    for (elements, rms, *_), moved in zip(*one, strict=True):
        expected = (elements, rms, 0.25 * rms, 0.25, 0.0)
        assert moved == pytest.approx(expected, rel=1e-6, abs=1e-7)
