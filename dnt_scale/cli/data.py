"""`dnt data ...`: prepare, tokenizer, verify, info; images.py has `dnt data images`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dnt_scale.arguments import Parser, number, path, path_or_url, whole, word
from dnt_scale.cli.data_options import add_places_of_work, add_workers, make_set, task_of
from dnt_scale.cli.images import add_images

if TYPE_CHECKING:
    from data_prep.options import PrepareOptions

DATA_HELP = """\
A set is a folder: manifest.json, tokenizer.model, WebDataset tars {train,val}-000000.tar of token
rows, report.html. A set of images has an index beside each tar, and no tokenizer.

  dnt data prepare books/ notes.md 'dumps/*.jsonl.zst' --out data/mine
  dnt data prepare 's3://bucket/web/*.parquet' --clean web --dedup near --out data/web
  dnt data images photos/train --val photos/val --out data/photos
  dnt data verify data/mine
  dnt data info data/mine
"""


PREPARE_HELP = """\
INPUT may be .txt .md, source files, .jsonl .json, each also .gz .zst .bz2 .xz; .parquet; folders;
quoted globs; URLs. The set appears whole or not at all. After Ctrl-C, kill -9 or an error the same
command goes on where it was, and the result is the same to the byte. DIR/report.html tells what was
read, dropped and kept; DIR/rejects.jsonl holds findings.

  dnt data prepare books/ --out data/mine --clean light --dedup near --dry-run
  dnt data prepare more/ --append data/mine --out data/mine-2            # prepares more/ only
  zstdcat dump.jsonl.zst | dnt data prepare - --out data/dump

On several machines that share a folder, or as a job array:

  dnt data tokenizer books/ --out books.model
  dnt data prepare books/ --out data/mine --tokenizer books.model --tasks 16 --task 0
  ...                                                          # and 1 to 15, at any time
  dnt data prepare books/ --out data/mine --tokenizer books.model      # when all are done

On a SLURM cluster all of that by jobs; asked again, the same command tells how far they are:

  dnt data prepare books/ --out data/mine --workers 8 --cluster gpu cluster.partition=cpu
