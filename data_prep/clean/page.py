"""A text under inspection: its words, lines and paragraphs as numbers, and what repeats among them.

Words are the runs between white space and lines lie between line feeds, without the spaces around
them; empty lines count nowhere. Everything takes time and memory linear in the text, some 20 bytes
a word.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import xxhash

from data_prep.arrays import Counts, Flags, Hashes

# A long text is taken apart in blocks of about this many characters: its words never all exist as
# strings at once.
BLOCK_CHARS = 1 << 20
# Odd, so that multiplying by it modulo 2^64 loses nothing: hashes of n-grams are polynomials in it.
ODD = np.uint64(0x9E3779B97F4A7C15)
_CACHED_HASHES = 1 << 16
_CACHED_CHARS = 32
_LETTER = re.compile(r"[^\W\d_]")
_PARAGRAPH = re.compile(r"\n\s*\n")


class Strings(NamedTuple):
    """Hashes, uint64 (n,), and lengths in characters, int64 (n,)."""

    hashes: Hashes
    lengths: Counts


class Page:
    """A text, and what several rules want to know of it, found once."""

    def __init__(self, text: str):
        self.text = text

    @functools.cached_property
    def words(self) -> Strings:
        """Return the words. The lowest bit of a word's hash says whether it has a letter."""
        return _measured((block.split() for block in blocks(self.text, " ", "\n")), hash_words)

    @functools.cached_property
    def lines(self) -> Strings:
        return _measured(self.line_blocks(), _hash_lines)

    @functools.cached_property
    def paragraphs(self) -> Strings:
        """Return what lies between empty lines."""
        parts = (_PARAGRAPH.split(block) for block in blocks(self.text, "\n\n"))
        return _measured(
            ([part for part in map(str.strip, some) if part] for some in parts), _hash_lines
        )

    def line_blocks(self) -> Iterator[list[str]]:
        """Yield the lines that are not empty, without the spaces around them, some at a time."""
        for block in blocks(self.text, "\n"):
            yield [line for line in map(str.strip, block.split("\n")) if line]


class _Hashes(dict[str, int]):
    """Of words: a cache, since most words of a text are common ones."""

    def __missing__(self, word: str) -> int:
        value = _digest(word) & ~1 | (_LETTER.search(word) is not None)
        if len(word) <= _CACHED_CHARS:
            if len(self) >= _CACHED_HASHES:
                self.clear()
            self[word] = value
        return value


_HASHES = _Hashes()


def hash_words(words: list[str]) -> Hashes:
    """Return hashes of words, uint64 (n,), of which the lowest bit says whether there is a
    letter."""
    return np.fromiter(map(_HASHES.__getitem__, words), np.uint64, len(words))


def _hash_lines(lines: list[str]) -> Hashes:
    return np.fromiter(map(_digest, lines), np.uint64, len(lines))


def _digest(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def _measured(parts: Iterable[list[str]], hashed: Callable[[list[str]], Hashes]) -> Strings:
    hashes, lengths = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for strings in parts:
        hashes.append(hashed(strings))
        lengths.append(np.fromiter(map(len, strings), np.int64, len(strings)))
    return Strings(np.concatenate(hashes), np.concatenate(lengths))


def blocks(text: str, *separators: str) -> Iterator[str]:
    """Yield the text in blocks of BLOCK_CHARS, cut at a separator, which is left out; longer where
    there is none."""
    start = 0
    while len(text) - start > BLOCK_CHARS:
        limit = start + BLOCK_CHARS
        end, separator = max((text.rfind(mark, start, limit), mark) for mark in separators)
        if end < 0:
            later = [(place, mark) for mark in separators if (place := text.find(mark, limit)) >= 0]
            if not later:
                break
            end, separator = min(later)
        yield text[start:end]
        start = end + len(separator)
    yield text[start:]


def apart_from_marks(change: Callable[[str], str], text: str) -> str:
    """Change the text by a function, but for runs of more than 30 combining marks.

    No language has them (Unicode Standard Annex 15, 13), and to normalise one takes Python
    quadratic time.
    """
    hint, runs = _marks()
    if text.isascii() or not hint.search(text):
        return change(text)
    parts = runs.split(text)
    return "".join(part if number % 2 else change(part) for number, part in enumerate(parts))


@functools.cache
def _marks() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return a fast search for what may be such a run, and a slow one for the run."""
    marks = "".join(filter(unicodedata.combining, map(chr, range(0x110000))))
    others = re.escape(
        "".join(char for char in map(chr, range(1 << 16)) if not unicodedata.combining(char))
    )
    return re.compile(f"[^{others}]{{31}}"), re.compile(f"([{marks}]{{31,}})")


def duplicate_shares(strings: Strings) -> tuple[float, float]:
    """Return the shares of the strings, and of their characters, that repeat an earlier one."""
    if not len(strings.hashes):
        return 0.0, 0.0
    _, first = np.unique(strings.hashes, return_index=True)
    chars = int(strings.lengths.sum())
    return 1 - len(first) / len(strings.hashes), (chars - int(strings.lengths[first].sum())) / chars


class Repeats(NamedTuple):
    """Positions of n-grams, int64 (m,), equal ones together and in order; `mask`: which repeat an
    earlier one."""

    positions: Counts
    mask: Flags


def repeated_ngrams(hashes: Hashes, longest: int) -> Iterator[tuple[int, Counts, Repeats]]:
    """Yield for n = 2 to `longest`, while there are any, the n-grams that occur twice or more, and
    where each group starts.

    Linear but for a sort: an n-gram can only repeat where its first n - 1 words do, so in prose
    little is left after the first. Sorting hash and position as one number gives each group in
    order of position.
    """
    bits = np.uint64(len(hashes).bit_length())
    low = (np.uint64(1) << bits) - np.uint64(1)
    positions = np.arange(len(hashes))
    grams = hashes
    for n in range(2, longest + 1):
        inside = positions <= len(hashes) - n
        positions, grams = positions[inside], grams[inside]
        grams = grams * ODD + hashes[positions + (n - 1)]
        order = np.sort(grams & ~low | np.arange(len(grams), dtype=np.uint64))
        same = (order[1:] ^ order[:-1]) <= low
        mask = np.zeros(len(order), bool)
        mask[1:] = same
        repeated = mask.copy()
        repeated[:-1] |= same
        chosen = (order[repeated] & low).astype(np.int64)
        positions, grams, mask = positions[chosen], grams[chosen], mask[repeated]
        if not len(positions):
            return
        yield n, np.flatnonzero(~mask), Repeats(positions, mask)


def covered(lengths: Counts, positions: Counts, n: int) -> float:
    """Return the share of all characters that are in the n-grams of words at `positions`."""
    inside = np.zeros(len(lengths), bool)
    for k in range(n):
        inside[positions + k] = True
    return float(lengths[inside].sum() / lengths.sum())
