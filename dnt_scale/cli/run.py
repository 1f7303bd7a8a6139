"""`dnt train`, `eval`, `classify`, `diagnose`, `verify-resume` and `ui`."""

import argparse
import sys
from typing import TYPE_CHECKING

from dnt_scale.arguments import Parser, path, set_folder, whole, word
from dnt_scale.cli.run_options import add_data, add_run, add_step

if TYPE_CHECKING:
    from dnt_scale.train.run_start import Begun

WIDE = 200  # columns of a table that goes into a file or another program

TRAIN_HELP = """\
Overrides choose files of configs/ (group=name) and change values (key=value), for example:

  dnt train run.name=first data.path=data/mine
  dnt train preset=demo
  dnt train model=dnt_774m optim.lr=1e-3 train.global_batch=480 run.name=large data.path=data/mine
  torchrun --nproc-per-node 8 -m dnt_scale.train model=dnt_1.4b run.name=xl data.path=data/mine

Groups: model (dnt_nano, dnt_124m, dnt_774m, dnt_1.4b, dnt_llama_1b, dnt_llama_7b, dnt_llama_70b and
gpt_ twins; of images vdnt_tiny, vdnt_s16, vdnt_b16, vdnt_l16, vdnt_h14 and vit_ twins), optim
(muon_normalized, msgdw, adamw ...), engine (ddp, fsdp, hsdp, zero0 to zero3, zero3_offload), data
(shards, mixture, images), tracking, preset; a wrong name is answered with all that there are.
`dnt train --print-config ...` shows every key with its value. Running the same command again
resumes the run; Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 write a checkpoint and stop. Exit status: 0
complete, 1 a fault that another try may not meet (a lost rank), 2 error, 128 + n stopped by signal
n.
"""


DIAGNOSE_HELP = """\
Loads a checkpoint of each run in one process, takes the training rows that it would see
next, and writes RUN/diagnose.json and plots; of several runs, plots that compare them. A run that
trains is not disturbed. What each number means: docs/train/diagnose.md.

  dnt diagnose runs/first
  dnt diagnose runs/s1 runs/s2 runs/s3 runs/s4 runs/s5 --out plots
"""


VERIFY_RESUME_HELP = """\
The runs are made in a temporary folder (TMPDIR says where), with tracking and validation off. The
same engine on as many ranks must go on to the last bit; another within a stated tolerance of loss
and weights. Exit status 0: as it should be, 1: not, 2: error.

  dnt verify-resume preset=demo
  dnt verify-resume model=dnt_124m data.path=data/mine --ranks 2 --steps 10
  dnt verify-resume preset=demo engine=fsdp --ranks 2 --then engine=zero1 --then-ranks 4
"""


def add_run_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `dnt train`, and what is done with a run that it has made."""
    train = commands.add_parser(
        "train",
        help="train a model, or resume it",
        epilog=TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("--print-config", action="store_true", help="show the resolved run and stop")
    train.add_argument(
        "--print-plan",
        action="store_true",
        help="show the run's stages (train.stages) as a table and stop",
    )
    beginning = train.add_mutually_exclusive_group()
    beginning.add_argument(
        "--fresh",
        action="store_true",
        help="move aside what an earlier run has left in the folder; begin at step 0",
    )
    beginning.add_argument(
        "--from-step",
        type=whole(0),
        metavar="N",
        help="go on from the newest checkpoint of step N or before; with more train.steps and "
        "schedule wsd, of before its decay. Later checkpoints and metrics are moved aside",
    )
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    train.set_defaults(run=run_train)

    evaluate = commands.add_parser("eval", help="measure a run's checkpoint on held-out rows")
    add_run(evaluate)
    add_data(evaluate)
    evaluate.add_argument(
        "--rows", type=whole(1), help="validation rows to use, at most (default: all)"
    )
    evaluate.set_defaults(run=run_eval)


def add_classify(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `dnt classify`."""
    classify = commands.add_parser("classify", help="name what is in images, by a run")
    add_run(classify)
    classify.add_argument("images", type=path, nargs="+", metavar="IMAGE", help="image file")
    classify.add_argument(
        "--data", type=set_folder, help="set of the run's classes, if it has moved since training"
    )
    classify.set_defaults(run=run_classify)


