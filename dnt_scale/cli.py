"""The ``dnt`` command: a thin door to each room. Each command imports only what it uses.

The one file that reaches into every room; everywhere else imports go one way (docs/design.md).
"""

import argparse
import io
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dnt_scale import startup
from dnt_scale.arguments import Parser, fail, number, path, path_or_url, prompt, set_folder, whole, word
from dnt_scale.distributed import output

if TYPE_CHECKING:
    from data_prep.options import PrepareOptions

TRAIN_HELP = """\
Overrides choose files of configs/ (group=name) and change values (key=value), for example:

  dnt train run.name=first data.path=data/mine
  dnt train preset=demo
  dnt train model=dnt_774m optim=msgdw optim.lr=1.0 train.global_batch=480 run.name=large data.path=data/mine
  torchrun --nproc-per-node 8 -m dnt_scale.train model=dnt_1.4b run.name=xl data.path=data/mine

Groups: model (dnt_nano, dnt_124m, dnt_774m, dnt_1.4b and gpt_ twins), optim (msgdw, msgdw_r, adamw), engine (ddp, fsdp,
hsdp, zero0 to zero3, zero3_offload), data (shards, mixture), tracking, preset. `dnt train --print-config ...` shows
every key with its value. Running the same command again resumes the run; Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 write a
checkpoint and stop. Exit status: 0 complete, 1 a fault that another try may not meet (a lost rank), 2 error, 128 + n
stopped by signal n.
"""

DATA_HELP = """\
A set is a folder: manifest.json, tokenizer.model, WebDataset tars {train,val}-000000.tar of token rows, report.html.

  dnt data prepare books/ notes.md 'dumps/*.jsonl.zst' --out data/mine
  dnt data prepare 's3://bucket/web/*.parquet' --clean web --dedup near --out data/web
  dnt data verify data/mine
  dnt data info data/mine
"""

PREPARE_HELP = """\
INPUT may be .txt .md, source files, .jsonl .json, each also .gz .zst .bz2 .xz; .parquet; folders; quoted globs; URLs.
The set appears whole or not at all. After Ctrl-C, kill -9 or an error the same command goes on where it was, and the
result is the same to the byte. DIR/report.html tells what was read, dropped and kept; DIR/rejects.jsonl holds findings.

  dnt data prepare books/ --out data/mine --clean light --dedup near --dry-run
  dnt data prepare more/ --append data/mine --out data/mine-2            # prepares more/ only
  zstdcat dump.jsonl.zst | dnt data prepare - --out data/dump

On several machines that share a folder, or as a job array:

  dnt data tokenizer books/ --out books.model
  dnt data prepare books/ --out data/mine --tokenizer books.model --tasks 16 --task 0     # and 1 to 15, at any time
  dnt data prepare books/ --out data/mine --tokenizer books.model                         # when all are done

On a SLURM cluster all of that by jobs; asked again, the same command tells how far they are:

  dnt data prepare books/ --out data/mine --cluster gpu cluster.partition=cpu cluster.time=4:00:00 --workers 8
"""


CHECKPOINT_HELP = """\
PATH is a run's folder, a folder of checkpoints, one step-NNNNNNNN, or a URL of these (s3:// gs://). Where it holds
several checkpoints, verify takes all, the others the newest.

  dnt checkpoint inspect runs/demo
  dnt checkpoint inspect runs/demo/checkpoints/step-00000500 --tensors
  dnt checkpoint verify s3://bucket/demo
  dnt checkpoint diff runs/demo runs/demo-again                          # exit status 0: equal, 1: not, 2: error
  dnt checkpoint convert runs/demo demo.safetensors
  dnt checkpoint convert demo.safetensors run.name=more data.path=data/mine
"""

CONVERT_HELP = """\
From a checkpoint to one safetensors file, whole or not at all: weights only, by the parameters' names (tok_emb.weight),
the model's configuration in the metadata; or with --full all tensors, by the checkpoint's names (model.tok_emb.weight,
momentum_buffer.tok_emb.weight).

  dnt checkpoint convert runs/demo demo.safetensors
  dnt checkpoint convert runs/demo/checkpoints/step-00000500 everything.safetensors --full

From such a file to the checkpoint of step 0 of a new run, with zero momentum. What follows are the overrides that
describe the run; the model is the metadata's, but for what they say of it. `dnt train` with the same ones, and those of
the model that are printed, begins from these weights.

  dnt checkpoint convert demo.safetensors run.name=more data.path=data/mine
  dnt train run.name=more data.path=data/mine model=dnt_nano
"""


