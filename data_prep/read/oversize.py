"""Documents too large to hold are cut in parts that are whole characters and, joined, are the
document."""

import re
from collections.abc import Iterable, Iterator
from typing import IO

import orjson

MAX_DOCUMENT = 16 << 20
WINDOW = 1 << 20

# Strings as RFC 8259, section 7, has them; possessive, so that the length of a match takes no
# memory.
_BODY = re.compile(rb'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+')
_ESCAPE_BYTES = 6
_HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\Z")
_SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb"[^ \t\r\n,\]}]*+")
_INSIDE = re.compile(rb'[^"{}\[\]]*+')


class Malformed(Exception):
    """A line is no JSON object; the message says what was found and where."""


def cut_text(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield a text that comes in chunks in parts of at most MAX_DOCUMENT bytes; at least one part.

    It is cut after the last line end that fits, else after the last space, else between two
    characters.
    """
    held: list[bytes] = []
    size = 0
    for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        if size > MAX_DOCUMENT:
            block, start = b"".join(held), 0
            while len(block) - start > MAX_DOCUMENT:
                limit = start + MAX_DOCUMENT
                end = block.rfind(b"\n", start, limit) + 1 or block.rfind(b" ", start, limit) + 1
                end = end or _character(block, limit)
                yield block[start:end]
                start = end
            held, size = [block[start:]], len(block) - start
    yield b"".join(held)


def find_text(line: IO[bytes], start: int, field: str) -> tuple[int, int] | None:
    """Return where in a file the body of a JSON object's string `field` lies, or None if it has
    none; the last of several.

    The object is the file from `start` on. Takes little memory, whatever is how long. Of the values
    of other fields it checks strings and the number of brackets, no more. Raises Malformed.
    """
    scanner = _Scanner(line, start)
    found = None
    scanner.take(b"{")
    if scanner.peek() != b"}":
        while True:
            here = scanner.is_string(field)
            scanner.take(b":")
            body = scanner.value()
            found = body if here else found
            if scanner.peek() != b",":
                break
            scanner.take(b",")
    scanner.take(b"}")
    scanner.take(b"")
    return found


def cut_string(line: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    """Yield the body of a JSON string in parts of at most MAX_DOCUMENT bytes, each the body of a
    valid string; at least one.

    `start` and `end` are those of `find_text`. It is cut after the last space that fits, else
    between two characters.
    """
    while True:
        line.seek(start)
        part = line.read(min(MAX_DOCUMENT + 1, end - start))
        if len(part) > MAX_DOCUMENT:
            part = part[: part.rfind(b" ", 0, MAX_DOCUMENT) + 1 or _whole_escapes(part)]
        yield part
        start += len(part)
        if start >= end:
            return


def _character(block: bytes, limit: int) -> int:
    """Return the last place up to `limit` where a UTF-8 character begins; `limit` itself where
    there is no UTF-8."""
    return next((end for end in range(limit, limit - 4, -1) if block[end] & 0xC0 != 0x80), limit)


def _whole_escapes(part: bytes) -> int:
    """Return where to cut a string's body of MAX_DOCUMENT + 1 bytes so that no escape, pair or
    character is torn."""
    end = min(_end(_BODY, part[:MAX_DOCUMENT], 0), _character(part, MAX_DOCUMENT))
    escape = end - _ESCAPE_BYTES
    if _HIGH_SURROGATE.match(part[max(escape, 0) : end]):
        # An even number of backslashes stands for backslashes, and no escape begins at the last.
        before = part[: escape + 1]
        if (len(before) - len(before.rstrip(b"\\"))) % 2:
            return escape
    return end


def _end(pattern: re.Pattern[bytes], window: bytes, at: int) -> int:
    found = pattern.match(window, at)
    return found.end() if found else at


class _Scanner:
    """Walks over the JSON in a file, a window at a time."""

    def __init__(self, file: IO[bytes], start: int):
        self._file = file
        self._file.seek(start)
        self._window = b""
        self._at = 0
        self._before = start  # bytes of the file that lie before the window

    def peek(self) -> bytes:
        """Return the next byte that is no white space; b"" at the end."""
        self._skip(_SPACE)
        return self._window[self._at : self._at + 1]

    def take(self, wanted: bytes) -> None:
        """Go past the byte `wanted`, which comes next."""
        if (found := self.peek()) != wanted:
            raise self._malformed(found, repr(wanted.decode()) if wanted else "the end of the line")
        self._at += len(wanted)

    def string(self) -> tuple[int, int]:
        """Go past a string; where its body lies."""
        self.take(b'"')
        start = self._before + self._at
        while True:
            self._at = _end(_BODY, self._window, self._at)
            if self._window[self._at : self._at + 1] == b'"':
                self._at += 1
                return start, self._before + self._at - 1
            # What stops the match may be an escape that the window cuts.
            if len(self._window) - self._at >= _ESCAPE_BYTES or not self._refill():
                raise self._malformed(
                    self._window[self._at :][:1], "a character, a valid escape or the string's end"
                )

    def is_string(self, wanted: str) -> bool:
        """Go past a string; whether it is `wanted`."""
        start, end = self.string()
        if end - start > 6 * len(wanted.encode()):  # the longest way to write it
            return False
        back = self._file.tell()
        self._file.seek(start)
        body = self._file.read(end - start)
        self._file.seek(back)
        try:
            return bool(orjson.loads(b'"' + body + b'"') == wanted)
        except orjson.JSONDecodeError:  # broken UTF-8, or half a surrogate pair
            return False

    def value(self) -> tuple[int, int] | None:
        """Go past a value; where its body lies if it is a string."""
        if (first := self.peek()) == b'"':
            return self.string()
        if first not in (b"{", b"["):
            if not self._skip(_SCALAR):
                raise self._malformed(first, "a value")
            return None
        depth = 0
        while True:
            match self._window[self._at : self._at + 1]:
                case b'"':
                    self.string()
                case b"{" | b"[":
                    depth += 1
                    self._at += 1
                case b"}" | b"]":
                    depth -= 1
                    self._at += 1
            if not depth:
                return None
            self._skip(_INSIDE)
            if self._at == len(self._window):
                raise self._malformed(b"", "a bracket that closes")

    def _skip(self, pattern: re.Pattern[bytes]) -> int:
        """Go past all that matches; how much that was. Afterwards a byte follows, or the file
        ends."""
        start = self._before + self._at
        while True:
            self._at = _end(pattern, self._window, self._at)
            if self._at < len(self._window) or not self._refill():
                return self._before + self._at - start

    def _refill(self) -> bool:
        more = self._file.read(WINDOW)
        self._before += self._at
        self._window, self._at = self._window[self._at :] + more, 0
        return bool(more)

    def _malformed(self, found: bytes, wanted: str) -> Malformed:
        what = repr(found.decode("utf-8", "backslashreplace")) if found else "the end of the line"
        return Malformed(f"{what} at byte {self._before + self._at}, where {wanted} belongs")
