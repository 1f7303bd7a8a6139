"""A training run of ours that goes by turns: what `benchmarks.train_speed` starts.

    python -m benchmarks.timed_run TURN_STEPS KEY=VALUE...

It is the run of `dnt train KEY=VALUE...` on one rank, with all of its hooks.
"""

import sys

import torch
import torch.distributed as dist

from benchmarks.turns import Phases, Turns
from dnt_scale.model.dnt import DNT
from dnt_scale.model.task import LossModule
from dnt_scale.optim.sharded_optimizer import ShardedOptimizer
from dnt_scale.train import loop
from dnt_scale.train.hooks import Hook
from dnt_scale.train.rank import main
from dnt_scale.train.setup import Step, Training
from dnt_scale.train.stages import Batches

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "broadcast",
    "reduce_scatter_tensor",
)


def timed(turns: Turns) -> list[type[Hook]]:
    """Return the loop's hooks, between two that begin and end a step."""

    class Begins(Hook):
        def before_step(self, run: Training) -> None:
            turns.begin()

    class Ends(Hook):
        def after_step(self, run: Training, step: Step) -> None:
            turns.end()

    return [Begins, *loop.HOOKS, Ends]


def watch(phases: Phases) -> None:
    """Tell the parts of a step apart. What is left of the loss is the head and cross entropy."""
    phases.watch(Batches, "__next__", "data wait")
    phases.watch(LossModule, "forward", "loss")
    phases.watch(DNT, "_last", "forward")
    phases.watch(torch.Tensor, "backward", "backward")
    phases.watch(ShardedOptimizer, "step", "optimizer")
    phases.watch(ShardedOptimizer, "apply", "optimizer")
    for name in COLLECTIVES:
        phases.watch(dist, name, "communication")


if __name__ == "__main__":
    watched = Phases()
    watch(watched)
    loop.HOOKS = tuple(timed(Turns(int(sys.argv[1]), watched)))
    sys.exit(main(sys.argv[2:]))
