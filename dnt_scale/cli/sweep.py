"""`dnt sweep` and `dnt report`."""

import argparse
from pathlib import Path

from dnt_scale.arguments import Parser, path, path_or_url, whole, word

SWEEP_HELP = """\
Overrides are those of `dnt train`; where one lists several values (KEY=A,B,C, choice(A,B),
range(FROM,TO,STEP)), every combination is a run of its own in RUN_DIR/NUMBER-VALUES. They train
here, one after the other, and are the children of one run in MLflow:

  dnt sweep preset=demo run.name=lr optim.lr=1e-3,3e-3,9e-3 run.seed=1,2 --dry-run
  dnt sweep preset=demo run.name=lr optim.lr=1e-3,3e-3,9e-3 run.seed=1,2
  dnt report runs/lr

The same command goes on with what is left, after Ctrl-C, kill -9 or a power failure; no step that
is in a checkpoint is trained twice. A run that fails or diverges is written down with its reason,
and the others go on. A sampler of Optuna's chooses values by itself, from intervals too (quote them
for the shell), random ones or (tpe) by what earlier runs led to:

  dnt sweep preset=demo run.name=tpe 'optim.lr=tag(log,interval(.001,.01))' --sampler tpe --trials 9

--halving 3 spends less on what looks bad early: all train to a first rung, the best third of them
to the next, three times as far, and so on. Each goes on as if it had never stopped. A long warmup
or a schedule that decays late makes early losses tell little.

With cluster=NAME the sweep becomes an array of SLURM jobs, as `dnt submit --multirun` has it.

  dnt sweep preset=demo run.name=lr optim.lr=1e-3,3e-3,9e-3 cluster=./site.yaml
"""

REPORT_HELP = """\
RUN is a run's folder or its name in runs/, or a sweep's, for all its runs. Those that differ in
nothing but run.seed are one line with a band. Settings that differ are found by themselves.

  dnt report runs/demo
  dnt report runs/lr
  dnt report runs/lr-msgdw runs/lr-adamw --title 'momentum SGD and AdamW' --out docs/optimizers

Written: report.md, report.html (one file, pictures inside), report.json (all numbers), loss.png
(losses over tokens), and, where a number differs, against.png: final losses against it, with the
range within 0.05 nats of the best. The same runs give the same bytes.
"""


WIDE = 200  # columns of a table that goes into a file or another program


def add_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the commands."""
    sweep = commands.add_parser(
        "sweep",
        help="train a run for each of several values",
        epilog=SWEEP_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep.add_argument("overrides", nargs="*", metavar="KEY=VALUE[,VALUE...]")
    sweep.add_argument(
        "--sampler",
        choices=("grid", "random", "tpe"),
        default="grid",
        help="grid: every combination (default); random, tpe: Optuna chooses --trials of them",
    )
    sweep.add_argument(
        "--trials", type=whole(1, 1000), metavar="N", help="runs that a sampler makes"
    )
    sweep.add_argument(
        "--halving",
        type=whole(2, 100),
        metavar="ETA",
        help="compare runs early, and go on with the best one of ETA each time",
    )
    sweep.add_argument(
        "--metric",
        type=word,
        default="val/loss",
        metavar="NAME",
        help="of metrics.jsonl, the lower the better (default: val/loss)",
    )
    sweep.add_argument(
        "--ranks",
        type=whole(1, 4096),
        default=1,
        metavar="K",
        help="processes a run, under torchrun (default: 1)",
    )
    sweep.add_argument(
        "--retry-failed", action="store_true", help="go on with runs that failed, too"
    )
    sweep.add_argument("--dry-run", action="store_true", help="show the runs, and stop")
    sweep.set_defaults(run=run_sweep)

    report = commands.add_parser(
        "report",
        help="compare runs: curves, tables, sensitivity to a setting",
        epilog=REPORT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("runs", nargs="+", type=path_or_url, metavar="RUN")
    report.add_argument(
        "--out",
        type=path,
        metavar="DIR",
        help="folder of the report (default: RUN/report of one RUN, else ./report)",
    )
    report.add_argument(
        "--against",
        type=word,
        metavar="KEY",
        help="the number that final losses are drawn against (default: optim.lr, else the first "
        "that differs)",
    )
    report.add_argument("--title", type=word, help="(default: the names of the RUNs)")
    report.set_defaults(run=run_report)


def run_sweep(options: argparse.Namespace) -> int:
    from dnt_scale.config import ConfigError, typed_keys

    if any(key.partition(".")[0] == "cluster" for key in typed_keys(options.overrides)):
        return submit_sweep(options)
    if (options.sampler == "grid") != (options.trials is None):
        raise ConfigError(
            "--trials: how many runs a sampler makes, with --sampler random or tpe; a grid has one "
            "for each combination"
            if options.trials
            else f"--sampler {options.sampler}: say how many runs to make, --trials N"
        )
    if options.halving and options.sampler == "tpe":
        raise ConfigError(
            "--halving compares all runs at a step, but tpe chooses each by the ends of those "
            "before it; use --sampler random or grid"
        )
    from dnt_scale.sweep.here import sweep_here
    from dnt_scale.sweep.sweep_file import Asked

    asked = Asked(
        overrides=options.overrides,
        sampler=options.sampler,
        metric=options.metric,
        halving=options.halving,
    )
    return sweep_here(
        asked,
        options.trials,
        ranks=options.ranks,
        retry_failed=options.retry_failed,
        dry_run=options.dry_run,
    )


def run_report(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from dnt_scale.report.report import make_report, width_sentences, write_report
    from dnt_scale.report.runs import place_of

    report = make_report(options.runs, options.against, options.title)
    alone = len(options.runs) == 1
    out = options.out or (place_of(options.runs[0]) / "report" if alone else Path("report"))
    files = write_report(report, out)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    left = len(report.table.headers) - report.table.numbers
    for number, header in enumerate(report.table.headers):
        shown.add_column(header, justify="left" if number < left else "right", overflow="fold")
    for number, row in enumerate(report.table.rows):
        shown.add_row(*row, style="bold" if number == report.table.best else "")
    console = Console(highlight=False)
    console.print(shown, width=console.width if console.is_terminal else WIDE)
    for sentence in width_sentences(report):
        print(sentence)
    print(f"{out}: {', '.join(file.name for file in files)}")
    return 0


def submit_sweep(options: argparse.Namespace) -> int:
    """Submit it as `dnt submit --multirun` does. Raises ConfigError for what that has not."""
    from cluster.commands import run_submit
    from dnt_scale.config import ConfigError

    if options.sampler != "grid" or options.halving or options.retry_failed or options.ranks > 1:
        raise ConfigError(
            "cluster=...: a sweep on SLURM is a grid whose runs train to their end (as of `dnt "
            "submit --multirun`); leave --sampler, --halving, --retry-failed and --ranks out, or "
            "cluster=..."
        )
    return run_submit(
        argparse.Namespace(
            overrides=options.overrides, multirun=True, fresh=False, dry_run=options.dry_run
        )
    )
