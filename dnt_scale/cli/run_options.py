"""Options of commands that take a run."""

from dnt_scale.arguments import Parser, path, set_folder, whole


def add_run(command: Parser) -> None:
    """Add RUN, and which of its checkpoints."""
    command.add_argument(
        "folder", type=path, metavar="RUN", help="run folder, for example runs/demo"
    )
    add_step(command)


def add_step(command: Parser) -> None:
    """Add the step of a checkpoint."""
    command.add_argument(
        "--step", type=whole(0), metavar="N", help="checkpoint to take (default: the newest)"
    )


def add_data(command: Parser) -> None:
    """Add a set to measure on."""
    command.add_argument(
        "--data",
        type=set_folder,
        help="another set of the same tokenizer, or classes (default: the run's own)",
    )


def add_tokenizer_data(command: Parser) -> None:
    """Add a set of which the tokenizer is all that is needed."""
    command.add_argument(
        "--data", type=set_folder, help="set with the tokenizer, if it has moved since training"
    )