VERIFY_RESUME_HELP = """\
The runs are made in a temporary folder (TMPDIR says where), with tracking and validation off. The same engine on as
many ranks must go on to the last bit; another within a stated tolerance of loss and weights. Exit status 0: as it
should be, 1: not, 2: error.

  dnt verify-resume preset=demo
  dnt verify-resume model=dnt_124m data.path=data/mine --ranks 2 --steps 10
  dnt verify-resume preset=demo engine=fsdp --ranks 2 --then engine=zero1 --then-ranks 4
"""


# commands that end where nobody reads their output any more (`| head`); the others do what they are for all the same
SHOWS = {
    "checkpoint_diff",
    "checkpoint_inspect",
    "checkpoint_verify",
    "data_info",
    "data_verify",
    "run_eval",
    "run_generate",
    "run_jobs",
    "run_logs",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 2 with one clear line on stderr for what a user can mend."""
    if arguments is None:  # a process of its own
        startup.leave_folder_out()
        output.guard(shows=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding has not ends nothing
    options, more = parser().parse_known_args(arguments)
    if more and not (hasattr(options, "overrides") and all(re.match(r"(?!-)[\w.+~/@-]+=", each) for each in more)):
        fail(f"unrecognized arguments: {' '.join(more)}", options.command)
    if more:  # argparse takes no more words after an option
        options.overrides += more
    if arguments is None:
        output.guard(shows=options.run.__name__ in SHOWS)
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
    root = Parser(
        prog="dnt", description="Pretrain Deeply Normalized Transformers with momentum SGD: text, shards, runs."
    )
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter

    data = commands.add_parser(
        "data", help="turn text into token shards, check them", epilog=DATA_HELP, formatter_class=raw
    )
    data_commands = data.add_subparsers(required=True, metavar="COMMAND")
    prepare = data_commands.add_parser(
        "prepare", help="text, JSON lines and parquet to a set", epilog=PREPARE_HELP, formatter_class=raw
    )
    add_corpus_options(prepare)
    prepare.add_argument("--out", required=True, type=path, metavar="DIR", help="folder of the new set")
    prepare.add_argument(
        "--append", type=path, metavar="SET", help="go on from this set: its rows, then INPUT's, with its options"
    )
    prepare.add_argument("--tokenizer", type=path, metavar="FILE", help="use this SentencePiece model, train none")
    prepare.add_argument(
        "--encoder",
        choices=["sentencepiece", "kitoken"],
        default="sentencepiece",
        help="kitoken: some three times as fast on bpe, checked on this corpus, given up at the first difference",
    )
    prepare.add_argument("--dedup", choices=["none", "exact", "near"], help="leave out copies (default: none)")
    prepare.add_argument(
        "--seq-len", type=whole(1, 1_000_000), metavar="N", help="predicted tokens in a row (default: 1024)"
    )
    prepare.add_argument(
        "--packing",
        choices=["concat", "best_fit"],
        help="concat: documents end to end (default); best_fit: whole documents in a row, with padding",
    )
    prepare.add_argument(
        "--tasks", type=whole(1, 1_000_000), metavar="N", help="with --task I: make part I (from 0) of N, no more"
    )
    prepare.add_argument(
        "--task", type=whole(0, 999_999), metavar="I", help="run the same command without --task when all are done"
    )
    prepare.add_argument(
        "--cluster",
        nargs="+",
        type=word,
        metavar=("NAME", "cluster.KEY=VALUE"),
        help="make it by SLURM jobs, in --tasks N parts (default: up to 16); the same command tells how far they are",
    )
    prepare.add_argument("--dry-run", action="store_true", help="show the plan and stop")
    prepare.set_defaults(run=data_prepare)
    tokenizer = data_commands.add_parser(
        "tokenizer",
        help="train a tokenizer on a corpus, as prepare would",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_corpus_options(tokenizer)
    tokenizer.add_argument("--out", required=True, type=path, metavar="FILE", help="the .model file to write")
    tokenizer.set_defaults(run=data_tokenizer)
    verify = data_commands.add_parser("verify", help="re-read every byte of a set against its manifest")
    verify.add_argument("folder", type=path, metavar="SET")
    verify.set_defaults(run=data_verify)
    info = data_commands.add_parser("info", help="print what a set holds")
    info.add_argument("folder", type=path, metavar="SET")
    info.set_defaults(run=data_info)

    train = commands.add_parser("train", help="train a model, or resume it", epilog=TRAIN_HELP, formatter_class=raw)
    train.add_argument("--print-config", action="store_true", help="show the resolved run and stop")
    train.add_argument(
        "--fresh", action="store_true", help="move aside what an earlier run has left in the folder; begin at step 0"
    )
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    train.set_defaults(run=run_train)

    generate = commands.add_parser(
        "generate", help="sample text from a run", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    generate.add_argument("folder", type=path, metavar="RUN", help="run folder, for example runs/demo")
    generate.add_argument("--prompt", default="", type=prompt, help="text to go on from")
    generate.add_argument("--tokens", type=whole(0), default=200, help="tokens to sample, at most")
    generate.add_argument("--temperature", type=number(0), default=0.8, help="0: always the most likely token")
    generate.add_argument(
        "--top-k", type=whole(0), default=50, help="sample from the k most likely tokens; 0: from all"
    )
    generate.add_argument("--seed", type=whole(0, 2**64 - 1), default=0, help="the same seed gives the same text")
    generate.add_argument("--data", type=set_folder, help="set with the tokenizer, if it has moved since training")
    generate.set_defaults(run=run_generate)

    evaluate = commands.add_parser("eval", help="measure a run's newest checkpoint on held-out rows")
    evaluate.add_argument("folder", type=path, metavar="RUN", help="run folder, for example runs/demo")
    evaluate.add_argument("--data", type=set_folder, help="another set of the same tokenizer (default: the run's own)")
    evaluate.add_argument("--rows", type=whole(1), help="validation rows to use, at most (default: all)")
    evaluate.set_defaults(run=run_eval)

    checkpoint = commands.add_parser(
        "checkpoint", help="look into checkpoints, check and convert them", epilog=CHECKPOINT_HELP, formatter_class=raw
    )
    checkpoint_commands = checkpoint.add_subparsers(required=True, metavar="COMMAND")
    inspect = checkpoint_commands.add_parser("inspect", help="what a checkpoint is: step, tokens, size, who wrote it")
    inspect.add_argument(
        "path", type=path_or_url, metavar="PATH", help="run, folder of checkpoints, step-NNNNNNNN, or a URL of these"
    )
    inspect.add_argument("--tensors", action="store_true", help="read all tensors: shape, dtype, norm, min and max")
    inspect.set_defaults(run=checkpoint_inspect)
    check = checkpoint_commands.add_parser(
        "verify", help="re-read every byte: sha256 of each file, and that the parts make up each tensor"
    )
    check.add_argument(
        "path", type=path_or_url, metavar="PATH", help="a run or folder (all its checkpoints), step-NNNNNNNN, or a URL"
    )
    check.set_defaults(run=checkpoint_verify)
    diff = checkpoint_commands.add_parser(
        "diff", help="compare two checkpoints bit for bit; exit status 0: equal, 1: not, 2: error"
    )
    diff.add_argument(
        "one", type=path_or_url, metavar="A", help="run, folder of checkpoints, step-NNNNNNNN, or a URL of these"
    )
    diff.add_argument("other", type=path_or_url, metavar="B")
    diff.set_defaults(run=checkpoint_diff)
    convert = checkpoint_commands.add_parser(
        "convert", help="to and from one safetensors file", epilog=CONVERT_HELP, formatter_class=raw
    )
    convert.add_argument(
        "source", type=path_or_url, metavar="IN", help="run, folder of checkpoints, step-NNNNNNNN, URL; or .safetensors"
    )
    convert.add_argument(
        "target", nargs="+", type=word, metavar="OUT", help="a .safetensors file; or KEY=VALUE ... of a run"
    )
    convert.add_argument("--full", action="store_true", help="optimizer buffers too (default: weights only)")
    convert.set_defaults(run=checkpoint_convert)

    resume = commands.add_parser(
        "verify-resume",
        help="train, kill and resume, and compare with a run that was not killed",
        epilog=VERIFY_RESUME_HELP,
        formatter_class=raw,
    )
    resume.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of `dnt train`")
    resume.add_argument(
        "--steps", type=whole(2, 10**9), default=20, metavar="N", help="of each run (default: 20); killed half-way"
    )
    resume.add_argument(
        "--ranks", type=whole(1, 4096), default=1, metavar="K", help="processes, under torchrun (default: 1)"
    )
    resume.add_argument(
        "--then-ranks", type=whole(1, 4096), metavar="K", help="processes of the resumed part (default: as many)"
    )
    resume.add_argument("--then", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the resumed part")
    resume.add_argument("--keep", action="store_true", help="leave the run folders in place")
    resume.set_defaults(run=run_verify_resume)

    ui = commands.add_parser("ui", help="open the MLflow page", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    ui.add_argument("--uri", type=word, default="sqlite:///runs/mlflow.db", help="MLflow store")
    ui.add_argument("--port", type=whole(1, 65535), default=5000)
    ui.set_defaults(run=run_ui)

    from cluster.commands import add as add_cluster_commands

    add_cluster_commands(commands)
    return root


def add_corpus_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "inputs",
        nargs="+",
        type=path_or_url,
        metavar="INPUT",
        help='files, folders, globs, URLs (s3:// gs:// https://); "-" is stdin',
    )
    command.add_argument(
        "--text-field", type=word, default="text", metavar="NAME", help="field or column with the text"
    )
    command.add_argument(
        "--clean", type=path_or_url, metavar="RULES", help="cleaning rules: web, light, none, or a YAML file"
    )
    command.add_argument("--strict", action="store_true", help="stop at the first finding in the input")
    command.add_argument(
        "--vocab-size", type=whole(1, 10_000_000), metavar="N", help="pieces to train (default: 16384)"
    )
    command.add_argument("--kind", choices=["bpe", "unigram"], help="of the trained tokenizer (default: bpe)")
    command.add_argument(
        "--val-fraction",
        type=number(0, 1, below=True),
        metavar="F",
        help="share of documents held out (default: 0.005)",
    )
    command.add_argument(
        "--workers", type=whole(1, 1024), metavar="N", help="processes (default: one a CPU); same result"
    )


def corpus_options(options: argparse.Namespace, **more: object) -> "PrepareOptions":
    """What was given; what was not has the defaults of PrepareOptions."""
    from data_prep.options import PrepareOptions

    given = {name: getattr(options, name) for name in ("vocab_size", "kind", "val_fraction", "workers")}
    given |= {"rules": rules_file(options.clean) if options.clean else None, **more}
    return PrepareOptions(
        inputs=options.inputs,
        text_field=options.text_field,
        strict=options.strict,
        **{name: value for name, value in given.items() if value is not None},
    )


def rules_file(name: str) -> Path:
    """A file of cleaning rules by its path, or one of configs/clean by its name."""
    from dnt_scale.config import config_dir

    ours = config_dir() / "clean" / f"{name}.yaml"
    if not ours.is_file() and not Path(name).exists():
        names = ", ".join(sorted(path.stem for path in ours.parent.glob("*.yaml")))
        raise ValueError(f"--clean {name}: no such file, and none of our rules, which are {names}")
    return ours if ours.is_file() else Path(name)


def data_prepare(options: argparse.Namespace) -> int:
    from data_prep.pipeline import prepare
    from data_prep.show import dry_run, info

    if options.cluster and options.task is not None:
        raise ValueError("--task: with --cluster there is a job for each; give --tasks N alone, or neither")
    if not options.cluster and (options.tasks is None) != (options.task is None):
        raise ValueError("--tasks N and --task I go together; give both, or neither for the last step")
    settle(options)
    asked = corpus_options(
        options,
        out=options.out,
        append=options.append,
        tokenizer=options.tokenizer,
        encoder=options.encoder,
        dedup=options.dedup,
        seq_len=options.seq_len,
        packing=options.packing,
        task=None if options.task is None else (options.task, options.tasks),
    )
    if options.cluster:
        from cluster.prepare import main as prepare_on_cluster

        return prepare_on_cluster(asked, options.cluster, options.tasks, dry_run=options.dry_run)
    if options.dry_run:
        dry_run(asked)
        return 0
    try:
        made = prepare(asked)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if made:
        info(options.out)
    return 0


def settle(options: argparse.Namespace) -> None:
    """Raises ValueError for options of `prepare` that --append or --tokenizer settles, where another value is asked."""
    for option, names in (("append", ("tokenizer", "vocab_size", "kind")), ("tokenizer", ("vocab_size", "kind"))):
        for name in names if getattr(options, option) else ():
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')}: --{option} settles it; leave it out")
    if options.append:
        from data_prep.shards import load_manifest

        base = load_manifest(options.append)
        before = {
            "seq_len": base.seq_len,
            "packing": base.packing,
            "dedup": base.options.dedup,
            "val_fraction": base.options.val_fraction,
        }
        for name, value in before.items():
            if getattr(options, name) not in (None, value):
                found = getattr(options, name)
                option = name.replace("_", "-")
                raise ValueError(f"--{option}: found {found}, but {options.append} was made with {value}; leave it out")


def data_tokenizer(options: argparse.Namespace) -> int:
    from data_prep.pipeline import train_tokenizer
    from data_prep.report.markup import visible

    work = options.out.with_name(f"{options.out.name}.work")
    tokenizer = train_tokenizer(corpus_options(options, out=work), options.out)
    print(f"{visible(str(options.out))}: {tokenizer.vocab_size:,} pieces, sha256 {tokenizer.sha256}")
    return 0


def data_verify(options: argparse.Namespace) -> int:
    from data_prep.report.markup import visible
    from data_prep.show import verify

    problems = verify(options.folder)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 2
    print(f"{visible(str(options.folder))}: whole")
    return 0


def data_info(options: argparse.Namespace) -> int:
    from data_prep.show import info

    info(options.folder)
    return 0


def run_train(options: argparse.Namespace) -> int:
    from dnt_scale import config

    run = config.load(options.overrides)
    if options.print_config:
        from dnt_scale.recorded import Typed
        from dnt_scale.run_start import begin

        begun = begin(run, Typed(options.overrides), fresh=options.fresh)
        print(config.to_yaml(begun.run), end="")
        for note in begun.notes:
            print(note, file=sys.stderr)
        return 0
    from cluster.state import check_idle

    check_idle(run.run.dir)
    from dnt_scale.train import main as train

    return train([*options.overrides, *["--fresh"] * options.fresh], check_idle)


def run_generate(options: argparse.Namespace) -> int:
    from dnt_scale.distributed import process_group
    from dnt_scale.inference import generate

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
    from dnt_scale.inference import evaluate
    from dnt_scale.validation import validation_metrics

    with process_group.alone() as me:
        losses, sources = evaluate(options.folder, options.data, options.rows, me)
    metrics = validation_metrics(losses, sources)
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:{width}} {value:.4f}")
    return 0


def checkpoint_inspect(options: argparse.Namespace) -> int:
    from dnt_scale.checkpoint.tools import inspect

    inspect(options.path, tensors=options.tensors)
    return 0


def checkpoint_verify(options: argparse.Namespace) -> int:
    from dnt_scale.checkpoint.tools import verify

    found = verify(options.path)
    for place, problems in found.items():
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        if not problems:
            print(f"{place}: whole")
    return 2 if any(found.values()) else 0


def checkpoint_diff(options: argparse.Namespace) -> int:
    from dnt_scale.checkpoint.tools import diff

    return 0 if diff(options.one, options.other) else 1


def checkpoint_convert(options: argparse.Namespace) -> int:
    from dnt_scale.checkpoint.convert import from_file, to_file

    source, target = options.source, options.target
    if Path(source).is_file():
        if options.full or not all("=" in word for word in target):
            raise ValueError(
                f"{source} is a file: after it come KEY=VALUE ... of the run that begins from it, no --full"
            )
        print(from_file(Path(source), target))
        return 0
    if len(target) > 1 or Path(target[0]).suffix != ".safetensors":
        raise ValueError(
            f"{' '.join(target)}: expected one file NAME.safetensors to write (what follows a file that exists are "
            f"overrides, but {source} is none)"
        )
    print(to_file(source, path(target[0]), full=options.full))
    return 0


def run_verify_resume(options: argparse.Namespace) -> int:
    from dnt_scale.verify_resume import verify_resume

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
    from dnt_scale.mlflow_page import open_ui

    return open_ui(options.uri, options.port)


if __name__ == "__main__":
    sys.exit(main())