def add_diagnose(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `dnt diagnose`."""
    diagnose = commands.add_parser(
        "diagnose",
        help="look into a run's gradients, loss by token frequency and Jacobians",
        epilog=DIAGNOSE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    diagnose.add_argument(
        "folders", type=path, nargs="+", metavar="RUN", help="run folder, for example runs/demo"
    )
    diagnose.add_argument(
        "--batches",
        type=whole(1, 10**6),
        default=4,
        metavar="N",
        help="micro-batches of training rows (default: 4)",
    )
    diagnose.add_argument(
        "--out", type=path, help="folder of the plots (default: RUN/plots; needed for several runs)"
    )
    add_step(diagnose)
    add_data(diagnose)
    diagnose.set_defaults(run=run_diagnose)


def add_verify_resume(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `dnt verify-resume`."""
    resume = commands.add_parser(
        "verify-resume",
        help="train, kill and resume, and compare with a run that was not killed",
        epilog=VERIFY_RESUME_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    resume.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of `dnt train`")
    resume.add_argument(
        "--steps",
        type=whole(2, 10**9),
        default=20,
        metavar="N",
        help="of each run (default: 20); killed half-way",
    )
    resume.add_argument(
        "--ranks",
        type=whole(1, 4096),
        default=1,
        metavar="K",
        help="processes, under torchrun (default: 1)",
    )
    resume.add_argument(
        "--then-ranks",
        type=whole(1, 4096),
        metavar="K",
        help="processes of the resumed part (default: as many)",
    )
    resume.add_argument(
        "--then", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the resumed part"
    )
    resume.add_argument("--keep", action="store_true", help="leave the run folders in place")
    resume.set_defaults(run=run_verify_resume)


def add_ui(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `dnt ui`."""
    ui = commands.add_parser(
        "ui",
        help="open the MLflow page",
        description="Serve MLflow's page of the runs below runs/, or of another store, on this "
        "machine; Ctrl-C ends it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    ui.add_argument("--uri", type=word, default="sqlite:///runs/mlflow.db", help="MLflow store")
    ui.add_argument("--port", type=whole(1, 65535), default=5000, help="of the page")
    ui.set_defaults(run=run_ui)


def run_train(options: argparse.Namespace) -> int:
    from dnt_scale import config

    run = config.load(options.overrides)
    if options.print_config or options.print_plan:
        from dnt_scale.train.recorded import Typed
        from dnt_scale.train.run_start import begin

        typed = Typed(options.overrides)
        begun = begin(run, typed, fresh=options.fresh, from_step=options.from_step)
        if options.print_config:
            print(config.to_yaml(begun.run), end="")
        for note in begun.notes:
            print(note, file=sys.stderr)
        return print_plan(begun) if options.print_plan else 0
    from cluster.watch.run_state import check_idle

    check_idle(run.run.dir)
    from dnt_scale.train.rank import main as train

    more = ["--fresh"] * options.fresh
    if options.from_step is not None:
        more.append(f"--from-step={options.from_step}")
    return train([*options.overrides, *more], check_idle)


def print_plan(begun: "Begun") -> int:
    """Show the stages of a run that begins or goes on."""
    from rich.console import Console

    from dnt_scale.train.resume import changes, starting_state
    from dnt_scale.train.stage_table import stage_table
    from dnt_scale.train.stages import load_stages

    stages = load_stages(begun.run)
    state, newest = starting_state(begun, stages, 1)
    console = Console(highlight=False)
    console.print(
        stage_table(begun.run, stages), width=console.width if console.is_terminal else WIDE
    )
    for line in changes(begun, stages):
        print(line, file=sys.stderr)
    if newest:
        print(f"step {state.step:,} is done, by {newest}")
    return 0


def run_eval(options: argparse.Namespace) -> int:
    from dnt_scale.distributed import process_group
    from dnt_scale.tools.inference import checkpoint_of, evaluate

    with process_group.alone() as ranks:
        trained = checkpoint_of(options.folder, options.step)
        metrics = evaluate(trained, options.data, options.rows, ranks)
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:{width}} {value:.4f}")
    return 0


def run_classify(options: argparse.Namespace) -> int:
    from dnt_scale.distributed import process_group
    from dnt_scale.tools.classify import Unreadable, classify
    from dnt_scale.tools.inference import checkpoint_of

    with process_group.alone() as ranks:
        trained = checkpoint_of(options.folder, options.step)
        status = 0
        for image, found in classify(trained, options.images, options.data, ranks):
            if isinstance(found, Unreadable):
                print(f"error: {image}: {found.why}", file=sys.stderr)
                status = 2
                continue
            print(image)
            for guess in found:
                print(f"  {guess.probability:.4f} {guess.name}")
    return status


def run_diagnose(options: argparse.Namespace) -> int:
    from dnt_scale.tools.diagnose import diagnose_runs

    for picture in diagnose_runs(
        options.folders, options.step, options.data, options.batches, options.out
    ):
        print(picture)
    return 0


def run_verify_resume(options: argparse.Namespace) -> int:
    from dnt_scale.tools.verify_resume import verify_resume

    good = verify_resume(
        options.overrides,
        steps=options.steps,
        ranks=options.ranks,
        then=options.then,
        then_ranks=options.then_ranks,
        keep=options.keep,
    )
    return 0 if good else 1


def run_ui(options: argparse.Namespace) -> int:
    from dnt_scale.record.mlflow.ui import open_ui

    return open_ui(options.uri, options.port)
