"""What the beginning of a file says it is, whatever its name says: text, JSON lines, other JSON, or
nothing to read."""

import codecs
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import orjson

from data_prep.read.streams import packing

HEAD_BYTES = 1 << 18
SMALL_BYTES = 4096
SAMPLE_LINES = 50
SAMPLE_CHARS = 4096

# The longer first: UTF-32's begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
MAGIC = {
    b"\x1f\x8b\x08": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
    b"PAR1": "parquet",
    b"ARROW1": "Arrow",
    b"Obj\x01": "Avro",
    b"ORC\x01": "ORC",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"%PDF-": "PDF",
    b"{\\rtf": "RTF",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old Office format",
    b"\x7fELF": "ELF",
    b"\xca\xfe\xba\xbe": "Java classes or Mach-O",
    b"\xcf\xfa\xed\xfe": "Mach-O",
    b"\0asm": "WebAssembly",
    b"SQLite format 3\0": "SQLite",
    b"\x93NUMPY": "NumPy",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b"OggS\0": "Ogg",
    b"ID3\x03": "MP3",
    b"ID3\x04": "MP3",
    b"fLaC\0": "FLAC",
}
_LONGER_MAGIC = {
    re.compile(rb"BZh[1-9]1AY&SY"): "bzip2",
    re.compile(rb".{257}ustar[\0 ]", re.DOTALL): "tar",
    re.compile(rb"RIFF....(?:WAVE|WEBP|AVI )", re.DOTALL): "RIFF",
    re.compile(rb"\0\0..ftyp", re.DOTALL): "MP4",
    re.compile(rb"\x80[\x02-\x05][\x95c}\]]"): "a pickle",
}
_READ_AS = {"gzip": ".gz", "zstd": ".zst", "xz": ".xz", "bzip2": ".bz2", "parquet": ".parquet"}
# Files of these are pages by right.
MARKUP = (".html", ".htm", ".xhtml", ".xml", ".vue", ".php", ".svg", ".js", ".jsx", ".ts", ".tsx")
_POINTERS = {
    re.compile(
        rb"version https://(?:git-lfs\.github|hawser)\.com/spec/v"
    ): "a pointer of Git LFS; `git lfs pull` gets it",
    re.compile(rb"# xet version \d"): "a pointer of Xet; download it again",
    re.compile(
        rb"(?:\S*/)?(?:\.git)?/annex/objects/\S+\s*\Z"
    ): "a pointer of git-annex; `git annex get` gets the file",
}
_XML_ERROR = re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?<Error(?:\s[^>]*)?>\s*<Code>\s*([^<]{1,80})")
_PAGE = re.compile(
    rb"\s*(?:<\?xml[^>]*>\s*|<!--.*?-->\s*)*(?:<!doctype\s+html|<html[\s>])",
    re.IGNORECASE | re.DOTALL,
)
_TITLE = re.compile(rb"<(?:title|h1)[^>]*>([^<]{0,200})", re.IGNORECASE)
_ERROR_TITLE = re.compile(
    rb"\b[45]\d\d\b|error|not found|forbidden|denied|unavailable|unauthori[sz]ed|bad "
    rb"gateway|timed? ?out|moved|redirect"
    rb"|sign in|log ?in|just a moment|attention required|captcha|rate limit|too many "
    rb"requests|quota|virus scan",
    re.IGNORECASE,
)
# What some servers send instead of a file, whole.
_ERROR_LINE = re.compile(
    rb"\s*(?:(?:HTTP )?(?:Error )?[45]\d\d:? ?)?"
    rb"(?:entry not found|not found|file not found|repository not found|forbidden"
    rb"|unauthori[sz]ed|access denied|bad gateway|service unavailable|gateway time-?out|internal "
    rb"server error"
    rb"|too many requests|invalid username or password|rate limit exceeded"
    rb"|access to (?:model|dataset) .{1,200})[.!]?\s*\Z",
    re.IGNORECASE,
)
_ERROR_KEYS = {
    "error",
    "errors",
    "message",
    "detail",
    "code",
    "status",
    "statusCode",
    "documentation_url",
    "requestId",
}

# lines: an object a line. values: objects after one another, over several lines. elements: an array
# of objects.
Form = Literal["text", "lines", "values", "elements", "nothing"]


