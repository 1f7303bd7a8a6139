"""The ``dnt`` command: a thin door to each room. Each command imports only what it uses.

The one file that reaches into every room; everywhere else imports go one way (docs/design.md).
"""

import argparse
import io
import re
import sys

from dnt_scale import startup
from dnt_scale.arguments import Parser, fail, number, path, path_or_url, prompt, set_folder, whole, word
from dnt_scale.cli.checkpoint import (
    CHECKPOINT_HELP,
    CONVERT_HELP,
    checkpoint_convert,
    checkpoint_diff,
    checkpoint_inspect,
    checkpoint_verify,
)
from dnt_scale.cli.data import (
    DATA_HELP,
    PREPARE_HELP,
    SHOWS,
    add_corpus_options,
    data_info,
    data_prepare,
    data_tokenizer,
    data_verify,
)
from dnt_scale.cli.run import (
    TRAIN_HELP,
    VERIFY_RESUME_HELP,
    run_eval,
    run_generate,
    run_train,
    run_ui,
    run_verify_resume,
)
from dnt_scale.distributed import output


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
