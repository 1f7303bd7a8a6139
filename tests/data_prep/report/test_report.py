import json
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_prep.report.html_page import OPEN_SOURCES, differing, page, write_report
from data_prep.report.markup import visible
from data_prep.report.models import (
    EXCERPT_CHARS,
    Report,
    count_by_stage,
    find_notes,
    format_summary,
    funnel,
)

VOID = {"meta", "br", "hr", "img", "input", "link"}
TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "h1",
        "h2",
        "h3",
        "nav",
        "a",
        "div",
        "section",
        "p",
    ),
    *(
        "b",
        "i",
        "small",
        "span",
        "mark",
        "pre",
        "ul",
        "li",
        "dl",
        "dt",
        "dd",
        "details",
        "summary",
        "figure",
    ),
    *("figcaption", "table", "thead", "tbody", "tr", "th", "td", "svg", "path", "rect", "text"),
}
HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></title></style><img src=x onerror=alert(1)>",
    "\" onmouseover='alert(1)' x=\"",
    "&lt;b&gt; &#60;script&#62; ]]><!-- -->",
    "\u202eevil\u2066\u200b\ufeff\u2028",
    "NUL\0 \x1b[31mred\x1b[0m \x07\r\x85\x9b",
    "\ud800 lone \udfff",
    "\n\n \t",
    "W" * 1_000_000,
    "\udc80" * 1_000_000,
    "a " * 500_000,
]


class Page(HTMLParser):
    """The text and the tags of a page; fails if an element is not closed, or could run or fetch
    something."""

    def __init__(self, html: str):
        super().__init__()
        self.texts: list[str] = []
        self.titles: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        for name, value in attrs:
            assert name not in ("src", "srcset", "srcdoc") and not name.startswith("on")
            assert name != "href" or (value or "").startswith("#")
            self.titles += [value or ""] if name == "title" else []
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def a_report(numbers: Iterator[int], text: Any = str) -> dict[str, Any]:
    """Every field of a report, with the next of `numbers` wherever a number goes and text(what it
    is) for text."""

    def n() -> int:
        return next(numbers)

    def counts(*names: str) -> dict[str, int]:
        return {name: n() for name in names}

    def source(name: str) -> dict[str, Any]:
        fields = (
            "files",
            "read",
            "read_bytes",
            "exact",
            "near",
            "documents",
            "text_bytes",
            "tokens",
        )
        return {
            "name": text(name),
            **counts(*fields),
            "findings": counts("malformed_json", text("finding"), "crlf"),
            "dropped": counts("gopher_quality", text("rule")),
            "changed": counts("mask_pii"),
            "byte_lengths": [0, 0, n(), n(), 0, n()],
            "token_lengths": [n(), n()],
            "examples": [{"place": text("place"), "text": text("example")} for _ in range(2)],
        }

    rule = ("seen", "changed", "dropped")
    split = ("documents", "text_bytes", "tokens", "rows", "shards", "shard_bytes", "padding")
    pair = {name: text(name) for name in ("kept", "dropped", "kept_text", "dropped_text")}
    return {
        "name": text("my-set"),
        "options": {
            "seq_len": n(),
            "packing": text("packing"),
            "val_fraction": 0.005,
            "strict": True,
            "rules": None,
        },
        "sources": [source("web"), source("books")],
        "rules": {
            name: {**counts(*rule), "samples": [{"text": text("sample"), "detail": text("detail")}]}
            for name in ("gopher_quality", text("rule"), "mask_pii")
        },
        "duplicates": {
            **counts("exact", "near", "clusters"),
            "largest": [(n(), text("place")), (n(), text("other place"))],
            "examples": [{**pair, "similarity": 0.83}],
        },
        "tokenizer": {
            "kind": text("bpe"),
            **counts("vocab_size", "sample_bytes", "checked_documents", "checked_bytes"),
            "encoder": text("kitoken"),
            "round_trip": True,
        },
        "splits": {"train": counts(*split), text("val"): counts(*split)},
        "rejects": [
            {
                "kind": text("k"),
                "file": text("f"),
                "line": n(),
                "action": text("a"),
                "detail": text("d"),
                "raw": text("r"),
            }
        ],
    }


def consistent(**changes: Any) -> Report:
    """A report of 1,000 records of one source, of which 600 are kept."""
    source = {
        "name": "web",
        "files": 3,
        "read": 990,
        "read_bytes": 99_000,
        "findings": {"malformed_json": 10, "crlf": 5},
        "dropped": {"language": 90, "gopher": 100},
        "changed": {},
        "exact": 80,
        "near": 120,
        "documents": 600,
        "text_bytes": 60_000,
        "tokens": 15_000,
        "byte_lengths": [0] * 6 + [600],
        "token_lengths": [0] * 4 + [600],
        "examples": [],
    }
    rule = {"seen": 900, "changed": 0, "dropped": 100, "samples": []}
    split = {
        "documents": 300,
        "text_bytes": 30_000,
        "tokens": 7_500,
        "rows": 10,
        "shards": 1,
        "shard_bytes": 20_000,
    }
    return Report(
        **{
            "name": "set",
            "options": {},
            "sources": [source | changes.pop("source", {})],
            "rules": {"language": {**rule, "seen": 990, "dropped": 90}, "gopher": rule},
            "duplicates": {"exact": 80, "near": 120, "clusters": 70, "largest": [], "examples": []},
            "tokenizer": {
                "kind": "bpe",
                "vocab_size": 512,
                "sample_bytes": 9000,
                "encoder": "sentencepiece",
                "checked_documents": 4,
                "checked_bytes": 400,
                "round_trip": True,
            },
            "splits": {"train": {**split, "padding": 0}, "val": {**split, "padding": 0}},
            "rejects": [],
            **changes,
        }
    )


