"""The pieces of a unit: some MB of raw documents, cheap to make, for a worker to parse."""

import codecs
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import IO, NamedTuple

import orjson

from data_prep.read import oversize
from data_prep.read.formats import ROW_FORMATS
from data_prep.read.raw import Finding, Text, cut_finding, cut_parts
from data_prep.read.sniff import HEAD_BYTES, Form, as_lines, sniff_file, stand_in, transcoded
from data_prep.read.streams import File, Stored, packing, unpacked

PIECE_BYTES = 4 << 20
RAW_BYTES = 64 << 10
# What a text takes beside its bytes: a column of nulls must end in pieces too.
TEXT_BYTES = 64


@dataclass(frozen=True)
class Unit:
    """What is read as one stream: text files of a source, or one file of JSON lines or parquet.

    Of a plain file of JSON lines it may be a range: the lines whose first byte is in [start, end).
    """

    source: str
    files: Sequence[File]
    start: int = 0
    end: int | None = None


class Piece(NamedTuple):
    """Either `lines`, whole lines of JSON of the file `name`, or `texts`; and what was found wrong
    when it was cut.

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
    """Yield the pieces of a unit, of about PIECE_BYTES, or of one longer document; a function of
    the unit's content alone.

    Documents above MAX_DOCUMENT bytes are cut (data_prep.read.oversize); nothing larger is held in
    memory, but for a row of parquet, which its library reads whole.

    A file that is hardly the text that was meant (data_prep.read.sniff) gives a finding and nothing
    else.

    Raises ValueError naming the file if it is missing, cannot be read, is damaged or changed, or is
    parquet without a string column `text_field`.
    """
    match unit.files[0].kind:
        case "text" | "json":
            pieces = _gathered(_files(unit, text_field))
        case "jsonl":
            pieces = _json_lines(unit, text_field)
        case _:
            pieces = _gathered(_rows(unit.files[0], text_field))
    before = 0
    for number, (piece, position) in enumerate(pieces):
        yield piece._replace(number=number, input_bytes=position - before)
        before = position


def _gathered(items: Iterable[tuple[Text | Finding, int]]) -> Iterator[tuple[Piece, int]]:
    """Yield pieces out of (a text or a finding, stored bytes read)."""
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
    if texts or findings:
        name = texts[0].file if texts else findings[0].file
        yield Piece(0, name, texts=tuple(texts), findings=tuple(findings)), position


class Opened(NamedTuple):
    """The content of a file in UTF-8, of which `form` it is, and what is to be said of it."""

    form: Form
    chunks: Iterator[bytes]
    findings: tuple[Finding, ...] = ()


def opened(file: File, stored: Stored, text_field: str) -> Opened:
    """Return what a file of text or JSON holds, by its content. Raises ValueError as `read_pieces`
    does."""
    if packing(file.name):
        first = stored.peek(HEAD_BYTES)
        if found := stand_in(file.name, file.kind, first, len(first) < HEAD_BYTES, text_field):
            return Opened("nothing", iter(()), (Finding("stand_in", file.name, 0, found),))
    chunks = unpacked(file, stored)
    begun, size = [], 0
    for chunk in chunks:
        begun.append(chunk)
        size += len(chunk)
        if size >= HEAD_BYTES:
            break
    head = b"".join(begun)[:HEAD_BYTES]
    found_out = sniff_file(file.name, file.kind, head, size < HEAD_BYTES, text_field)
    if found_out.kind:
        return Opened(
            "nothing", iter(()), (Finding(found_out.kind, file.name, 0, found_out.detail),)
        )
    chunks = itertools.chain(begun, chunks)
    findings = []
    if found_out.encoding != "utf-8":
        chunks = transcoded(chunks, found_out.encoding)
        kind = found_out.encoding[: len("utf16") + 1].replace("-", "")
        findings.append(Finding(kind, file.name, 0, f"a byte order mark of {found_out.encoding}"))
    if found_out.form in ("values", "elements"):
        chunks = as_lines(chunks, found_out.form)
    return Opened(found_out.form, chunks, tuple(findings))


def _files(unit: Unit, text_field: str) -> Iterator[tuple[Text | Finding, int]]:
    before = 0
    for file in unit.files:
        with closing(Stored(file)) as stored:
            content = opened(file, stored, text_field)
            end = before + (file.size or stored.position)
            for finding in content.findings:
                yield finding, end if content.form == "nothing" else before + stored.position
            for item in _content(file, stored, content, text_field):
                yield item, before + stored.position
            before = end if file.size else before + stored.position


def _content(
    file: File, stored: Stored, content: Opened, text_field: str
) -> Iterator[Text | Finding]:
    """Yield a text file's document or its parts, or the lines of JSON that it holds."""
    if content.form == "text":
        yield from cut_parts(file.name, 0, content.chunks)
    elif content.form != "nothing":
        line = 1
        for run in _runs(content.chunks):
            if isinstance(run, bytes):
                yield Text(file.name, line, run, json=True)
                line += run.count(b"\n")
            else:
                with run.file:
                    for part in _long_line(run.file, Piece(0, file.name, line), text_field):
                        yield from part.findings
                        if part.lines:
                            yield Text(file.name, line, part.lines, json=True)
                line += run.newlines
    if stored.trailing:
        yield _trailing(file, stored)


