"""What `dnt data images` is asked for, checked before anything is read or written."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from data_prep.images.decode import Encoding
from data_prep.images.shards import Dedup, ImageManifest, Reencoded
from data_prep.process_pool import cpus


@dataclass(frozen=True)
class ImageOptions:
    """What `prepare_images` needs to know.

    inputs: folders of class folders, WebDataset tars, parquet, IDX files; globs, URLs.
    append: an image set to go on from, with its options; `out` is a new set, and only `inputs` are
    prepared.
    val: another INPUT whose images are the validation split, or a .txt file of names, a line each,
    of images of `inputs` that are. Without it, `val_fraction` of the images are held out.
    label_field: the field or column with the label, where its name does not tell.
    resize_shorter, reencode, quality: see data_prep.images.decode.Encoding.
    dedup: "exact" leaves out images whose pixels are those of one before.
    strict: the first image that cannot be kept as it is, is an error.
    seed: of the order of the samples.
    task: (i, n) makes the chunks of the i-th of n parts of the plan, and nothing else. workers
    (default: one for each CPU this process may use) changes the time and nothing else.
    """

    inputs: Sequence[str | Path]
    out: Path
    append: Path | None = None
    val: str | None = None
    val_fraction: float = 0.05
    label_field: str | None = None
    resize_shorter: int | None = None
    reencode: Reencoded | None = None
    quality: int = 95
    dedup: Dedup = "none"
    strict: bool = False
    workers: int | None = None
    shard_bytes: int = 256_000_000
    seed: int = 0
    task: tuple[int, int] | None = None

    @property
    def encoding(self) -> Encoding:
        """Return how images are stored."""
        return Encoding(self.resize_shorter, self.reencode, self.quality)

    @property
    def val_list(self) -> Path | None:
        """Return the file of names of validation images, if `val` is one."""
        return Path(self.val) if self.val and self.val.endswith(".txt") else None

    @property
    def processes(self) -> int:
        """Return how many processes to use."""
        return self.workers or cpus()


def checked(options: ImageOptions, base: ImageManifest | None) -> ImageOptions:
    """Return the options, with those of the set to append to filled in.

    Raises:
        ValueError: one of them cannot be, or two contradict each other.
    """
    _check_numbers(options)
    for name, choices in (("dedup", get_args(Dedup)), ("reencode", (None, *get_args(Reencoded)))):
        if (found := getattr(options, name)) not in choices:
            expected = " or ".join(repr(each) for each in choices if each)
            raise ValueError(f"{name}: found {found!r}, expected {expected}")
    if not options.inputs:
        raise ValueError("no input given: name at least one folder, file or glob")
    out = Path(options.out)
    for item in (*options.inputs, *([options.val] if options.val else [])):
        if Path(item).resolve() == out.resolve():
            raise ValueError(
                f"{out}: is an INPUT, and cannot be --out as well; choose another folder"
            )
    return _as_before(options, base) if base else options


def read_val_list(options: ImageOptions) -> frozenset[str]:
    """Return the names of validation images in a file of names. Raises ValueError if it cannot be
    read or has none."""
    if not options.val_list:
        return frozenset()
    try:
        lines = options.val_list.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{options.val_list}: cannot be read: {error}; check the file") from error
    names = frozenset(line.strip() for line in lines if line.strip())
    if not names:
        raise ValueError(f"{options.val_list}: holds no names, expected one a line")
    return names


def _check_numbers(options: ImageOptions) -> None:
    """Raise ValueError for a number that is none or out of bounds."""
    task, tasks = options.task or (None, None)
    limits = [
        ("resize_shorter", options.resize_shorter, 1, 1 << 14),
        ("quality", options.quality, 1, 100),
        ("workers", options.workers, 1, 1024),
        ("shard_bytes", options.shard_bytes, 1, 1 << 40),
        ("seed", options.seed, 0, (1 << 63) - 1),
        ("tasks", tasks, 1, 1_000_000),
        ("task", task, 0, tasks - 1 if tasks is not None else 0),
    ]
    for name, value, low, high in limits:
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name}: found {value!r}, expected {low} to {high}")
    if not 0 <= options.val_fraction < 1:
        raise ValueError(
            f"val: found {options.val_fraction!r}, expected 0 (no validation split) to below 1, or "
            "a folder, a file or a .txt list of names"
        )


def _as_before(options: ImageOptions, base: ImageManifest) -> ImageOptions:
    """Return the options with what the set to append to was made with."""
    before = base.options
    fixed: dict[str, Any] = {
        "resize_shorter": before.resize_shorter,
        "reencode": before.reencode,
        "quality": before.quality,
        "dedup": before.dedup,
        "shard_bytes": before.shard_bytes,
        "seed": before.seed,
    }
    if options.val is None and before.val_fraction is not None:
        fixed["val_fraction"] = before.val_fraction
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for name, value in fixed.items():
        if (asked := getattr(options, name)) not in (defaults[name], value):
            raise ValueError(
                f"{name}: found {asked}, but {options.append} was made with {value}; leave the "
                "option out"
            )
    return dataclasses.replace(options, **fixed)
