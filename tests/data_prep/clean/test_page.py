import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.clean import page
from data_prep.clean.page import (
    Page,
    apart_from_marks,
    blocks,
    covered,
    duplicate_shares,
    hash_words,
    repeated_ngrams,
)

FEW_WORDS = st.lists(st.sampled_from(["a", "bb", "c1", "22", "-", "é"]), max_size=60)
LAYOUT = st.text("ab1 \t\n", max_size=200)


@given(LAYOUT)
def test_words_lines_and_paragraphs(text: str) -> None:
    words, lines = text.split(), [line.strip() for line in text.split("\n") if line.strip()]
    assert Page(text).words.lengths.tolist() == [len(word) for word in words]
    assert (Page(text).words.hashes & np.uint64(1)).tolist() == [
        any(c in "ab" for c in word) for word in words
    ]
    assert [line for block in Page(text).line_blocks() for line in block] == lines
    assert Page(text).lines.lengths.tolist() == [len(line) for line in lines]
    assert len(np.unique(Page(text).lines.hashes)) == len(set(lines))


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("a\nb\n\nc\n \t\n\nd", [3, 1, 1]), ("\n\na", [1]), ("", []), ("\n \n", [])],
)
def test_paragraphs_lie_between_empty_lines(text: str, lengths: list[int]) -> None:
    assert Page(text).paragraphs.lengths.tolist() == lengths


@given(LAYOUT, st.sampled_from([(" ", "\n"), ("\n",), ("\n\n",)]), st.integers(1, 20))
def test_blocks_are_cut_at_separators_alone(
    text: str, separators: tuple[str, ...], size: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "BLOCK_CHARS", size)
        parts = list(blocks(text, *separators))
        measured = Page(text).words, Page(text).lines, Page(text).paragraphs
    place = 0
    for part in parts:
        assert text.startswith(part, place)
        place += len(part)
        separator = next((mark for mark in separators if text.startswith(mark, place)), "")
        assert separator or place == len(text)
        place += len(separator)
        assert len(part) <= size or not any(mark in part[: size - len(mark)] for mark in separators)
    whole = Page(text).words, Page(text).lines, Page(text).paragraphs
    for some, all_ in zip(measured, whole, strict=True):
        assert (some.hashes.tolist(), some.lengths.tolist()) == (
            all_.hashes.tolist(),
            all_.lengths.tolist(),
        )


@given(FEW_WORDS, st.integers(2, 6))
def test_repeated_ngrams_are_those_that_a_slow_search_finds(words: list[str], longest: int) -> None:
    found = {
        n: (
            [group.tolist() for group in np.split(again.positions, firsts[1:])],
            again.positions[again.mask].tolist(),
        )
        for n, firsts, again in repeated_ngrams(hash_words(words), longest)
    }
    for n in range(2, longest + 1):
        grams = [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]
        groups = [
            [p for p, gram in enumerate(grams) if gram == one]
            for one, k in Counter(grams).items()
            if k > 1
        ]
        assert sorted(found[n][0] if n in found else []) == sorted(groups)
        assert sorted(found[n][1] if n in found else []) == sorted(
            p for group in groups for p in group[1:]
        )


def test_shares_count_what_came_before_and_each_character_once() -> None:
    assert duplicate_shares(Page("aaaa\nb\naaaa\nc\naaaa").lines) == pytest.approx((2 / 5, 8 / 14))
    assert duplicate_shares(Page("").lines) == (0, 0)
    lengths = np.array([1, 2, 3, 4])
    assert covered(lengths, np.array([0, 1]), 2) == pytest.approx(6 / 10)


@given(st.text())
def test_apart_from_marks_is_the_change_itself(text: str) -> None:
    assert apart_from_marks(str.upper, text) == text.upper()


@pytest.mark.parametrize("marks", ["\u0323\u0301", "\U0001d165\u0323"])
def test_long_runs_of_marks_stay_as_they_are(marks: str) -> None:
    # Python normalises such a run in quadratic time: this one would take hours.
    run = marks * 500_000
    result = apart_from_marks(
        lambda text: unicodedata.normalize("NFC", text), f"e\u0301 {run}e\u0301"
    )
    assert result == f"\u00e9 {run}\u00e9"
    assert (
        apart_from_marks(lambda text: unicodedata.normalize("NFC", text), "e" + "\u0301" * 30)
        != "e" + "\u0301" * 30
    )