"""


# commands that end where nobody reads their output any more (`| head`); the others do what they are
# for all the same
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


def add_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `dnt data` and its commands."""
    data = commands.add_parser(
        "data",
        help="turn text or images into shards, check them",
        epilog=DATA_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data_commands = data.add_subparsers(required=True, metavar="COMMAND")
    add_prepare(data_commands)
    add_images(data_commands)
    tokenizer = data_commands.add_parser(
        "tokenizer",
        help="train a tokenizer on a corpus, as prepare would",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_corpus_options(tokenizer)
    tokenizer.add_argument(
        "--out", required=True, type=path, metavar="FILE", help="the .model file to write"
    )
    tokenizer.set_defaults(run=data_tokenizer)
    verify = data_commands.add_parser(
        "verify", help="re-read every byte of a set against its manifest"
    )
    verify.add_argument("folder", type=path, metavar="SET")
    verify.set_defaults(run=data_verify)
    info = data_commands.add_parser("info", help="print what a set holds")
    info.add_argument("folder", type=path, metavar="SET")
    info.set_defaults(run=data_info)


def add_prepare(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `dnt data prepare`."""
    prepare = commands.add_parser(
        "prepare",
        help="text, JSON lines and parquet to a set",
        epilog=PREPARE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_corpus_options(prepare)
    prepare.add_argument(
        "--out", required=True, type=path, metavar="DIR", help="folder of the new set"
    )
    prepare.add_argument(
        "--append",
        type=path,
        metavar="SET",
        help="go on from this set: its rows, then INPUT's, with its options",
    )
    prepare.add_argument(
        "--tokenizer", type=path, metavar="FILE", help="use this SentencePiece model, train none"
    )
    prepare.add_argument(
        "--encoder",
        choices=["sentencepiece", "kitoken"],
        default="sentencepiece",
        help="kitoken: some three times as fast on bpe, checked on this corpus, given up at the "
        "first difference",
    )
    prepare.add_argument(
        "--dedup", choices=["none", "exact", "near"], help="leave out copies (default: none)"
    )
    prepare.add_argument(
        "--seq-len",
        type=whole(1, 1_000_000),
        metavar="N",
        help="predicted tokens in a row (default: 1024)",
    )
    prepare.add_argument(
        "--packing",
        choices=["concat", "best_fit"],
        help="concat: documents end to end (default); best_fit: whole documents in a row, with "
        "padding",
    )
    add_places_of_work(prepare)
    prepare.set_defaults(run=data_prepare)


def add_corpus_options(command: Parser) -> None:
    command.add_argument(
        "inputs",
        nargs="+",
        type=path_or_url,
        metavar="INPUT",
        help='files, folders, globs, URLs (s3:// gs:// https://); "-" is stdin',
    )
    command.add_argument(
        "--text-field",
        type=word,
        default="text",
        metavar="NAME",
        help="field or column with the text",
    )
    command.add_argument(
        "--clean",
        type=path_or_url,
        metavar="RULES",
        help="cleaning rules: web, light, none, or a YAML file",
    )
    command.add_argument(
        "--strict", action="store_true", help="stop at the first finding in the input"
    )
    command.add_argument(
        "--vocab-size",
        type=whole(1, 10_000_000),
        metavar="N",
        help="pieces to train (default: 16384)",
    )
    command.add_argument(
        "--kind", choices=["bpe", "unigram"], help="of the trained tokenizer (default: bpe)"
    )
    command.add_argument(
        "--val-fraction",
        type=number(0, 1, below=True),
        metavar="F",
        help="share of documents held out (default: 0.005)",
    )
    add_workers(command)


def corpus_options(options: argparse.Namespace, **more: object) -> "PrepareOptions":
    """What was given; what was not has the defaults of PrepareOptions."""
    from data_prep.options import PrepareOptions

    given = {
        name: getattr(options, name) for name in ("vocab_size", "kind", "val_fraction", "workers")
    }
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
    from data_prep.report.terminal import print_info, print_plan

    task = task_of(options)
    reject_conflicting_options(options)
    asked = corpus_options(
        options,
        out=options.out,
        append=options.append,
        tokenizer=options.tokenizer,
        encoder=options.encoder,
        dedup=options.dedup,
        seq_len=options.seq_len,
        packing=options.packing,
        task=task,
    )
    return make_set(options, asked, prepare, print_plan, print_info)


def reject_conflicting_options(options: argparse.Namespace) -> None:
    """Raises ValueError for options of `prepare` that --append or --tokenizer settles, where
    another value is asked.
    """
    for option, names in (
        ("append", ("tokenizer", "vocab_size", "kind")),
        ("tokenizer", ("vocab_size", "kind")),
    ):
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
                raise ValueError(
                    f"--{option}: found {found}, but {options.append} was made with {value}; leave "
                    "it out"
                )


def data_tokenizer(options: argparse.Namespace) -> int:
    from data_prep.pipeline import train_tokenizer
    from data_prep.report.markup import visible

    work = options.out.with_name(f"{options.out.name}.work")
    tokenizer = train_tokenizer(corpus_options(options, out=work), options.out)
    print(
        f"{visible(str(options.out))}: {tokenizer.vocab_size:,} pieces, sha256 {tokenizer.sha256}"
    )
    return 0


def data_verify(options: argparse.Namespace) -> int:
    from data_prep.images import terminal as images
    from data_prep.report import terminal as text
    from data_prep.report.markup import visible

    kind = images if holds_images(options.folder) else text
    problems = kind.verify_with_progress(options.folder)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 2
    print(f"{visible(str(options.folder))}: whole")
    return 0


def data_info(options: argparse.Namespace) -> int:
    from data_prep.images import terminal as images
    from data_prep.report import terminal as text

    kind = images if holds_images(options.folder) else text
    kind.print_info(options.folder)
    return 0


def holds_images(folder: Path) -> bool:
    """Whether a set is one of images, by its manifest."""
    from data_prep.images.shards import FORMAT
    from data_prep.set_files import format_of

    return format_of(folder) == FORMAT
