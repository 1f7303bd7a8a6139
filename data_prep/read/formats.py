"""File formats of rows, each known by its suffix. Text and JSON are in pieces.py."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from data_prep.read import parquet
from data_prep.read.raw import Finding, Text
from data_prep.read.streams import File


class RowFormat(NamedTuple):
    """A format of rows with named fields, one of which is the text.

    suffix: what the names of its files end in, in lower case.
    read_rows: given a file and the name of the field, yields (a text or a finding, how many of the
        file's bytes were read by then) row by row; of what is no file of the format it raises
        ValueError naming the file, what was found and what to do.
    """

    suffix: str
    read_rows: Callable[[File, str], Iterator[tuple[Text | Finding, int]]]


# By the kind that their files get. The names of chunks are made of it too, so a kind never changes
# its name; whoever changes what is read out of a file raises VERSION in data_prep/chunks.py.
ROW_FORMATS: dict[str, RowFormat] = {
    "parquet": RowFormat(".parquet", parquet.read_rows),
}


def row_suffixes() -> tuple[str, ...]:
    """Return the suffixes of all formats of rows."""
    return tuple(each.suffix for each in ROW_FORMATS.values())
