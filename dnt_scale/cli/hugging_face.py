"""`dnt export` and `dnt import`: folders of Hugging Face's transformers."""

import argparse

from dnt_scale.arguments import Parser, number, path
from dnt_scale.cli.run_options import add_run, add_tokenizer_data

EXPORT_HELP = """\
A checkpoint's weights (their average where train.ema keeps one), settings, tokenizer and a
model card, as `from_pretrained` loads them: as GPT-2 or Llama where every setting coincides, else
with the model's code in the folder (trust_remote_code=True).

  dnt export runs/demo --to hf demo-hf
  dnt export runs/large --to hf large-hf --dtype bf16 --shard-gb 2
"""

IMPORT_HELP = """\
Weights only, from what `dnt export` has written, or from a GPT-2 or Llama in safetensors. What
follows are the overrides that describe the run; the model is the folder's, but for what they say of
it. `dnt train` with the same ones, and those of the model that are printed, begins from these
weights.

  dnt import demo-hf run.name=more data.path=data/mine
"""


def add_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `dnt export` and `dnt import`."""
    export = commands.add_parser(
        "export",
        help="write a run's weights for Hugging Face's transformers",
        epilog=EXPORT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(export)
    export.add_argument("--to", choices=["hf"], required=True, help="hf: transformers")
    export.add_argument("out", type=path, metavar="DIR", help="folder to make")
    export.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights (default: fp32)"
    )
    export.add_argument(
        "--shard-gb",
        type=number(0.001),
        default=5.0,
        metavar="N",
        help="GB a file of weights, at most (default: 5)",
    )
    add_tokenizer_data(export)
    export.set_defaults(run=run_export)
    imports = commands.add_parser(
        "import",
        help="begin a run with the weights of such a folder",
        epilog=IMPORT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    imports.add_argument("folder", type=path, metavar="DIR", help="folder of transformers")
    imports.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="as of `dnt train`")
    imports.set_defaults(run=run_import)


def run_export(options: argparse.Namespace) -> int:
    from dnt_scale.tools.hugging_face.export import export
    from dnt_scale.tools.inference import checkpoint_of

    print(
        export(
            checkpoint_of(options.folder, options.step),
            options.out,
            dtype=options.dtype,
            shard_gb=options.shard_gb,
            data=options.data,
        )
    )
    return 0


def run_import(options: argparse.Namespace) -> int:
    from dnt_scale.tools.hugging_face.import_weights import import_weights

    print(import_weights(options.folder, options.overrides))
    return 0
