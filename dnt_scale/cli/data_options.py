"""Options that the commands of `dnt data` share, and what is done with them."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnt_scale.arguments import Parser, whole, word

if TYPE_CHECKING:
    from data_prep.images.options import ImageOptions
    from data_prep.options import PrepareOptions


def add_workers(command: Parser) -> None:
    """Add --workers."""
    command.add_argument(
        "--workers",
        type=whole(1, 1024),
        metavar="N",
        help="processes (default: one a CPU); same result",
    )


def add_places_of_work(command: Parser) -> None:
    """Add --tasks, --task, --cluster and --dry-run."""
    command.add_argument(
        "--tasks",
        type=whole(1, 1_000_000),
        metavar="N",
        help="with --task I: make part I (from 0) of N, no more",
    )
    command.add_argument(
        "--task",
        type=whole(0, 999_999),
        metavar="I",
        help="run the same command without --task when all are done",
    )
    command.add_argument(
        "--cluster",
        nargs="+",
        type=word,
        metavar=("NAME", "cluster.KEY=VALUE"),
        help="make it by SLURM jobs, in --tasks N parts (default: up to 16); the same command "
        "tells how far they are",
    )
    command.add_argument("--dry-run", action="store_true", help="show the plan and stop")


def task_of(options: argparse.Namespace) -> tuple[int, int] | None:
    """Return the part of how many that is asked for. Raises ValueError where --tasks, --task and
    --cluster do not go together."""
    if options.cluster and options.task is not None:
        raise ValueError(
            "--task: with --cluster there is a job for each; give --tasks N alone, or neither"
        )
    if not options.cluster and (options.tasks is None) != (options.task is None):
        raise ValueError(
            "--tasks N and --task I go together; give both, or neither for the last step"
        )
    return None if options.task is None else (options.task, options.tasks)


def make_set(
    options: argparse.Namespace,
    asked: "PrepareOptions | ImageOptions",
    prepare: Callable[[Any], object],
    print_plan: Callable[[Any], None],
    print_info: Callable[[Path], None],
) -> int:
    """Make a set here or by jobs, or show the plan; returns the exit status.

    Args:
        prepare, print_plan, print_info: of the kind of set; ``prepare`` returns None for a task.
    """
    if options.cluster:
        from cluster.submit.data_prep_jobs import main as prepare_on_cluster

        return prepare_on_cluster(asked, options.cluster, options.tasks, dry_run=options.dry_run)
    if options.dry_run:
        print_plan(asked)
        return 0
    try:
        made = prepare(asked)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if made:
        print_info(options.out)
    return 0
