"""The ``dnt`` command: a thin door to each room. Each command imports only what it uses.

The one file that reaches into every room; everywhere else imports go one way (docs/design.md).
"""

import argparse
import io
import re
import sys

from dnt_scale import startup
from dnt_scale.arguments import Parser, fail
from dnt_scale.cli import checkpoint, data, generate, harness, hugging_face, plan, run, sweep
from dnt_scale.distributed import output


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 2 with one clear line on stderr for what a user
    can mend.
    """
    if arguments is None:  # a process of its own
        startup.leave_folder_out()
        startup.let_threads_sleep()
        output.guard(shows=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a name that the terminal's encoding has not ends nothing
            stream.reconfigure(errors="backslashreplace")
    options, more = parser().parse_known_args(arguments)
    if more and not (
        hasattr(options, "overrides") and all(re.match(r"(?!-)[\w.+~/@-]+=", each) for each in more)
    ):
        fail(f"unrecognized arguments: {' '.join(more)}", options.command)
    if more:  # argparse takes no more words after an option
        options.overrides += more
    if arguments is None:
        output.guard(shows=options.run.__name__ in data.SHOWS)
    try:
        startup.check_folder()
        return int(options.run(options))
    except (ValueError, OSError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each room adds its own."""
    root = Parser(
        prog="dnt",
        description="Pretrain Deeply Normalized Transformers with momentum SGD: text, shards, "
        "runs.",
    )
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    data.add_commands(commands)
    plan.add_plan(commands)
    run.add_run_commands(commands)
    generate.add_generate(commands)
    run.add_classify(commands)
    harness.add_lm_eval(commands)
    sweep.add_commands(commands)
    checkpoint.add_commands(commands)
    hugging_face.add_commands(commands)
    run.add_diagnose(commands)
    run.add_verify_resume(commands)
    run.add_ui(commands)

    from cluster.commands import add as add_cluster_commands

    add_cluster_commands(commands)
    return root
