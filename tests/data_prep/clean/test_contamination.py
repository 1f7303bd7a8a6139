import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.clean import page
from data_prep.clean.contamination import plain_ngrams
from data_prep.clean.contamination import test_texts as texts_of


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    return [
        tuple(words[p : p + n]) for words, grams in plain_ngrams(text, n) for p in range(len(grams))
    ]


def hashes(text: str, n: int) -> list[int]:
    return [int(gram) for _, grams in plain_ngrams(text, n) for gram in grams]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The QUICK, brown-fox (jumped)!", ["the", "quick", "brown", "fox", "jumped"]),
        (
            "snake_case 3.14 «Straße» don\u2019t",
            ["snake", "case", "3", "14", "strasse", "don", "t"],
        ),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("cafe\u0301 caf\u00e9", ["caf\u00e9", "caf\u00e9"]),
        ("... --- !!!", []),
    ],
)
def test_plain_words(text: str, words: list[str]) -> None:
    assert [word for (word,) in ngrams(text, 1)] == words


@given(
    st.lists(st.sampled_from(["one", "two", "three"]), max_size=40),
    st.integers(1, 6),
    st.integers(5, 40),
)
def test_every_ngram_is_found_once_across_blocks(words: list[str], n: int, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "BLOCK_CHARS", size)
        found, hashed = ngrams(" ".join(words), n), hashes(" ".join(words), n)
    assert found == [tuple(words[p : p + n]) for p in range(len(words) - n + 1)]
    assert hashed == hashes(" ".join(words), n)
    assert len(set(hashed)) == len(set(found))


@given(st.lists(st.from_regex("[a-z0-9]{1,5}", fullmatch=True), min_size=3, max_size=10))
def test_case_and_punctuation_do_not_count(words: list[str]) -> None:
    joined = re.sub(r"\w+", lambda match: match[0].upper(), ", (".join(words)) + "..."
    assert np.array_equal(hashes(" ".join(words), 3), hashes(joined, 3))


def test_test_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.jsonl").write_text(
        '{"q": "one", "n": 3, "choices": ["two", {"x": "three"}]}\n\n"four"\n'
    )
    assert list(texts_of(tmp_path / "a.txt")) == ["one\ntwo"]
    assert list(texts_of(tmp_path / "b.jsonl")) == ["one", "two", "three", "four"]


def test_a_bad_test_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text('{"q": "one"}\n{"q": \n')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: not JSON .*expected an object a line"):
        list(texts_of(path))
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: not JSON"):
        list(texts_of(path))
    with pytest.raises(ValueError, match=r"gone\.txt: cannot read the test file: No such file"):
        list(texts_of(tmp_path / "gone.txt"))
