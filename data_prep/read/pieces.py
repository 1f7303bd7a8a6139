"""The pieces of a unit: some MB of raw documents, cheap to make, for a worker to parse."""

import codecs
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import orjson

from data_prep.read import oversize
from data_prep.read.streams import File, Stored, seekable, unpacked

PIECE_BYTES = 4 << 20
RAW_BYTES = 64 << 10
BATCH_ROWS = 256
# What a text takes beside its bytes: a column of nulls must end in pieces too.
TEXT_BYTES = 64


@dataclass(frozen=True)
class Unit:
    """What is read as one stream: text files of a source, or one file of JSON lines or parquet.

    Of a plain file of JSON lines it may be a range: the lines whose first byte is in [start, end).
    """

    source: str
    files: tuple[File, ...]
    start: int = 0
    end: int | None = None


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
    """A document: a text file or a part of one (`line` is 0), or a parquet row (from 1); None for a null."""

    file: str
    line: int
    raw: bytes | None


class Piece(NamedTuple):
    """Either `lines`, whole lines of JSON of the file `name`, or `texts`; and what was found wrong when it was cut.

    first_line: number of the first line, counted from 1 at byte `start` of the file.
    line_count: newlines that were read for it.
    input_bytes: stored bytes of the unit read since the previous piece.
    """

    number: int
    name: str
    first_line: int = 1
    lines: bytes = b""
    texts: tuple[Text, ...] = ()
    line_count: int = 0
    input_bytes: int = 0
    start: int = 0
    findings: tuple[Finding, ...] = ()


def read_pieces(unit: Unit, text_field: str = "text") -> Iterator[Piece]:
    """The pieces of a unit, of about PIECE_BYTES, or of one longer document; a function of the unit's content alone.

    Documents above MAX_DOCUMENT bytes are cut (data_prep.read.oversize); nothing larger is held in memory, but for a
    row of parquet, which its library reads whole.

    Raises ValueError naming the file if it is missing, cannot be read, is damaged or changed, or is parquet without a
    string column `text_field`.
    """
    match unit.files[0].kind:
        case "text":
            pieces = _gathered(_text_files(unit))
        case "parquet":
            pieces = _gathered(_rows(unit.files[0], text_field))
        case "jsonl":
            pieces = _json_lines(unit, text_field)
    before = 0
    for number, (piece, position) in enumerate(pieces):
        yield piece._replace(number=number, input_bytes=position - before)
        before = position


def _gathered(items: Iterable[tuple[Text | Finding, int]]) -> Iterator[tuple[Piece, int]]:
    """Pieces out of (a text or a finding, stored bytes read)."""
    texts: list[Text] = []
    findings: list[Finding] = []
    size = position = 0
    for item, position in items:
        if isinstance(item, Finding):
            findings.append(item)
            continue
        length = len(item.raw or b"") + TEXT_BYTES
        if texts and size + length > PIECE_BYTES:
            yield Piece(0, texts[0].file, texts=tuple(texts), findings=tuple(findings)), position
            texts, findings, size = [], [], 0
        texts.append(item)
        size += length
    if texts:
        yield Piece(0, texts[0].file, texts=tuple(texts), findings=tuple(findings)), position


def _text_files(unit: Unit) -> Iterator[tuple[Text | Finding, int]]:
    before = 0
    for file in unit.files:
        with closing(Stored(file)) as stored:
            for item in _parts(file.name, 0, unpacked(file, stored)):
                yield item, before + stored.position
            before += stored.position


def _parts(name: str, line: int, chunks: Iterable[bytes]) -> Iterator[Text | Finding]:
    """A document, or the parts of one that is too large and a finding."""
    count = size = 0
    for part in oversize.cut_text(chunks):
        yield Text(name, line, part)
        count += 1
        size += len(part)
    if count > 1:
        yield _cut(name, line, size)


def _rows(file: File, text_field: str) -> Iterator[tuple[Text | Finding, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    with seekable(file) as raw:
        try:
            # A column of a row group as a stream, not whole.
            parquet = pq.ParquetFile(raw, buffer_size=1 << 20, pre_buffer=False)
            rows = parquet.metadata.num_rows
            _check_column(file, parquet.schema_arrow, text_field)
            for batch in parquet.iter_batches(BATCH_ROWS, columns=[text_field], use_threads=False):
                column = batch.column(0)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                for value in column.cast(pa.large_binary()).to_pylist():
                    row += 1
                    for item in [Text(file.name, row, None)] if value is None else _parts(file.name, row, [value]):
                        yield item, file.size * row // rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file.path}: damaged after row {row}: {error}; expected a whole parquet file, make it again"
            ) from error


def _check_column(file: File, schema: Any, text_field: str) -> None:
    import pyarrow as pa

    if text_field not in schema.names:
        raise ValueError(
            f"{file.path}: found no column {text_field!r}, but {', '.join(map(repr, schema.names)) or 'none at all'}; "
            "name the column of the text with --text-field"
        )
    kind = schema.field(text_field).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if value not in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()):
        raise ValueError(
            f"{file.path}: found column {text_field!r} of type {kind}, expected string; "
            "name the column of the text with --text-field"
        )


