"""What `diagnose.every` costs: processor time of the hook against that of the steps.

    python -m benchmarks.diagnose_cost KEY=VALUE...

trains as `dnt train KEY=VALUE...` does on one rank, measures every other step, and prints one line.
Processor time of all threads, so that a busy machine does not matter much; on a GPU read the wall
clock's.
"""

import os
import sys
import time
from collections import defaultdict

import torch

from dnt_scale.train import loop
from dnt_scale.train.hooks.diagnose import Diagnose
from dnt_scale.train.rank import main

SPENT: dict[str, list[tuple[float, float]]] = defaultdict(list)


def clocks() -> tuple[float, float]:
    """Return processor and wall seconds, once the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


class Timed(Diagnose):
    """Counts what its moments take, and steps with them."""

    def before_step(self, run):  # type: ignore[no-untyped-def]
        self.started, self.own = clocks(), [0.0, 0.0]
        self.timed(super().before_step, run)

    def before_update(self, run):  # type: ignore[no-untyped-def]
        self.timed(super().before_update, run)

    def after_step(self, run, step):  # type: ignore[no-untyped-def]
        measured = self.before is not None
        self.timed(super().after_step, run, step)
        whole = [end - begin for end, begin in zip(clocks(), self.started, strict=True)]
        if step.number > 4:  # the first ones are slower
            rest = tuple(a - b for a, b in zip(whole, self.own, strict=True))
            SPENT["step"].append(rest)  # type: ignore[arg-type]
            if measured:
                SPENT["hook"].append(tuple(self.own))  # type: ignore[arg-type]

    def timed(self, act, *given):  # type: ignore[no-untyped-def]
        begun = clocks()
        act(*given)
        self.own = [
            own + end - begin for own, end, begin in zip(self.own, clocks(), begun, strict=True)
        ]


def means(name: str) -> tuple[float, float]:
    """Return mean processor and wall seconds."""
    found = SPENT[name]
    return sum(a for a, _ in found) / len(found), sum(b for _, b in found) / len(found)


if __name__ == "__main__":
    loop.HOOKS = tuple(Timed if hook is Diagnose else hook for hook in loop.HOOKS)
    status = main([*sys.argv[1:], "diagnose.every=2"])
    if not status:
        (step, step_wall), (hook, hook_wall) = means("step"), means("hook")
        load = os.getloadavg()[0]
        print(
            f"a step {step:.3f} s of processor ({step_wall:.3f} s), measuring {hook:.3f} s "
            f"({hook_wall:.3f} s): {hook / step:.1%} of a step, {hook / step / 100:.3%} at "
            f"diagnose.every=100; load {load:.1f}"
        )
    sys.exit(status)
