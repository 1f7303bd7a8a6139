"""What `prepare` is asked for, checked before anything is read or written."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from data_prep import shards
from data_prep.process_pool import cpus
from data_prep.read.documents import SURROGATE
from data_prep.shards import PARTIAL, Dedup, Manifest, Packing
from data_prep.tokenizer import Encoder, Kind, Tokenizer
from data_prep.train_tokenizer import SAMPLE_BYTES
from data_prep.verify import check_file


@dataclass(frozen=True)
class PrepareOptions:
    """What `prepare` needs to know.

    inputs: files, folders, globs, URLs, "-" for stdin.
    append: a set to go on from, with its tokenizer and options; `out` is a new set, and only
    `inputs` are prepared.
    tokenizer: a SentencePiece model to use; without one, a `kind` model of `vocab_size` pieces is
    trained on about `sample_bytes` of the corpus (default: SAMPLE_BYTES of the kind).
    val_fraction: share of the documents held out.
    rules: a YAML file of cleaning rules (data_prep.clean.cleaner).
    dedup: "exact" or "near" (MinHash) duplicates are left out; the first copy in reading order
    stays.
    encoder: "kitoken" is checked against SentencePiece, and given up at the first difference.
    strict: the first finding in the input (data_prep.read.documents) is an error.
    task: (i, n) makes the chunks of the i-th of n parts of the plan, and nothing else. workers
    (default: one for each CPU this process may use) changes the time and nothing else.
    """

    inputs: Sequence[str | Path]
    out: Path
    append: Path | None = None
    vocab_size: int = 16384
    tokenizer: Path | None = None
    kind: Kind = "bpe"
    seq_len: int = 1024
    packing: Packing = "concat"
    val_fraction: float = 0.005
    rules: Path | None = None
    dedup: Dedup = "none"
    text_field: str = "text"
    encoder: Encoder = "sentencepiece"
    strict: bool = False
    workers: int | None = None
    shard_bytes: int = 256 << 20
    sample_bytes: int | None = None
    task: tuple[int, int] | None = None


def checked(options: PrepareOptions, base: Manifest | None) -> PrepareOptions:
    """Return the options, with those of the set to append to filled in.

    Raises:
        ValueError: one of them cannot be, or two contradict each other.
    """
    _check_numbers(options)
    _check_choices(options)
    _check_texts(options)
    if base:
        options = _as_before(options, base)
    if options.tokenizer:
        Tokenizer.load(options.tokenizer, options.encoder)
    _check_inputs(options)
    return options


def _check_numbers(options: PrepareOptions) -> None:
    """Raise ValueError for a number that is none or out of bounds."""
    task, tasks = options.task or (None, None)
    limits = [
        ("seq_len", options.seq_len, 1, 1_000_000),
        ("vocab_size", options.vocab_size, 1, 10_000_000),
        ("workers", options.workers, 1, 1024),
        ("shard_bytes", options.shard_bytes, 1, 1 << 40),
        ("sample_bytes", options.sample_bytes, 1, 1 << 40),
        ("tasks", tasks, 1, 1_000_000),
        ("task", task, 0, tasks - 1 if tasks is not None else 0),
    ]
    for name, value, low, high in limits:
        if value is None and name not in ("seq_len", "vocab_size", "shard_bytes"):
            continue
        if type(value) is not int or not low <= value <= high:
            whole = "" if type(value) is int else ", a whole number"
            raise ValueError(f"{name}: found {value!r}, expected {low} to {high}{whole}")
    fraction = options.val_fraction
    if type(fraction) not in (int, float) or not 0 <= fraction < 1:
        raise ValueError(
            f"val_fraction: found {fraction!r}, expected 0 (no validation split) to below 1"
        )


def _check_choices(options: PrepareOptions) -> None:
    """Raise ValueError for a word that is none of those an option takes."""
    words = {"kind": Kind, "packing": Packing, "dedup": Dedup, "encoder": Encoder}
    for name, choices in words.items():
        if (found := getattr(options, name)) not in get_args(choices):
            expected = " or ".join(map(repr, get_args(choices)))
            raise ValueError(f"{name}: found {found!r}, expected {expected}")


def _check_inputs(options: PrepareOptions) -> None:
    """Raise ValueError for inputs that do not go with each other, with --out or with tasks."""
    inputs, out = [str(item) for item in options.inputs], Path(options.out)
    if inputs.count("-") > 1:
        raise ValueError(
            "-: found more than once, but standard input can be read once; give it once"
        )
    if any(item != "-" and Path(item).resolve() == out.resolve() for item in inputs):
        raise ValueError(f"{out}: is an INPUT, and cannot be --out as well; choose another folder")
    if not options.task:
        return
    if not options.tokenizer and not any((out / PARTIAL).glob("tokenizer-*.model")):
        raise ValueError(
            "task: tasks need a tokenizer that all of them share; train one with "
            "`dnt data tokenizer`, then give --tokenizer FILE"
        )
    if "-" in inputs:
        raise ValueError("task: stdin cannot be shared by tasks; write it to a file first")


def _check_texts(options: PrepareOptions) -> None:
    """Raise ValueError for a field or a path that can name none."""
    field = options.text_field
    if not isinstance(field, str) or not field or SURROGATE.search(field):
        raise ValueError(
            f"text_field: found {field!r}, expected the name of a field or column, in UTF-8"
        )
    for name in ("out", "append", "tokenizer", "rules"):
        path = getattr(options, name)
        if path is not None and ("\0" in str(path) or not str(path)):
            raise ValueError(
                f"{name}: found {str(path)!r}, expected a path, in which no NUL can be"
            )


def _as_before(options: PrepareOptions, base: Manifest) -> PrepareOptions:
    """Return the options with what the set to append to was made with."""
    assert options.append
    folder = Path(options.append)
    for name, sha256 in (
        (shards.TOKENIZER, base.tokenizer.sha256),
        (shards.FINGERPRINTS, base.fingerprints),
    ):
        for problem in check_file(folder / name, sha256) if sha256 else ():
            raise ValueError(
                f"{problem}; the set to append to must be whole: copy or prepare it again"
            )
    fixed: dict[str, Any] = {
        "seq_len": base.seq_len,
        "packing": base.packing,
        "val_fraction": base.options.val_fraction,
        "shard_bytes": base.options.shard_bytes,
        "dedup": base.options.dedup,
        "tokenizer": folder / shards.TOKENIZER,
    }
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for name, value in fixed.items():
        asked = getattr(options, name)
        if asked not in (defaults[name], value):
            raise ValueError(
                f"{name}: found {asked}, but {folder} was made with {value}; leave the option out"
            )
    return dataclasses.replace(options, **fixed)


def sample_bytes(options: PrepareOptions) -> int:
    """Return how many bytes of text a tokenizer is trained on."""
    return options.sample_bytes or SAMPLE_BYTES[options.kind]


def workers(options: PrepareOptions) -> int:
    """Return how many processes to use."""
    return options.workers or cpus()