class Sniffed(NamedTuple):
    """What a file is: how to read it and in which encoding; or, if there is nothing to read, of
    which kind of finding (data_prep.read.documents) that is, and what was found."""

    form: Form
    encoding: str = "utf-8"
    kind: str = ""
    detail: str = ""


def sniff_file(name: str, kind: str, head: bytes, whole: bool, text_field: str) -> Sniffed:
    """Return what a file is by its unpacked beginning: `head` is HEAD_BYTES, or all there is
    (`whole`).

    Names count little: of a file of `kind` jsonl whatever is not clearly something else is read as
    lines, one of kind json must hold records, and any other is text unless it clearly holds records
    with a text.
    """
    if not head:
        return Sniffed(
            "nothing",
            kind="empty",
            detail="an empty document" if kind == "text" else "an empty file",
        )
    # Lines of JSON stay that, whatever their first line looks like.
    is_sure = kind == "jsonl" and _json_form(head, whole)[1] > 0
    encoding = "utf-8" if is_sure else _encoding(head)
    if encoding != "utf-8":
        end = len(head) if whole else len(head) // 4 * 4  # where a character may end
        head = head[:end].decode(encoding, "replace").encode()
    elif not is_sure and (found := magic_of(head)):
        suffix = "" if packing(name) else _READ_AS.get(found, "")
        advice = f"; with the suffix {suffix} it is read" if suffix else ""
        return Sniffed("nothing", kind="not_text", detail=f"the beginning of {found} data{advice}")
    head = head.removeprefix(codecs.BOM_UTF8)
    if found := stand_in(name, kind, head, whole, text_field):
        return Sniffed("nothing", kind="stand_in", detail=found)
    form, objects = _json_form(head, whole)
    keys = b"|".join(
        re.escape(json.dumps(text_field, ensure_ascii=ascii_only).encode())
        for ascii_only in (False, True)
    )
    named = re.search(rb"(?:%b)\s*:\s*\"" % keys, head) is not None
    is_records = named or objects > 1
    if kind == "jsonl":
        close = {"values": b"}", "elements": b"]"}.get(form)
        is_other = close is not None and (not whole or head.rstrip()[-1:] == close)
        return Sniffed(form if is_other else "lines", encoding)
    if kind == "json":
        if form == "text":
            return _no_records("no JSON object and no array of any")
        if is_records or not whole:
            return Sniffed(form, encoding)
        return _no_records(f"JSON without a string {text_field!r}")
    holds_text = is_records if form == "lines" else named
    return Sniffed(form if holds_text else "text", encoding)


def _no_records(detail: str) -> Sniffed:
    return Sniffed("nothing", kind="other_json", detail=detail)


def stand_in(name: str, kind: str, head: bytes, whole: bool, text_field: str) -> str:
    """Return what stands here in place of the file, or "": a pointer that some tool left, or a
    server's word that there is none. `head` is as for `sniff_file`, or the beginning of a file as
    it is stored."""
    small = whole and len(head) <= SMALL_BYTES
    if small:
        for pattern, what in _POINTERS.items():
            if pattern.match(head):
                return what
        if _ERROR_LINE.match(head):
            return f"a server's answer: {head.strip()[:80].decode(errors='replace')}"
        value = _object(head)
        if value and text_field not in value and value.keys() <= _ERROR_KEYS:
            return f"a server's answer: {str(next(iter(value.values())))[:80]}"
    if found_code := _XML_ERROR.match(head):
        return f"a server's answer: {found_code[1].decode(errors='replace').strip()}"
    bare = name.lower().removesuffix(packing(name))
    if not bare.endswith(MARKUP) and _PAGE.match(head[:SMALL_BYTES]):
        found_title = _TITLE.search(head[: 4 * SMALL_BYTES])
        title = found_title[1] if found_title else b""
        if kind != "text" or packing(name) or _ERROR_TITLE.search(title):
            return (
                "an HTML page: "
                f"{' '.join(title.decode(errors='replace').split()) or 'without a title'}"
            )
    return ""


def holds_records(head: bytes, whole: bool) -> bool:
    """Whether JSON is several records, whatever their fields, and not one object."""
    form, objects = _json_form(head.removeprefix(codecs.BOM_UTF8), whole)
    return form == "elements" or objects > 1


