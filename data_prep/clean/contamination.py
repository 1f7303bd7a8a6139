"""Which n-grams of words a text has, whatever its case and punctuation: to find test data in
training data."""

import functools
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.arrays import Hashes
from data_prep.clean.page import ODD, apart_from_marks, blocks, hash_words


@functools.cache
def _plain_word() -> re.Pattern[str]:
    """Return a pattern for runs of letters, digits, and the marks that combine with them, without
    which a word of Hindi would be many."""
    others = [
        chr(code) for code in range(1 << 16) if unicodedata.category(chr(code))[0] not in "LNM"
    ]
    return re.compile(f"[^{re.escape(''.join(others))}]+")


def plain_ngrams(text: str, n: int) -> Iterator[tuple[list[str], Hashes]]:
    """Yield plain words of a text, and hashes of the n-grams that begin at each, uint64 (words - n
    + 1,): a block at a time.

    Plain words are the runs of letters and digits, in lower case (str.casefold).
    """
    words: list[str] = []
    for block in blocks(text, " ", "\n"):
        plain = apart_from_marks(functools.partial(unicodedata.normalize, "NFC"), block.casefold())
        words = words[len(words) - n + 1 if len(words) >= n else 0 :] + _plain_word().findall(plain)
        hashes = hash_words(words)
        count = len(words) - n + 1
        if count > 0:
            grams = hashes[:count].copy()
            for k in range(1, n):
                grams *= ODD
                grams += hashes[k : k + count]
            yield words, grams


def test_texts(path: Path) -> Iterator[str]:
    """Yield the text of a .txt file, or every string in every line of a .jsonl file.

    Raises ValueError naming file and line if it cannot be read or is not JSON.
    """
    try:
        if path.suffix == ".txt":
            yield path.read_text("utf-8", "replace")
            return
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield from _strings(_parsed(path, number, line))
    except OSError as error:
        raise ValueError(
            f"{path}: cannot read the test file: {error.strerror}; check decontaminate.files"
        ) from error


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path}, line {number}: not JSON ({error}), expected an object a line; correct it or "
            "name the file .txt"
        ) from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
