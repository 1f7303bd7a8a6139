"""Which run of a sweep trains next, and how far: all to the end, or by successive halving.

Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943): all runs train to a first rung,
the best of them, one in ``eta``, to the next, and so on to the end. The next best takes the place
of one that fails. Everything here is a function of what is recorded, so a sweep that was killed
goes on as if it had not been.
"""

from collections.abc import Mapping, Sequence

from dnt_scale.sweep.sweep_file import Result


def rungs(total_steps: int, runs: int, eta: int, every: int, warmup: int) -> list[int]:
    """Return the steps at which runs are compared, ascending, without the last step.

    They are total_steps / eta^k for all k at which a run is left at the end, rounded down to
    validations, of which every run has one there anyway. What lies in the warmup is left out.

    Args:
        total_steps: of each run.
        runs: how many begin.
        eta: one in so many goes on.
        every: steps between validations.
        warmup: steps of the learning rate's warmup.
    """
    power = 0
    while eta ** (power + 1) <= runs:
        power += 1
    found = (total_steps // eta**k // every * every for k in range(power, 0, -1))
    return sorted({step for step in found if step > warmup})


def next_part(
    stops: Mapping[str, Sequence[int]], eta: int, results: Mapping[str, Result]
) -> tuple[str, int] | None:
    """Return the run that trains next and the step that it trains to; None when all is done.

    Args:
        stops: of each run, in the order of training, the rungs and its last step.
        eta: one in so many goes on after each rung.
        results: what became of the runs so far.
    """
    alive = list(stops)
    for stage in range(len(next(iter(stops.values()), ()))):
        alive = [name for name in alive if not results.get(name, Result()).failed]
        for name in alive:
            if stops[name][stage] not in results.get(name, Result()).values:
                return name, stops[name][stage]
        ranked = sorted(alive, key=lambda name: results[name].values[stops[name][stage]])
        best = set(ranked[: max(1, len(alive) // eta)])
        alive = [name for name in alive if name in best]
    return None


def steps_left(
    runs: int, stops: Mapping[str, Sequence[int]], eta: int, results: Mapping[str, Result]
) -> int:
    """Return the steps that are yet to be trained, if no run fails from now on.

    Args:
        runs: how many there are going to be, of which those in ``stops`` are known by now.
        stops, eta, results: as of :func:`next_part`.
    """
    left, before = 0, 0
    names = list(stops)
    each = stops[names[0]]
    if len(each) == 1:
        settled = [
            name
            for name in names
            if name in results and (results[name].failed or stops[name][0] in results[name].values)
        ]
        return sum(stops[name][0] for name in names if name not in settled) + each[0] * (
            runs - len(names)
        )
    for stop in each:
        reached = sum(
            bool(found.failed) or max(found.values, default=0) >= stop for found in results.values()
        )
        left += max(0, runs - reached) * (stop - before)
        before, runs = stop, max(1, runs // eta)
    return left
