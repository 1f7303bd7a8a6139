"""Options that the commands of `dnt data` share."""

from dnt_scale.arguments import Parser, whole


def add_workers(command: Parser) -> None:
    """Add --workers."""
    command.add_argument(
        "--workers",
        type=whole(1, 1024),
        metavar="N",
        help="processes (default: one a CPU); same result",
    )


def add_tasks(command: Parser) -> None:
    """Add --tasks and --task."""
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
