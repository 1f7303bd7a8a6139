"""What readers give: raw documents, not yet parsed or decoded, and what they found wrong."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from data_prep.read import oversize


class Finding(NamedTuple):
    """Something wrong in the input, of a kind in data_prep.read.documents.

    `raw` is what is dropped, or the beginning of it; then `size` is how many bytes it has.
    """

    kind: str
    file: str
    line: int
    detail: str
    raw: bytes = b""
    size: int = 0


class Text(NamedTuple):
    """A document: a text file or a part of one (`line` is 0), or a parquet row (from 1), None for a
    null. Or, if it is `json`, whole lines of JSON, of which `line` is the number of the first."""

    file: str
    line: int
    raw: bytes | None
    json: bool = False


def cut_parts(name: str, line: int, chunks: Iterable[bytes]) -> Iterator[Text | Finding]:
    """Yield a document, or the parts of one that is too large and a finding."""
    count = size = 0
    for part in oversize.cut_text(chunks):
        yield Text(name, line, part)
        count += 1
        size += len(part)
    if count > 1:
        yield cut_finding(name, line, size)


def cut_finding(name: str, line: int, size: int) -> Finding:
    """Return the finding that a document of `size` bytes was cut."""
    return Finding(
        "cut", name, line, f"{size:,} bytes, cut in documents of at most {oversize.MAX_DOCUMENT:,}"
    )
