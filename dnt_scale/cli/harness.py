"""`dnt lm-eval`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dnt_scale.arguments import Parser, path, whole, word
from dnt_scale.cli.run_options import add_run, add_tokenizer_data

if TYPE_CHECKING:
    from dnt_scale.tools.harness.evaluate import Measured

WIDE = 200  # characters of a table that goes into a file

LM_EVAL_HELP = """\
Tasks are those of EleutherAI's lm-evaluation-harness (pip install 'dnt-scale[eval]'), by name, or
YAML files of your own; their data is fetched from where the task says, once. The newest checkpoint
is measured as it is, with the average of the weights where train.ema keeps one. Results go into
RUN/lm_eval/step-*.json, into RUN/lm_eval.jsonl, and as lm_eval/TASK/METRIC into the run's MLflow
run. `lm-eval ls tasks` lists the tasks.

  dnt lm-eval runs/first --tasks arc_easy hellaswag --limit 200
  dnt lm-eval runs/first --tasks mmlu --fewshot 5 --batch 4
  dnt lm-eval runs/first --tasks tasks/own.yaml
  dnt lm-eval runs/first --tasks own another --include tasks
"""


def add_lm_eval(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `dnt lm-eval`."""
    harness = commands.add_parser(
        "lm-eval",
        help="measure a checkpoint of a run on tasks of lm-evaluation-harness",
        epilog=LM_EVAL_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(harness)
    harness.add_argument(
        "--tasks",
        type=word,
        nargs="+",
        required=True,
        metavar="NAME_OR_FILE",
        help="tasks, groups or tags of the harness, or YAML files",
    )
    harness.add_argument(
        "--limit", type=whole(1), metavar="N", help="documents a task, at most (default: all)"
    )
    harness.add_argument(
        "--batch",
        type=whole(1),
        metavar="N",
        help="rows computed at once (default: the run's train.micro_batch)",
    )
    harness.add_argument(
        "--fewshot",
        type=whole(0),
        metavar="N",
        help="examples in front of a question (default: as the task says)",
    )
    harness.add_argument(
        "--include", type=path, metavar="PATH", help="folder of YAML files of tasks"
    )
    add_tokenizer_data(harness)
    harness.set_defaults(run=run_lm_eval)


def run_lm_eval(options: argparse.Namespace) -> int:
    from dnt_scale.distributed import process_group
    from dnt_scale.record.finalize import send_rest
    from dnt_scale.tools.harness.evaluate import evaluate_tasks

    with process_group.alone() as ranks:
        step, measured = evaluate_tasks(
            options.folder,
            [task for word in options.tasks for task in word.split(",") if task],
            ranks,
            step=options.step,
            limit=options.limit,
            batch=options.batch,
            fewshot=options.fewshot,
            include=options.include,
            data=options.data,
        )
    show(options.folder, step, measured)
    send_rest(options.folder.absolute())
    return 0


def show(folder: Path, step: int, measured: "dict[str, Measured]") -> None:
    """Print a row a metric."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("task", overflow="fold")
    shown.add_column("metric", overflow="fold")
    for header in ("value", "± stderr", "few-shot", "documents"):
        shown.add_column(header, justify="right", no_wrap=True)
    for name, each in measured.items():
        for metric, value in each.metrics.items():
            if metric.partition("/")[0].endswith("_stderr"):
                continue
            error = each.metrics.get(error_of(metric))
            shown.add_row(
                name,
                metric,
                f"{value:.4f}",
                "" if error is None else f"{error:.4f}",
                "" if each.fewshot is None else str(each.fewshot),
                f"{each.documents:,}" + (f" of {each.of:,}" if each.of > each.documents else ""),
            )
    print(f"{folder}, step {step:,}")
    console = Console(highlight=False)
    console.print(shown, width=console.width if console.is_terminal else WIDE)


def error_of(metric: str) -> str:
    """Return the name of a metric's standard error."""
    name, slash, chosen = metric.partition("/")
    return f"{name}_stderr{slash}{chosen}"