def lines_of(report: Report) -> dict[str, str]:
    lines = format_summary(report).split("\n")
    assert 6 <= len(lines) <= 12
    return {line[:9].strip(): line[9:].strip() for line in lines}


def test_every_number_and_text_is_on_the_page() -> None:
    values = a_report(count(1_000_003, 7_919))
    html = Page(page(Report(**values)))
    everything = html.text + "\n".join(html.titles)

    def leaves(value: Any) -> Iterator[Any]:
        if isinstance(value, dict | list | tuple):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from leaves(inner)
        else:
            yield value

    for value in leaves(values):
        if isinstance(value, str | float):
            assert str(value) in everything
        elif value and not isinstance(value, bool):
            assert f"{value:,}" in everything
    for name in [
        *values["options"],
        *values["rules"],
        *values["splits"],
        *values["sources"][0]["findings"],
    ]:
        assert name in html.text


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_hostile_text_is_shown_and_nothing_else(tmp_path: Path, text: str) -> None:
    report = Report(**a_report(count(1), lambda _: text))
    write_report(tmp_path, report)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    parsed = Page(html)
    shown = visible(report.name)
    assert len(report.name) <= EXCERPT_CHARS
    assert text.startswith(report.name[:2]) or "\\ud" in report.name
    assert parsed.text.count(shown) >= 10
    assert html == visible(html)
    assert len(html) < 200_000
    assert (tmp_path / "report.json").read_text(encoding="utf-8").isascii()
    summary = format_summary(report)
    assert summary == visible(summary)
    assert 6 <= len(summary.split("\n")) <= 12


any_text = st.text(
    st.characters(codec=None, exclude_categories=()), max_size=600
) | st.sampled_from(HOSTILE[:8])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_report_makes_a_page_and_comes_back_from_its_json(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    numbers = iter(lambda: data.draw(st.integers(0, 2**53)), None)
    report = Report(**a_report(numbers, lambda _: data.draw(any_text)))
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, report)
    assert Report.model_validate_json((folder / "report.json").read_bytes()) == report
    Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    report = Report(**a_report(count(1)))
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, again in zip(folders, (report, Report(**a_report(count(1)))), strict=True):
        folder.mkdir()
        write_report(folder, again)
    for name in ("report.json", "report.html"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    read = Report.model_validate_json((folders[0] / "report.json").read_text())
    assert page(read).encode() == (folders[0] / "report.html").read_bytes()
    assert json.loads((folders[0] / "report.json").read_text())["sources"][0]["name"] == "web"


def test_the_funnel_accounts_for_every_record() -> None:
    report = consistent()
    steps = funnel(report, report.sources)
    assert [(step.stage, step.label, step.lost) for step in steps] == [
        ("unreadable", "malformed_json", 10),
        ("rules", "language", 90),
        ("rules", "gopher", 100),
        ("exact", "exact duplicates", 80),
        ("near", "near duplicates", 120),
        ("kept", "kept", 600),
    ]
    assert sum(count_by_stage(steps).values()) == 1000
    # a pipeline that also counts unreadable lines, or what no rule took, under `dropped`
    more = consistent(
        source={"dropped": {"malformed_json": 10, "language": 90, "gopher": 100, "no_tokens": 0}}
    )
    assert count_by_stage(funnel(more, more.sources)) == count_by_stage(steps)
    lost = consistent(source={"documents": 593})
    assert count_by_stage(funnel(lost, lost.sources))["other"] == 7
    assert "left out otherwise" in page(lost)


def test_the_summary_tells_the_funnel() -> None:
    assert lines_of(consistent()) == {
        "found": "1,000 documents, 99.0 kB, in 3 files",
        "": "-10 unreadable: malformed_json 10",
        "rules": "-190: gopher 100, language 90",
        "copies": "-80 exact, -120 near, in 70 clusters",
        "kept": "600 documents (60.0 %), 60.0 kB",
        "tokens": "15,000, 4.00 bytes a token (bpe, 512 pieces, round trip exact)",
        "train": "300 documents, 10 rows, 1 shard",
        "val": "300 documents, 10 rows, 1 shard",
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"source": {"exact": 500, "near": 0}}, ['Most of "web" is duplicates']),
        (
            {"source": {"findings": {"no_text": 11}}},
            ["left out: 11 no_text", '11 of 1,001 records of "web" were unreadable'],
        ),
        ({"source": {"documents": 0, "text_bytes": 0, "tokens": 0}}, ['Nothing of "web" is left']),
        (
            {"rules": {"c4": {"seen": 9, "changed": 0, "dropped": 5, "samples": []}}},
            ["Rule c4 dropped 5 of the 9 documents it saw"],
        ),
        ({"splits": {}}, ["There is no validation split"]),
    ],
)
def test_what_is_worth_a_look(changes: dict[str, Any], expected: list[str]) -> None:
    report = consistent(**changes)
    assert find_notes(report) == expected
    text = Page(page(report)).text
    assert all(line in text for line in expected)
    assert ("Worth a look" in text) == bool(expected)


