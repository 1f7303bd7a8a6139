"""`dnt train`, `generate`, `eval`, `verify-resume` and `ui`."""

import argparse
import sys

TRAIN_HELP = """\
Overrides choose files of configs/ (group=name) and change values (key=value), for example:

  dnt train run.name=first data.path=data/mine
  dnt train preset=demo
  dnt train model=dnt_774m optim=msgdw optim.lr=1.0 train.global_batch=480 run.name=large data.path=data/mine
  torchrun --nproc-per-node 8 -m dnt_scale.train model=dnt_1.4b run.name=xl data.path=data/mine

Groups: model (dnt_nano, dnt_124m, dnt_774m, dnt_1.4b and gpt_ twins), optim (msgdw_r, msgdw,
adamw and others), engine (ddp, fsdp, hsdp, zero0 to zero3, zero3_offload), data (shards, mixture),
tracking, preset; a wrong name is answered with all that there are. `dnt train --print-config ...`
shows every key with its value. Running the same command again resumes the run; Ctrl-C, SIGTERM,
SIGHUP and SIGUSR1 write a checkpoint and stop. Exit status: 0 complete, 1 a fault that another try
may not meet (a lost rank), 2 error, 128 + n stopped by signal n.
"""


VERIFY_RESUME_HELP = """\
The runs are made in a temporary folder (TMPDIR says where), with tracking and validation off. The same engine on as
many ranks must go on to the last bit; another within a stated tolerance of loss and weights. Exit status 0: as it
should be, 1: not, 2: error.

  dnt verify-resume preset=demo
  dnt verify-resume model=dnt_124m data.path=data/mine --ranks 2 --steps 10
  dnt verify-resume preset=demo engine=fsdp --ranks 2 --then engine=zero1 --then-ranks 4
"""


def run_train(options: argparse.Namespace) -> int:
    from dnt_scale import config

    run = config.load(options.overrides)
    if options.print_config:
        from dnt_scale.train.recorded import Typed
        from dnt_scale.train.run_start import begin

        begun = begin(run, Typed(options.overrides), fresh=options.fresh)
        print(config.to_yaml(begun.run), end="")
        for note in begun.notes:
            print(note, file=sys.stderr)
        return 0
    from cluster.watch.run_state import check_idle

    check_idle(run.run.dir)
    from dnt_scale.train.rank import main as train

    return train([*options.overrides, *["--fresh"] * options.fresh], check_idle)


def run_generate(options: argparse.Namespace) -> int:
    from dnt_scale.distributed import process_group
    from dnt_scale.tools.generate import generate

    with process_group.alone() as me:
        for piece in generate(
            options.folder,
            options.prompt,
            me,
            tokens=options.tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            seed=options.seed,
            data=options.data,
        ):
            print(piece, end="", flush=True)
    print()
    return 0


def run_eval(options: argparse.Namespace) -> int:
    from dnt_scale.distributed import process_group
    from dnt_scale.tools.inference import evaluate

    with process_group.alone() as me:
        metrics = evaluate(options.folder, options.data, options.rows, me)
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:{width}} {value:.4f}")
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
