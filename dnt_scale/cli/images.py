"""`dnt data images`: images with a class each to a set of shards."""

import argparse
from typing import Any

from dnt_scale.arguments import Parser, path, path_or_url, whole, word
from dnt_scale.cli.data_options import add_places_of_work, add_workers, make_set, task_of

IMAGES_HELP = """\
INPUT may be a folder of class folders (INPUT/CLASS/.../IMAGE.jpg), WebDataset tars (.jpg .png .webp
with .cls or .json), .parquet with an image and a label column, IDX files (the MNIST family; labels
beside them); quoted globs; URLs. Images go into the set byte for byte, unless they cannot be
trained on as they are, or --resize-shorter or --reencode is given. What does not decode is left
out; DIR/report.html tells what was found, DIR/rejects.jsonl names it. After Ctrl-C, kill -9 or an
error the same command goes on where it was, and the result is the same to the byte.

  dnt data images imagenet/train --val imagenet/val --out data/imagenet
  dnt data images birds/ --val 0.1 --resize-shorter 256 --dedup exact --out data/birds
  dnt data images 's3://bucket/train-*.tar' --val 's3://bucket/val-*.tar' --out data/web
  dnt data images more/ --append data/birds --out data/birds-2          # prepares more/ only

On several machines that share a folder, or as a job array:

  dnt data images birds/ --out data/birds --tasks 16 --task 0          # and 1 to 15, at any time
  dnt data images birds/ --out data/birds                              # when all are done

On a SLURM cluster all of that by jobs; asked again, the same command tells how far they are:

  dnt data images birds/ --out data/birds --workers 8 --cluster gpu cluster.partition=cpu
"""


def add_images(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `dnt data images`."""
    images = commands.add_parser(
        "images",
        help="class folders, tars, parquet and IDX files of images to a set",
        epilog=IMAGES_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    images.add_argument(
        "inputs",
        nargs="+",
        type=path_or_url,
        metavar="INPUT",
        help="files, folders, globs, URLs (s3:// gs:// https://)",
    )
    images.add_argument(
        "--out", required=True, type=path, metavar="DIR", help="folder of the new set"
    )
    images.add_argument(
        "--append",
        type=path,
        metavar="SET",
        help="go on from this image set: its images, then INPUT's, with its options",
    )
    images.add_argument(
        "--val",
        type=path_or_url,
        metavar="VAL",
        help="validation images: an INPUT of their own, a .txt list of names below INPUT, or a "
        "share of the images (default: 0.05)",
    )
    images.add_argument(
        "--label-field",
        type=word,
        metavar="NAME",
        help="field of .json or column with the label, where several may be it",
    )
    images.add_argument(
        "--resize-shorter",
        type=whole(1, 1 << 14),
        metavar="N",
        help="shrink larger images to a shorter side of N pixels",
    )
    images.add_argument("--reencode", choices=["jpg", "webp"], help="store all images as this")
    images.add_argument(
        "--quality", type=whole(1, 100), metavar="Q", help="of JPEG and WebP (default: 95)"
    )
    images.add_argument(
        "--dedup",
        choices=["none", "exact"],
        help="leave out images with the pixels of one before (default: none)",
    )
    images.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first image that cannot be kept as it is",
    )
    images.add_argument(
        "--shard-mb", type=whole(1, 1 << 20), metavar="N", help="MB of a tar (default: 256)"
    )
    images.add_argument(
        "--seed",
        type=whole(0, (1 << 63) - 1),
        metavar="N",
        help="of the order of the images (default: 0)",
    )
    add_workers(images)
    add_places_of_work(images)
    images.set_defaults(run=data_images)


def data_images(options: argparse.Namespace) -> int:
    from data_prep.images.options import ImageOptions
    from data_prep.images.pipeline import prepare_images
    from data_prep.images.terminal import print_info, print_plan

    names = ["append", "label_field", "resize_shorter", "reencode", "quality", "dedup", "seed"]
    names += ["workers"]
    given: dict[str, Any] = {name: getattr(options, name) for name in names}
    given |= {"shard_bytes": options.shard_mb and options.shard_mb * 1_000_000, **val(options.val)}
    given["task"] = task_of(options)
    asked = ImageOptions(
        inputs=options.inputs,
        out=options.out,
        strict=options.strict,
        **{name: value for name, value in given.items() if value is not None},
    )
    return make_set(options, asked, prepare_images, print_plan, print_info)


def val(word: str | None) -> dict[str, Any]:
    """What --val gives: a share of the images, or a place of others."""
    try:
        return {} if word is None else {"val_fraction": float(word)}
    except ValueError:
        return {"val": word}
