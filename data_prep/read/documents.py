"""Documents out of pieces, and findings: what was wrong with the input, counted, kept, and never in
the way."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import orjson

from data_prep.read.formats import row_suffixes
from data_prep.read.pieces import RAW_BYTES, Piece
from data_prep.read.raw import Finding, Text

Action = Literal["kept", "repaired", "dropped", "cut", "passed over"]

# Of each kind: what is done about it, what was expected instead, and how many records of a piece
# are kept.
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
    "utf16": ("repaired", "UTF-8", 1000),
    "utf32": ("repaired", "UTF-8", 1000),
    "other_encoding": ("dropped", "UTF-8", 1000),
    "not_text": ("dropped", "text", 1000),
    "stand_in": ("dropped", "the file itself", 1000),
    "other_json": ("dropped", "JSON objects with a string of text", 1000),
    "trailing_bytes": ("dropped", "nothing after the last whole member", 1000),
    # Found where the files are looked for.
    "other_suffix": ("passed over", "a suffix of text, JSON or parquet", 100),
    "card": ("passed over", "", 100),
    "hidden": ("passed over", "", 100),
    "prepared_set": ("passed over", "", 100),
    "dead_link": ("passed over", "a link to a file or folder", 1000),
    "not_a_file": ("passed over", "a file", 100),
    "beside_data": ("kept", "", 100),
}
# Of these a text is hardly the one that was meant; fewer places than FEW are the usual dirt.
EXCERPT_BYTES = 200  # so much of what is no text is kept to recognise it by
FEW = 4
BROKEN_PLACES = 0.01
BROKEN_CHARACTERS = 0.1
NULS = 0.1
# Escapes of ISO-2022 to characters of two bytes, which are all ASCII. ESC ( B is what terminals
# print.
ISO_2022 = re.compile(rb"\x1b\$[()]?[@-J]")
SURROGATE = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    """One document: its file, its line (0 for a text file, the row's number for parquet), and its
    text, which has no lone surrogates."""

    file: str
    line: int
    text: str


@dataclass
class Findings:
    """What was found in a piece: exact counts by kind, and a record of each up to the kind's limit.

    A record is {"kind", "file", "line", "action": one of Action, "detail", "raw"}; "raw" is
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
        record = {
            "kind": finding.kind,
            "file": finding.file,
            "line": finding.line,
            "action": action,
            "detail": detail,
        }
        self.records.append(record | {"raw": raw[:RAW_BYTES].decode("utf-8", "backslashreplace")})

    def to_json(self) -> dict[str, Any]:
        """Return {"counts", "records"} of plain values."""
        return {"counts": dict(self.counts), "records": self.records}


@dataclass
class LeftOut:
    """Counts of findings by kind, and where the first of each is."""

    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, str] = field(default_factory=dict)

    def add(self, findings: Findings) -> None:
        """Count what was found in a piece."""
        self.counts.update(findings.counts)
        for record in findings.records:
            self.named.setdefault(record["kind"], place_name(record["file"], record["line"]))


def place_name(file: str, line: int) -> str:
    """Return how a person is told of a document: line 0 is the whole file."""
    return f"{file}, line {line}" if line else file


def read_documents(
    piece: Piece, text_field: str, findings: Findings, strict: bool
) -> Iterator[Document]:
    """Yield the documents of a piece, in order; what is wrong with them is added to `findings`.

    Text is left exactly as it is, line ends and byte order marks included, but for broken UTF-8 and
    lone surrogates, which become U+FFFD. Empty documents, lines and rows without text, and what is
    hardly text are dropped.

    Raises ValueError in `strict`, naming file and line, for the first finding but "cut".
    """

    def note(finding: Finding) -> None:
        if strict and finding.kind != "cut":
            raise ValueError(_complaint(finding, piece.start))
        findings.add(finding)

    for finding in piece.findings:
        note(finding)
    if piece.lines:
        yield from _of_lines(piece, text_field, note)
    for text in piece.texts:
        if text.json:
            piece = Piece(0, text.file, text.line, lines=text.raw or b"")
            yield from _of_lines(piece, text_field, note)
        else:
            yield from _of_text(text, note)


