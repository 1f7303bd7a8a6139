"""`dnt plan`: what a run would take on a cluster that need not be at hand."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dnt_scale.arguments import Parser, number, word

if TYPE_CHECKING:
    from dnt_scale.tools.planner.estimate import Estimate
    from dnt_scale.tools.planner.search import Choice

NAMES = {"copies": "weights to compute with", "buffers": "optimizer"}
PLAN_HELP = """\
Overrides are those of `dnt submit`: of the run, and of the cluster (cluster=NAME, cluster.nodes=N
...; without one, configs/cluster/gpu.yaml: nodes of eight GPUs). Nothing is allocated, and no data,
GPU or SLURM need be there: without a prepared set a row has model.context tokens.

  dnt plan model=dnt_1.4b --gpu h100
  dnt plan model=dnt_llama_70b train.tokens=1e12 engine=hsdp --gpu h200 cluster.nodes=60
  dnt plan model=dnt_774m --gpu ./ours.yaml cluster=./site.yaml --json
  dnt plan preset=demo --measure

GPUs are the files of configs/hardware; a copy of one, with your links, is a GPU of your own. Each
number is said to be measured (on this machine, by --measure), derived (of the configuration, by
formulas that tests hold to real runs) or assumed (of data sheets and published runs). What cannot
be is one line with the nearest that can; exit status 2. `dnt data prepare --dry-run` is the plan of
data, `dnt train --print-plan` that of stages.
"""


def add_plan(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `dnt plan`."""
    plan = commands.add_parser(
        "plan",
        help="what a run of a language model would take: memory, speed, days, the best engine",
        epilog=PLAN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    where = plan.add_mutually_exclusive_group()
    where.add_argument(
        "--gpu", type=word, metavar="TYPE", help="h100 and others of configs/hardware, or a file"
    )
    where.add_argument(
        "--measure",
        action="store_true",
        help="time this machine at the model's sizes, and plan for ranks as it is; kept, and used "
        "by plans without --gpu",
    )
    plan.add_argument(
        "--gpu-hours-a-failure",
        type=number(0, above=True),
        metavar="HOURS",
        help="hours of a GPU between failures, for goodput (default: 50,700, Llama 3's)",
    )
    plan.add_argument("--json", action="store_true", help="the same as data")
    plan.set_defaults(run=run_plan)


def run_plan(options: argparse.Namespace) -> int:
    """Show the plan; exit status 0."""
    from cluster.cluster_config import read_cluster, split_overrides
    from dnt_scale.cli.plan_inputs import load_run, machine_for, other_optimizers, row_length
    from dnt_scale.tools.planner.estimate import check_kind, estimate
    from dnt_scale.tools.planner.goodput import GPU_HOURS_A_FAILURE

    ours, rest = split_overrides(options.overrides)
    named = any(override.startswith("cluster=") for override in ours)
    gpus = options.gpu is not None
    site = None
    if gpus or ours:
        site, _ = read_cluster([*([] if named else ["cluster=gpu"]), *ours])
    run = load_run(rest, gpus=gpus)
    check_kind(run)
    seq_len, length = row_length(run)
    machine = machine_for(run, seq_len, site, options.gpu, again=options.measure)
    made = estimate(
        run,
        machine,
        seq_len,
        options.gpu_hours_a_failure or GPU_HOURS_A_FAILURE,
        other_optimizers(run, rest, gpus=gpus),
    )
    if options.json:
        print(json.dumps(as_data(made), indent=2))
    else:
        print(as_text(made, length, chosen=run.train.micro_batch == "auto"))
    return 0


def as_data(made: "Estimate") -> dict[str, Any]:
    """Return a plan as JSON has it."""
    return {
        "device": made.asked.machine.device,
        "nodes": made.asked.machine.nodes,
        "ranks_per_node": made.asked.machine.ranks_per_node,
        "asked": made.asked.overrides,
        "best": made.best.overrides,
        "numbers": {name: asdict(each) for name, each in made.numbers().items()},
        "optimizers": [asdict(rival) for rival in made.rivals],
    }


def as_text(made: "Estimate", length: str, *, chosen: bool = False) -> str:
    """Return a plan as lines of a name and what there is to say.

    Args:
        chosen: the micro-batch is the planner's, for ``train.micro_batch`` is auto.
    """
    from data_prep.words import named_lines

    return named_lines(_lines(made, length, chosen))


def _lines(made: "Estimate", length: str, chosen: bool) -> list[tuple[str, str]]:
    from data_prep.words import counted, megabytes

    choice, run, speed = made.asked, made.asked.run, made.speed_source
    machine, numbers = choice.machine, made.numbers()
    parameters = numbers["parameters"].value
    lines = [
        (
            "machine",
            f"{counted(machine.nodes, 'node')} of {counted(machine.ranks_per_node, 'rank')}: "
            f"{machine.device}",
        ),
        (
            "model",
            f"{run.model.name}, {parameters / 1e6:,.1f}M weights; {choice.overrides}"
            f"{' (assumed of auto)' if chosen else ''}, "
            f"{run.optim.algorithm}, {run.train.dtype}",
        ),
        ("budget", f"{made.steps:,} steps, {made.tokens:,} tokens, in rows of {length} (derived)"),
        ("memory", _memory(choice)),
        ("communication", _communication(choice)),
        ("speed", _speed(made)),
        ("step", _step(choice, speed)),
        *_over_time(made),
    ]
    if made.best is not choice:
        gain = made.best.units_per_s / choice.units_per_s
        lines.append(
            (
                "best",
                f"{made.best.overrides}: {made.best.units_per_s:,.0f} tokens/s, {gain:.2f} times, "
                f"{megabytes(made.best.peak.total())} a rank at its peak",
            )
        )
    else:
        lines.append(("best", "as asked"))
    for rival in made.rivals:
        fewest = f"; fits on {counted(rival.fewest_ranks, 'rank')}" if rival.fewest_ranks else ""
        lines.append(
            (
                "optimizer",
                f"{rival.optimizer}: {megabytes(rival.held)} a rank held, at the peak "
                f"{megabytes(rival.peak)}{fewest} (derived)",
            )
        )
    return lines


def _over_time(made: "Estimate") -> list[tuple[str, str]]:
    from data_prep.words import duration, megabytes

    lost, hours = made.goodput, made.numbers()["device_hours"].value
    return [
        (
            "time",
            f"{duration(made.seconds)} of training, {duration(made.seconds / lost.share)} with "
            f"failures; {hours:,.1f} {'GPU' if made.asked.machine.gpus else 'rank'}-hours "
            f"({made.speed_source})",
        ),
        (
            "checkpoint",
            f"{megabytes(made.checkpoint_bytes)} (derived), written in {duration(made.save_s)}, "
            f"training waits {made.waits_s:.2g} s (assumed: 2 GB/s a node)",
        ),
        (
            "goodput",
            f"{lost.share:.1%} (assumed): a failure every {duration(lost.between_failures)}; "
            f"checkpoints every {duration(max(1.0, lost.best_interval))} would be best",
        ),
    ]


def _memory(choice: "Choice") -> str:
    from data_prep.words import megabytes

    most, room = choice.peak, choice.machine.memory
    parts = " + ".join(
        f"{NAMES.get(part, part)} {megabytes(size)}" for part, size in most.parts.items()
    )
    of = f" of {megabytes(int(room))}" if room else ""
    host = most.held.total() - most.held.device()
    aside = f"; {megabytes(host)} in the host's memory" if host else ""
    return (
        f"{megabytes(most.total())}{of} a rank at the peak, {_moment(most.moment)} (derived): "
        f"{parts}{aside}"
    )


def _moment(name: str) -> str:
    return {"loss": "at the loss", "backward": "in backward", "update": "at the update"}[name]


def _communication(choice: "Choice") -> str:
    from data_prep.words import megabytes

    traffic = choice.time.traffic
    kinds = [
        f"{kind.replace('_', '-')} {megabytes(count)}"
        for kind in ("all_gather", "reduce_scatter", "all_reduce")
        if (count := getattr(traffic, kind))
    ]
    if not kinds or choice.machine.ranks == 1:
        return "none between ranks"
    hidden = 1 - choice.time.parts["communication"] / max(choice.time.communication, 1e-12)
    return (
        f"a rank sends {megabytes(int(choice.time.sent))} a step (derived): {', '.join(kinds)}; "
        f"{choice.time.communication:.3g} s, {max(0.0, hidden):.0%} of it hidden (assumed)"
    )


def _speed(made: "Estimate") -> str:
    mfu = f", MFU {made.mfu:.1%}" if made.mfu is not None else ""
    return f"{made.asked.units_per_s:,.0f} tokens/s{mfu} ({made.speed_source})"


def _step(choice: "Choice", source: str) -> str:
    whole = choice.time.seconds
    parts = sorted(choice.time.parts.items(), key=lambda part: -part[1])
    shares = ", ".join(f"{name} {part / whole:.0%}" for name, part in parts if part >= whole / 200)
    return f"{whole:.3g} s ({source}): {shares}"
