"""Documents out of pieces, and findings: what was wrong with the input, counted, kept, and never in the way."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import orjson

from data_prep.read.pieces import RAW_BYTES, Finding, Piece

Action = Literal["kept", "repaired", "dropped", "cut"]

# Of each kind: what is done about it, what was expected instead, and how many records of a piece are kept.
KINDS: dict[str, tuple[Action, str, int]] = {
    "broken_utf8": ("repaired", "UTF-8", 1000),
    "lone_surrogate": ("repaired", "surrogates in pairs", 1000),
    "nul": ("kept", "text without NUL characters", 20),
    "byte_order_mark": ("kept", "text without a byte order mark", 20),
    "crlf": ("kept", "lines that end in \\n alone", 20),
    "empty": ("dropped", "some text", 20),
    "empty_line": ("dropped", "no empty lines", 20),
    "malformed_json": ("dropped", "a JSON object", 1000),
    "no_text": ("dropped", "a JSON object or a row with a string of text", 1000),
    "cut": ("cut", "a smaller document", 1000),
}
SURROGATE = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    """One document: its file, its line (0 for a text file, the row's number for parquet), and its text, which has no
    lone surrogates."""

    file: str
    line: int
    text: str


@dataclass
class Findings:
    """What was found in a piece: exact counts by kind, and a record of each up to the kind's limit.

    A record is {"kind", "file", "line", "action": "kept" | "repaired" | "dropped" | "cut", "detail", "raw"}; "raw" is
    what was dropped, up to RAW_BYTES of it, what is no UTF-8 with backslashes.
    """

    counts: Counter[str] = field(default_factory=Counter)
    records: list[dict[str, Any]] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        """Count a finding, and keep a record of it if it is within the limit."""
        action, _, limit = KINDS[finding.kind]
        self.counts[finding.kind] += 1
        if self.counts[finding.kind] > limit:
            return
        raw, detail = finding.raw, finding.detail
        if (left_out := max(finding.size, len(raw)) - RAW_BYTES) > 0:
            detail += f"; {left_out:,} bytes are left out here"
        record = {"kind": finding.kind, "file": finding.file, "line": finding.line, "action": action, "detail": detail}
        self.records.append(record | {"raw": raw[:RAW_BYTES].decode("utf-8", "backslashreplace")})

    def to_json(self) -> dict[str, Any]:
        """{"counts", "records"} of plain values."""
        return {"counts": dict(self.counts), "records": self.records}


def read_documents(piece: Piece, text_field: str, findings: Findings, strict: bool) -> Iterator[Document]:
    """The documents of a piece, in order; adds what is wrong with them to `findings`.

    Text is left exactly as it is, line ends and byte order marks included, but for broken UTF-8 and lone surrogates,
    which become U+FFFD. Empty documents, and lines and rows without text, are dropped.

    Raises ValueError in `strict`, naming file and line, for the first finding but "cut".
    """

    def note(finding: Finding) -> None:
        if strict and finding.kind != "cut":
            raise ValueError(_complaint(finding, piece.start))
        findings.add(finding)

    for finding in piece.findings:
        note(finding)
    yield from _of_texts(piece, note) if piece.texts else _of_lines(piece, text_field, note)


Note = Callable[[Finding], None]


def _of_texts(piece: Piece, note: Note) -> Iterator[Document]:
    for file, line, raw in piece.texts:
        if raw is None:
            note(Finding("no_text", file, line, "a null"))
            continue
        text, finding = _decoded(raw, file, line)
        if finding:
            note(finding)
        if _remark(text, file, line, note):
            yield Document(file, line, text)


def _of_lines(piece: Piece, text_field: str, note: Note) -> Iterator[Document]:
    lines = piece.lines.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for line, raw in enumerate(lines, piece.first_line):
        try:
            text = orjson.loads(raw)[text_field]
        except (orjson.JSONDecodeError, LookupError, TypeError):
            text = None
        if type(text) is not str:
            text = _from_odd_line(raw, piece, line, text_field, note)
        if text is not None and _remark(text, piece.name, line, note):
            yield Document(piece.name, line, text)


def _from_odd_line(raw: bytes, piece: Piece, line: int, text_field: str, note: Note) -> str | None:
    """The text of a line that is not just a JSON object with a text, if it can be had."""
    dropped = raw
    if line == 1 and not piece.start and raw.startswith(codecs.BOM_UTF8):
        note(Finding("byte_order_mark", piece.name, line, "a byte order mark"))
        raw = raw.removeprefix(codecs.BOM_UTF8)
    if not raw.strip():
        note(Finding("empty_line", piece.name, line, "an empty line", dropped))
        return None
    decoded, broken = _decoded(raw, piece.name, line)
    try:
        value = orjson.loads(decoded)
    except orjson.JSONDecodeError:
        # orjson refuses half a surrogate pair, NaN and very large numbers, which the standard library reads.
        try:
            value = json.loads(decoded, parse_int=str, parse_float=str)
        except json.JSONDecodeError as error:
            start = decoded[:40] + ("..." if len(decoded) > 40 else "")
            detail = f"{start!r} ({error.msg} at character {error.pos})"
            note(Finding("malformed_json", piece.name, line, detail, dropped))
            return None
        except RecursionError:
            note(Finding("malformed_json", piece.name, line, "JSON that is nested too deeply to be read", dropped))
            return None
    text = value.get(text_field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        note(Finding("no_text", piece.name, line, _instead_of_text(value, text_field), dropped))
        return None
    if broken:
        note(broken)
    clean, lone = SURROGATE.subn("\ufffd", text)
    if lone:
        note(Finding("lone_surrogate", piece.name, line, f"{lone} halves of surrogate pairs"))
    return clean


def _instead_of_text(value: Any, text_field: str) -> str:
    if not isinstance(value, dict):
        return f"a JSON {type(value).__name__}"
    if text_field in value:
        return f"{text_field!r} of type {type(value[text_field]).__name__}"
    return f"the fields {', '.join(map(repr, list(value)[:8])) or '(none)'}"


def _decoded(raw: bytes, file: str, line: int) -> tuple[str, Finding | None]:
    try:
        return raw.decode(), None
    except UnicodeDecodeError as error:
        text = raw.decode(errors="replace")
        places = text.count("\ufffd") - raw.count("\ufffd".encode())
        detail = f"byte 0x{raw[error.start]:02x} at {error.start}, the first of {places} places that are no UTF-8"
        return text, Finding("broken_utf8", file, line, detail)


def _remark(text: str, file: str, line: int, note: Note) -> bool:
    """Note what is odd about a text; whether there is any text."""
    if not text:
        note(Finding("empty", file, line, "an empty document"))
        return False
    if "\0" in text:
        note(Finding("nul", file, line, f"{text.count(chr(0))} NUL characters"))
    if "\r" in text and "\r\n" in text:  # one character is looked for much faster than two
        note(Finding("crlf", file, line, f"{text.count(chr(13) + chr(10))} lines that end in \\r\\n"))
    if text.startswith("\ufeff"):
        note(Finding("byte_order_mark", file, line, "a byte order mark"))
    return True


def _complaint(finding: Finding, start: int) -> str:
    place = ""
    if finding.line:
        unit = "row" if finding.file.lower().endswith(".parquet") else "line"
        place = f" {unit} {finding.line}{f' after byte {start}' if start else ''}:"
    return (
        f"{finding.file}:{place} found {finding.detail}, expected {KINDS[finding.kind][1]}; "
        "mend or remove it, or leave out --strict"
    )