Note = Callable[[Finding], None]


def _of_text(text: Text, note: Note) -> Iterator[Document]:
    file, line, raw, _ = text
    if raw is None:
        note(Finding("no_text", file, line, "a null"))
        return
    if b"\x1b" in raw and len(ISO_2022.findall(raw)) >= FEW:
        note(Finding("other_encoding", file, line, "the escapes of ISO-2022", raw[:EXCERPT_BYTES]))
        return
    decoded, finding = _decoded(raw, file, line)
    if finding:
        note(finding)
        if finding.kind == "other_encoding":
            return
    if _remark(decoded, file, line, note):
        yield Document(file, line, decoded)


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
    """Return the text of a line that is not just a JSON object with a text, if it can be had."""
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
        # orjson refuses half a surrogate pair, NaN and very large numbers, which the standard
        # library reads.
        try:
            value = json.loads(decoded, parse_int=str, parse_float=str)
        except json.JSONDecodeError as error:
            start = decoded[:40] + ("..." if len(decoded) > 40 else "")
            detail = f"{start!r} ({error.msg} at character {error.pos})"
            note(Finding("malformed_json", piece.name, line, detail, dropped))
            return None
        except RecursionError:
            note(
                Finding(
                    "malformed_json",
                    piece.name,
                    line,
                    "JSON that is nested too deeply to be read",
                    dropped,
                )
            )
            return None
    text = value.get(text_field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        note(Finding("no_text", piece.name, line, _instead_of_text(value, text_field), dropped))
        return None
    if broken:
        note(broken)
        if broken.kind == "other_encoding":
            return None
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
    """Return the text, with U+FFFD for what is no UTF-8, and a finding if there is any such: of
    much, that it is another encoding or no text."""
    try:
        return raw.decode(), None
    except UnicodeDecodeError as error:
        text = raw.decode(errors="replace")
        bad = text.count("\ufffd") - raw.count("\ufffd".encode())
        first = (
            f"byte 0x{raw[error.start]:02x} at {error.start}, the first of {bad} places that are "
            f"no UTF-8"
        )
        # A word in Cyrillic is one place, and so is a line in Chinese.
        places = min(bad, len(re.findall("\ufffd+", text)))
        if bad >= FEW and (
            places > BROKEN_PLACES * len(text) or bad > BROKEN_CHARACTERS * len(text)
        ):
            detail = f"{first}, of {len(text):,} characters"
            return text, Finding("other_encoding", file, line, detail, raw[:EXCERPT_BYTES])
        return text, Finding("broken_utf8", file, line, first)


def _remark(text: str, file: str, line: int, note: Note) -> bool:
    """Note what is odd about a text; whether there is any text."""
    if not text:
        note(Finding("empty", file, line, "an empty document"))
        return False
    if "\0" in text:
        nuls = text.count("\0")
        if nuls >= FEW and nuls > NULS * len(text):
            detail = (
                f"{nuls:,} NUL among {len(text):,} characters: binary, or UTF-16 without its mark"
            )
            note(Finding("not_text", file, line, detail, text[:EXCERPT_BYTES].encode()))
            return False
        note(Finding("nul", file, line, f"{nuls} NUL characters"))
    if "\r" in text and "\r\n" in text:  # one character is looked for much faster than two
        note(
            Finding("crlf", file, line, f"{text.count(chr(13) + chr(10))} lines that end in \\r\\n")
        )
    if text.startswith("\ufeff"):
        note(Finding("byte_order_mark", file, line, "a byte order mark"))
    return True


def _complaint(finding: Finding, start: int) -> str:
    place = ""
    if finding.line:
        unit = "row" if finding.file.lower().endswith(row_suffixes()) else "line"
        place = f" {unit} {finding.line}{f' after byte {start}' if start else ''}:"
    return (
        f"{finding.file}:{place} found {finding.detail}, expected {KINDS[finding.kind][1]}; "
        "mend or remove it, or leave out --strict"
    )
