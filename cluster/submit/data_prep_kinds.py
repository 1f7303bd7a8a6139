"""What jobs that make a set of text and of images differ in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from data_prep import pipeline
from data_prep.images import pipeline as image_pipeline
from data_prep.images import terminal as image_terminal
from data_prep.images.options import ImageOptions
from data_prep.options import PrepareOptions
from data_prep.read.streams import is_url
from data_prep.report import terminal

AnyOptions = PrepareOptions | ImageOptions


class Kind(NamedTuple):
    """What is done with the options of a kind of set; `places` are those that name files."""

    prepare: Callable[[Any], object]
    count_units: Callable[[Any], int]
    print_plan: Callable[[Any], None]
    print_info: Callable[[Path], None]
    places: tuple[str, ...]


TEXT = Kind(
    pipeline.prepare,
    pipeline.count_units,
    terminal.print_plan,
    terminal.print_info,
    ("out", "append", "tokenizer"),
)
IMAGES = Kind(
    image_pipeline.prepare_images,
    image_pipeline.count_units,
    image_terminal.print_plan,
    image_terminal.print_info,
    ("out", "append", "val"),
)


def kind_of(options: AnyOptions) -> Kind:
    """Return the kind of set that options are for."""
    return TEXT if isinstance(options, PrepareOptions) else IMAGES


def option_tag(value: Any) -> str:
    """Return which options these are, as an object or as JSON has them."""
    named = value if isinstance(value, dict) else vars(value)
    return "images" if "resize_shorter" in named else "text"


def trains_tokenizer(options: AnyOptions) -> bool:
    """Return whether there is a tokenizer to be trained first."""
    return isinstance(options, PrepareOptions) and not (options.tokenizer or options.append)


def places(options: AnyOptions) -> list[tuple[str, Path]]:
    """Return the INPUTs and options that are places on this machine's disks, with their names."""
    named = [("INPUT", item) for item in options.inputs]
    named += [(name, getattr(options, name)) for name in kind_of(options).places]
    return [(name, Path(item).absolute()) for name, item in named if item and not is_url(str(item))]