_BAD = "data_prep.bad_byte"
codecs.register_error(_BAD, lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


def transcoded(chunks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """Yield the text in chunks of UTF-8, without its mark; what is no text becomes a byte that is
    none in UTF-8 either."""
    decoder = codecs.getincrementaldecoder(encoding)(_BAD)
    first = True
    for chunk in chunks:
        if text := decoder.decode(chunk):
            if encoded := (text.removeprefix("\ufeff") if first else text).encode(
                errors="surrogateescape"
            ):
                yield encoded
            first = False
    if end := decoder.decode(b"", True).encode(errors="surrogateescape"):
        yield end


_OUTSIDE = re.compile(rb'["{}\[\],\n\r]')
_INSIDE = re.compile(rb'["\\]')


def as_lines(chunks: Iterable[bytes], form: Form) -> Iterator[bytes]:
    """Yield JSON values (form "values"), or the elements of arrays ("elements"), a line each,
    however they were written.

    It looks at brackets and strings alone, so what is no JSON comes out as lines that are none.
    """
    base = 1 if form == "elements" else 0
    depth = 0
    in_string = escaped = False
    for chunk in chunks:
        at = 1 if escaped else 0
        escaped = False
        kept, start = [], 0
        while found := (_INSIDE if in_string else _OUTSIDE).search(chunk, at):
            byte, before, at = found[0], found.start(), found.end()
            instead = byte
            if byte == b'"':
                in_string = not in_string
            elif byte == b"\\":
                escaped = at == len(chunk)
                at += 1
            elif byte in (b"{", b"["):
                instead = b"" if depth < base else byte
                depth += 1
            elif byte in (b"}", b"]"):
                depth = max(0, depth - 1)
                instead = byte if depth >= base else b""
                instead += b"\n" if not depth else b""
            elif byte == b",":
                instead = byte if depth > base else b"\n" if base and depth else b""
            else:
                instead = b" " if depth else b""
            if instead != byte:
                kept += [chunk[start:before], instead]
                start = at
        kept.append(chunk[start:])
        if joined := b"".join(kept):
            yield joined


def _encoding(head: bytes) -> str:
    """Return the encoding by a mark at the beginning, if what follows is text in it; else UTF-8."""
    mark = next((mark for mark in MARKS if head.startswith(mark)), None)
    if mark is None:
        return "utf-8"
    text = head[len(mark) :][: 4 * SAMPLE_CHARS].decode(MARKS[mark], "replace")[:SAMPLE_CHARS]
    odd = sum(
        unicodedata.category(char) in ("Cc", "Cn", "Co", "Cs") and char not in "\t\n\r\f"
        for char in text
    )
    return MARKS[mark] if (odd + text.count("\ufffd")) * 20 <= len(text) + 20 else "utf-8"


def magic_of(head: bytes) -> str:
    """Return what data begins so, that is no text; empty: none that is known."""
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), "") or next(
        (name for pattern, name in _LONGER_MAGIC.items() if pattern.match(head)), ""
    )


def _json_form(head: bytes, whole: bool) -> tuple[Form, int]:
    """Return how the records stand in a file that may be JSON, and how many of its first lines are
    objects."""
    lines = head.split(b"\n")
    if not whole and len(lines) > 1:
        lines.pop()
    sample = [line for line in lines if line.strip()][:SAMPLE_LINES]
    objects = sum(_object(line) is not None for line in sample)
    if objects and objects * 2 >= len(sample):
        return "lines", objects
    if re.match(rb"\s*\[\s*\{", head):
        return "elements", 0
    if re.match(rb'\s*\{\s*"', head):
        over_lines = len(sample) > 1 and sample[0].rstrip()[-1:] in b"{[,:"
        return "values" if over_lines or re.search(rb'\}\s*,?\s*\{\s*"', sample[0]) else "lines", 0
    return "text", 0


def _object(raw: bytes) -> dict[str, Any] | None:
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        try:
            value = json.loads(raw.decode(errors="replace"), parse_int=str, parse_float=str)
        except (json.JSONDecodeError, RecursionError):
            return None
    return value if isinstance(value, dict) else None
