"""Which run of a sweep trains next, as a function of what is recorded."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from dnt_scale.sweep.rungs import next_part, rungs, steps_left
from dnt_scale.sweep.sweep_file import Result


def test_rungs_are_shares_of_the_steps_at_validations_after_the_warmup() -> None:
    assert rungs(900, runs=9, eta=3, every=50, warmup=10) == [100, 300]
    assert rungs(1000, runs=9, eta=3, every=50, warmup=10) == [100, 300]  # 111 and 333, rounded
    assert rungs(900, runs=8, eta=3, every=50, warmup=10) == [300]
    assert rungs(900, runs=9, eta=3, every=50, warmup=100) == [300]
    assert rungs(900, runs=9, eta=3, every=400, warmup=10) == []
    assert rungs(900, runs=2, eta=3, every=50, warmup=10) == []


def run_all(
    losses: dict[str, float], stops: list[int], eta: int, failing: set[tuple[str, int]]
) -> tuple[list[tuple[str, int]], dict[str, Result]]:
    """Every part of a sweep in which a run's metric is its loss / step, and what is recorded."""
    results: dict[str, Result] = {}
    parts = []
    every = dict.fromkeys(losses, stops)
    while part := next_part(every, eta, results):
        name, stop = part
        parts.append(part)
        before = results.get(name, Result())
        results[name] = (
            before.model_copy(update={"failed": "a fault"})
            if part in failing
            else Result(values={**before.values, stop: losses[name] / stop})
        )
    return parts, results


def test_the_best_of_each_rung_go_on() -> None:
    losses = {
        name: float(loss)
        for name, loss in zip("abcdefghi", (5, 3, 9, 1, 7, 2, 8, 6, 4), strict=True)
    }
    parts, _ = run_all(losses, [10, 30, 90], 3, set())
    assert parts[:9] == [(name, 10) for name in "abcdefghi"]
    assert parts[9:] == [("b", 30), ("d", 30), ("f", 30), ("d", 90)]
    # the next best takes the place of one that fails
    parts, _ = run_all(losses, [10, 30, 90], 3, {("d", 10), ("f", 30)})
    assert parts[9:] == [("b", 30), ("f", 30), ("i", 30), ("b", 90)]


def test_without_halving_all_train_to_their_own_end_in_order() -> None:
    results = {"a": Result(values={7: 1.0}), "b": Result(failed="it diverged")}
    stops = {"a": [7], "b": [9], "c": [5]}
    assert next_part(stops, 1, results) == ("c", 5)
    assert steps_left(3, stops, 1, results) == 5
    assert steps_left(4, stops, 1, results) == 12
    assert next_part(stops, 1, {**results, "c": Result(values={5: 3.0})}) is None


@settings(deadline=None)
@given(
    losses=st.lists(st.integers(1, 40).map(float), min_size=1, max_size=30),
    eta=st.integers(2, 4),
    seed=st.integers(0, 1000),
)
def test_no_part_is_trained_twice_and_the_best_is_trained_to_the_end(
    losses: list[float], eta: int, seed: int
) -> None:
    names = {f"{number:02}": loss for number, loss in enumerate(losses)}
    stops = [*rungs(eta**5, len(losses), eta, 1, 0), eta**5]
    parts, results = run_all(names, stops, eta, set())
    assert len(set(parts)) == len(parts)
    best = min(names, key=lambda name: names[name])
    assert [name for name, stop in parts if stop == stops[-1]].count(best) == 1
    assert steps_left(len(names), dict.fromkeys(names, stops), eta, results) == 0
    planned = 0
    before: dict[str, int] = {}
    for name, stop in parts:
        planned += stop - before.get(name, 0)
        before[name] = stop
    assert steps_left(len(names), dict.fromkeys(names, stops), eta, {}) == planned
    # what is recorded may be lost from its end on: the same parts follow again
    cut = random.Random(seed).randrange(len(parts))
    kept: dict[str, Result] = {}
    for name, stop in parts[:cut]:
        values = kept.get(name, Result()).values
        kept[name] = Result(values={**values, stop: names[name] / stop})
    assert next_part(dict.fromkeys(names, stops), eta, kept) == parts[cut]