def _trailing(file: File, stored: Stored) -> Finding:
    return Finding(
        "trailing_bytes", file.name, 0, f"{stored.trailing:,} bytes after the last whole member"
    )


def _rows(file: File, text_field: str) -> Iterator[tuple[Text | Finding, int]]:
    with closing(Stored(file)) as stored:
        findings = _instead_of_rows(file, stored.peek(HEAD_BYTES), text_field)
    for finding in findings:
        yield finding, file.size
        return
    yield from ROW_FORMATS[file.kind].read_rows(file, text_field)


def _instead_of_rows(file: File, first: bytes, text_field: str) -> tuple[Finding, ...]:
    """Return what a file holds that is hardly one of rows, by its beginning."""
    if not first:
        return (Finding("empty", file.name, 0, "an empty file"),)
    found = stand_in(file.name, file.kind, first, len(first) < HEAD_BYTES, text_field)
    return (Finding("stand_in", file.name, 0, found),) if found else ()


def first_findings(file: File, text_field: str) -> tuple[Finding, ...]:
    """Return what is to be said of a file by its beginning. Raises ValueError as `read_pieces`
    does."""
    with closing(Stored(file)) as stored:
        if file.kind in ROW_FORMATS:
            return _instead_of_rows(file, stored.peek(HEAD_BYTES), text_field)
        return opened(file, stored, text_field).findings


def _json_lines(unit: Unit, text_field: str) -> Iterator[tuple[Piece, int]]:
    [file] = unit.files
    first_line = 1
    with closing(Stored(file, max(unit.start - 1, 0))) as stored:
        # Only a file that is plain lines is cut in ranges (data_prep.read.inputs).
        content = (
            Opened("lines", unpacked(file, stored))
            if unit.start
            else opened(file, stored, text_field)
        )
        findings = content.findings
        for run in _runs(_lines_in_range(content.chunks, unit)):
            piece = Piece(0, file.name, first_line, start=unit.start, findings=findings)
            findings = ()
            if isinstance(run, bytes):
                piece = piece._replace(lines=run, line_count=run.count(b"\n"))
                yield piece, _read_of(unit, stored)
            else:
                piece = piece._replace(line_count=run.newlines)
                with run.file:
                    for part in _long_line(run.file, piece, text_field):
                        yield part, _read_of(unit, stored)
            first_line += piece.line_count
        if stored.trailing:
            findings = (*findings, _trailing(file, stored))
        if findings:
            read = stored_bytes(unit) if content.form == "nothing" else _read_of(unit, stored)
            yield Piece(0, file.name, first_line, start=unit.start, findings=findings), read


def stored_bytes(unit: Unit) -> int:
    """Return how many bytes reading a unit takes from disk or network; 0 if they are not known."""
    return sum(file.size for file in unit.files) if unit.end is None else unit.end - unit.start


def _read_of(unit: Unit, stored: Stored) -> int:
    return (stored.position if unit.end is None else min(stored.position, unit.end)) - unit.start


def _lines_in_range(chunks: Iterator[bytes], unit: Unit) -> Iterator[bytes]:
    """Yield the unit's lines, out of chunks that begin one byte before it (that byte may be a
    newline)."""
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
        if (
            unit.end is not None
            and (stop := chunk.find(b"\n", max(unit.end - 1 - position, 0))) >= 0
        ):
            yield chunk[: stop + 1]
            return
        position += len(chunk)
        yield chunk


class _LongLine(NamedTuple):
    """A line that is too large to hold, in a temporary file, without its newline."""

    file: IO[bytes]
    newlines: int


def _runs(chunks: Iterator[bytes]) -> Iterator[bytes | _LongLine]:
    """Yield runs of whole lines, of PIECE_BYTES or less, or of one line, up to MAX_DOCUMENT, that
    is longer; and longer lines."""
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
            end = (
                end or block.find(b"\n", start + PIECE_BYTES, start + oversize.MAX_DOCUMENT + 1) + 1
            )
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
    """Write a line that begins with `begun` to a file, and return also what was read behind it. The
    file is the caller's to close."""
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
    """Yield one piece for each part of the text in a long line, as if each were a line of JSON."""
    line, size = piece.first_line, file.tell()
    file.seek(0)
    raw = file.read(RAW_BYTES)
    start = (
        len(codecs.BOM_UTF8)
        if line == 1 and not piece.start and raw.startswith(codecs.BOM_UTF8)
        else 0
    )
    findings = list(piece.findings)
    if start:
        findings.append(Finding("byte_order_mark", piece.name, line, "a byte order mark"))
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
        findings.append(cut_finding(piece.name, line, body_bytes))
    for body in oversize.cut_string(file, *place):
        yield piece._replace(
            lines=b'{%b:"%b"}' % (orjson.dumps(text_field), body), findings=tuple(findings)
        )
        piece, findings = piece._replace(line_count=0), []
