"""`dnt checkpoint ...`: inspect, verify, diff, convert."""

import argparse
import sys
from pathlib import Path

from dnt_scale.arguments import Parser, path, path_or_url, word

CHECKPOINT_HELP = """\
PATH is a run's folder, a folder of checkpoints, one step-NNNNNNNN, or a URL of these (s3:// gs://).
Where it holds several checkpoints, verify takes all, the others the newest.

  dnt checkpoint inspect runs/demo
  dnt checkpoint inspect runs/demo/checkpoints/step-00000500 --tensors
  dnt checkpoint verify s3://bucket/demo
  dnt checkpoint diff runs/demo runs/demo-again      # exit status 0: equal, 1: not, 2: error
  dnt checkpoint convert runs/demo demo.safetensors
  dnt checkpoint convert demo.safetensors run.name=more data.path=data/mine
"""


CONVERT_HELP = """\
From a checkpoint to one safetensors file, whole or not at all: weights only, by the parameters'
names (tok_emb.weight), the model's configuration in the metadata; or with --full all tensors, by
the checkpoint's names (model.tok_emb.weight, momentum_buffer.tok_emb.weight).

  dnt checkpoint convert runs/demo demo.safetensors
  dnt checkpoint convert runs/demo/checkpoints/step-00000500 everything.safetensors --full

From such a file to the checkpoint of step 0 of a new run, with zero momentum. What follows are the
overrides that describe the run; the model is the metadata's, but for what they say of it.
`dnt train` with the same ones, and those of the model that are printed, begins from these weights.

  dnt checkpoint convert demo.safetensors run.name=more data.path=data/mine
  dnt train run.name=more data.path=data/mine model=dnt_nano
"""


def add_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `dnt checkpoint` and its commands."""
    checkpoint = commands.add_parser(
        "checkpoint",
        help="look into checkpoints, check and convert them",
        epilog=CHECKPOINT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checkpoint_commands = checkpoint.add_subparsers(required=True, metavar="COMMAND")
    inspect = checkpoint_commands.add_parser(
        "inspect", help="what a checkpoint is: step, tokens, size, who wrote it"
    )
    inspect.add_argument(
        "path",
        type=path_or_url,
        metavar="PATH",
        help="run, folder of checkpoints, step-NNNNNNNN, or a URL of these",
    )
    inspect.add_argument(
        "--tensors", action="store_true", help="read all tensors: shape, dtype, norm, min and max"
    )
    inspect.set_defaults(run=checkpoint_inspect)
    check = checkpoint_commands.add_parser(
        "verify",
        help="re-read every byte: sha256 of each file, and that the parts make up each tensor",
    )
    check.add_argument(
        "path",
        type=path_or_url,
        metavar="PATH",
        help="a run or folder (all its checkpoints), step-NNNNNNNN, or a URL",
    )
    check.set_defaults(run=checkpoint_verify)
    diff = checkpoint_commands.add_parser(
        "diff", help="compare two checkpoints bit for bit; exit status 0: equal, 1: not, 2: error"
    )
    diff.add_argument(
        "one",
        type=path_or_url,
        metavar="A",
        help="run, folder of checkpoints, step-NNNNNNNN, or a URL of these",
    )
    diff.add_argument("other", type=path_or_url, metavar="B")
    diff.set_defaults(run=checkpoint_diff)
    convert = checkpoint_commands.add_parser(
        "convert",
        help="to and from one safetensors file",
        epilog=CONVERT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument(
        "source",
        type=path_or_url,
        metavar="IN",
        help="run, folder of checkpoints, step-NNNNNNNN, URL; or .safetensors",
    )
    convert.add_argument(
        "target",
        nargs="+",
        type=word,
        metavar="OUT",
        help="a .safetensors file; or KEY=VALUE ... of a run",
    )
    convert.add_argument(
        "--full", action="store_true", help="optimizer buffers too (default: weights only)"
    )
    convert.set_defaults(run=checkpoint_convert)


def checkpoint_inspect(options: argparse.Namespace) -> int:
    from dnt_scale.checkpoint.inspection import inspect

    inspect(options.path, tensors=options.tensors)
    return 0


def checkpoint_verify(options: argparse.Namespace) -> int:
    from dnt_scale.checkpoint.inspection import verify

    found = verify(options.path)
    for place, problems in found.items():
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        if not problems:
            print(f"{place}: whole")
    return 2 if any(found.values()) else 0


def checkpoint_diff(options: argparse.Namespace) -> int:
    from dnt_scale.checkpoint.inspection import diff

    return 0 if diff(options.one, options.other) else 1


def checkpoint_convert(options: argparse.Namespace) -> int:
    from dnt_scale.tools.convert_weights import from_file, to_file

    source, target = options.source, options.target
    if Path(source).is_file():
        if options.full or not all("=" in word for word in target):
            raise ValueError(
                f"{source} is a file: after it come KEY=VALUE ... of the run that begins from it, "
                "no --full"
            )
        print(from_file(Path(source), target))
        return 0
    if len(target) > 1 or Path(target[0]).suffix != ".safetensors":
        raise ValueError(
            f"{' '.join(target)}: expected one file NAME.safetensors to write (what follows a file "
            f"that exists are overrides, but {source} is none)"
        )
    print(to_file(source, path(target[0]), full=options.full))
    return 0