def _json_lines(unit: Unit, text_field: str) -> Iterator[tuple[Piece, int]]:
    [file] = unit.files
    first_line = 1
    with closing(Stored(file, max(unit.start - 1, 0))) as stored:
        for run in _runs(_lines_in_range(unpacked(file, stored), unit)):
            piece = Piece(0, file.name, first_line, start=unit.start)
            if isinstance(run, bytes):
                piece = piece._replace(lines=run, line_count=run.count(b"\n"))
                yield piece, _read_of(unit, stored)
            else:
                piece = piece._replace(line_count=run.newlines)
                with run.file:
                    for part in _long_line(run.file, piece, text_field):
                        yield part, _read_of(unit, stored)
            first_line += piece.line_count


def _read_of(unit: Unit, stored: Stored) -> int:
    return (stored.position if unit.end is None else min(stored.position, unit.end)) - unit.start


def _lines_in_range(chunks: Iterator[bytes], unit: Unit) -> Iterator[bytes]:
    """The unit's lines, out of chunks that begin one byte before it (that byte may be a newline)."""
    position = max(unit.start - 1, 0)
    begun = not unit.start
    for chunk in chunks:
        if not begun:
            skipped = chunk.find(b"\n") + 1
            begun = bool(skipped)
            skipped = skipped or len(chunk)
            position += skipped
            if unit.end is not None and position >= unit.end:
                return
            chunk = chunk[skipped:]
        # The last line is the one whose newline is at end - 1 or, the first such, after it.
        if unit.end is not None and (stop := chunk.find(b"\n", max(unit.end - 1 - position, 0))) >= 0:
            yield chunk[: stop + 1]
            return
        position += len(chunk)
        yield chunk


class _LongLine(NamedTuple):
    """A line that is too large to hold, in a temporary file, without its newline."""

    file: IO[bytes]
    newlines: int


def _runs(chunks: Iterator[bytes]) -> Iterator[bytes | _LongLine]:
    """Runs of whole lines, of PIECE_BYTES or less, or of one line, up to MAX_DOCUMENT, that is longer; longer lines."""
    held: list[bytes] = []
    size = 0
    long = False  # what is held is PIECE_BYTES or more of one line
    for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        if size < PIECE_BYTES or (long and b"\n" not in chunk and size <= oversize.MAX_DOCUMENT):
            continue
        block, start = b"".join(held), 0
        long = False
        while len(block) - start >= PIECE_BYTES:
            end = block.rfind(b"\n", start, start + PIECE_BYTES) + 1
            end = end or block.find(b"\n", start + PIECE_BYTES, start + oversize.MAX_DOCUMENT + 1) + 1
            if end:
                yield block[start:end]
                start = end
            elif len(block) - start <= oversize.MAX_DOCUMENT:
                long = True
                break
            else:
                spooled, block = _spool(block[start:], chunks)
                start = 0
                yield spooled
        held, size = [block[start:]], len(block) - start
    if size:
        yield b"".join(held)


def _spool(begun: bytes, chunks: Iterator[bytes]) -> tuple[_LongLine, bytes]:
    """A line that begins with `begun`, and what was read behind it. The file is the caller's to close."""
    file = tempfile.TemporaryFile()  # noqa: SIM115
    rest = begun
    while rest and (newline := rest.find(b"\n")) < 0:
        file.write(rest)
        rest = next(chunks, b"")
    if not rest:
        return _LongLine(file, 0), b""
    file.write(rest[:newline])
    return _LongLine(file, 1), rest[newline + 1 :]


def _long_line(file: IO[bytes], piece: Piece, text_field: str) -> Iterator[Piece]:
    """One piece for each part of the text in a long line, as if each were a line of JSON."""
    line, size = piece.first_line, file.tell()
    file.seek(0)
    raw = file.read(RAW_BYTES)
    start = len(codecs.BOM_UTF8) if line == 1 and not piece.start and raw.startswith(codecs.BOM_UTF8) else 0
    findings = [Finding("byte_order_mark", piece.name, line, "a byte order mark")] if start else []
    try:
        place = oversize.find_text(file, start, text_field)
    except oversize.Malformed as error:
        findings.append(Finding("malformed_json", piece.name, line, str(error), raw, size))
        yield piece._replace(findings=tuple(findings))
        return
    if place is None:
        detail = f"a line of {size:,} bytes without a string {text_field!r}"
        findings.append(Finding("no_text", piece.name, line, detail, raw, size))
        yield piece._replace(findings=tuple(findings))
        return
    body_bytes = place[1] - place[0]
    if body_bytes > oversize.MAX_DOCUMENT:
        findings.append(_cut(piece.name, line, body_bytes))
    for body in oversize.cut_string(file, *place):
        yield piece._replace(lines=b'{%b:"%b"}' % (orjson.dumps(text_field), body), findings=tuple(findings))
        piece, findings = piece._replace(line_count=0), []


def _cut(name: str, line: int, size: int) -> Finding:
    return Finding("cut", name, line, f"{size:,} bytes, cut in documents of at most {oversize.MAX_DOCUMENT:,}")