def test_a_source_the_tokenizer_knows_little_of_and_a_tokenizer_that_loses_text() -> None:
    report = consistent()
    strange = report.sources[0].model_copy(
        update={"name": "runes", "text_bytes": 1_000, "tokens": 1_000}
    )
    lossy = report.tokenizer.model_copy(update={"round_trip": False})
    split = report.splits["val"].model_copy(update={"padding": 2_500})
    report = report.model_copy(
        update={
            "sources": (*report.sources, strange),
            "tokenizer": lossy,
            "splits": {**report.splits, "val": split},
        }
    )
    assert find_notes(report) == [
        "The tokenizer does not give back the exact text of every document that was checked",
        'Text of "runes" takes a token for every 1.00 bytes, the whole set for 3.81',
        "25.0 % of the val rows is padding",
    ]
    assert "the exact text did NOT come back" in Page(page(report)).text
    assert "25.0 % padding" in lines_of(report)["val"]


def test_stages_that_were_not_run_say_so() -> None:
    source = {"findings": {}, "dropped": {}, "exact": 0, "near": 0, "documents": 990}
    tokenizer = {**consistent().tokenizer.model_dump(), "kind": None, "sample_bytes": None}
    report = consistent(source=source, rules={}, duplicates=None, tokenizer=tokenizer)
    text = Page(page(report)).text
    for line in (
        "The text was not cleaned.",
        "Duplicates were not looked for.",
        "every record was read as it stood",
    ):
        assert line in text
    assert "exact duplicates" not in text
    lines = lines_of(report)
    assert (lines["rules"], lines["copies"]) == ("none", "not looked for")
    assert lines["tokens"].endswith("(given, 512 pieces, round trip exact)")


def test_a_source_with_nothing_left_and_a_set_of_nothing() -> None:
    nothing = {"read": 0, "read_bytes": 0, "findings": {}, "dropped": {}, "exact": 0, "near": 0}
    empty = {"documents": 0, "text_bytes": 0, "tokens": 0, "byte_lengths": [], "token_lengths": []}
    report = consistent(source=nothing | empty)
    for case in (report, report.model_copy(update={"sources": (), "splits": {}, "rules": {}})):
        assert "found" in Page(page(case)).text
        assert lines_of(case)["kept"] == "0 documents (-), 0 bytes"
    filled = report.model_copy(update={"sources": (*consistent().sources, *report.sources)})
    assert (
        Page(page(filled)).text.count("documents by length in bytes") == 2
    )  # all sources, and the one that has any


def test_many_sources_are_folded() -> None:
    report = consistent()
    for number in (OPEN_SOURCES, OPEN_SOURCES + 1):
        many = report.model_copy(update={"sources": report.sources * number})
        assert page(many).count('<details class="card" open="">') == (
            number if number <= OPEN_SOURCES else 0
        )
        assert page(many).count('<details class="card"') == number


words = st.lists(st.sampled_from(["a", "b", "<c>", " ", "\n", "d e"]), max_size=30).map("".join)


@given(words, words)
def test_marked_differences_are_the_differences(left: str, right: str) -> None:
    sides = differing(left, right)
    joined = ["".join(text for text, _ in side.parts) for side in sides]
    assert joined == [left, right]
    common = ["".join(text for text, marked in side.parts if not marked) for side in sides]
    assert common[0] == common[1]
    if left == right:
        assert common[0] == left


def test_marked_differences_are_words() -> None:
    marked = [
        [text for text, is_marked in side.parts if is_marked]
        for side in differing("in the winter of 1863, say", "in the spring of 1863, I say")
    ]
    assert marked == [["winter"], ["spring", "I "]]


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3},
        {"unknown": 1},
        {"options": {"a": float("nan")}},
        {"rules": {"r": {"seen": -1, "changed": 0, "dropped": 0, "samples": []}}},
    ],
)
def test_a_report_is_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Report.model_validate({**consistent().model_dump(), **change})


def test_importing_it_is_light() -> None:
    heavy = "{'torch', 'matplotlib', 'pyarrow', 'scipy', 'mlflow', 'ftfy', 'dnt_scale'}"
    code = (
        f"import sys, data_prep.report.models, data_prep.report.html_page; print(sorted({heavy} & "
        f"sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
