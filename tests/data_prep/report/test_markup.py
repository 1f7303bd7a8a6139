import unicodedata
from xml.etree.ElementTree import Element, fromstring

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.report.markup import (
    ByteSize,
    Excerpt,
    Line,
    Strong,
    bar,
    histogram,
    power,
    table,
    templates,
    visible,
)
from data_prep.words import counted, percent, rate, scaled, size


@given(st.text(st.characters(codec=None, exclude_categories=())))
def test_nothing_unseen_is_left(text: str) -> None:
    for char in visible(text):
        assert char in "\t\n\u200c\u200d" or unicodedata.category(char) not in (
            "Cc",
            "Cf",
            "Cs",
            "Co",
            "Cn",
            "Zl",
            "Zp",
        )


def test_ordinary_text_stays_and_the_rest_is_numbered() -> None:
    for text in (
        "plain\ttext\n",
        "Ελληνικά 日本語 हिन्दी",
        "क\u094d\u200dष",
        'a_b <c> & "d" — e\u0301 😀',
    ):
        assert visible(text) == text
    assert visible("a\0b\r\x7f\x85\u202e\ufeff\u2028\ud800\ue000\U0010ffff") == (
        "a⟨U+0000⟩b⟨U+000D⟩⟨U+007F⟩⟨U+0085⟩⟨U+202E⟩⟨U+FEFF⟩⟨U+2028⟩⟨U+D800⟩⟨U+E000⟩⟨U+10FFFF⟩"
    )


def drawn(macro: str, value: object) -> Element:
    """A part of the page, as parts.html.j2 draws it."""
    parts = templates().get_template("parts.html.j2").module
    return fromstring(f"<div>{getattr(parts, macro)(value)}</div>")


def test_cells_of_a_line_keep_their_order_and_are_escaped() -> None:
    made = drawn("cell", Line(("a<i>", None, Strong("c"), "d\0", "e&amp;", 1234, ByteSize(2_000))))
    assert "".join(made.itertext()) == "a<i>cd⟨U+0000⟩e&amp;1,2342.0 kB"
    assert [child.tag for child in made[0]] == ["b", "span"]
    assert made[0][1].attrib == {"title": "2,000 bytes"}


def test_what_the_pointer_shows_is_escaped() -> None:
    [made] = drawn("cell", bar(('x"\u202e', 1.0, "<&\">'"))).iter("span")
    assert made.attrib == {
        "class": 'x"⟨U+202E⟩',
        "style": "width:100.00%",
        "title": "<&\">'",
    }


def test_an_excerpt_keeps_its_spaces_and_marks() -> None:
    [pre] = drawn("cell", Excerpt((("\n a ", False), ("<b>", True), ("  c\n", False))))
    assert (pre.tag, pre.text, pre[0].tag, pre[0].text, pre[0].tail) == (
        "pre",
        "\n a ",
        "mark",
        "<b>",
        "  c\n",
    )


def test_a_table_has_a_cell_for_every_column() -> None:
    rows = [["x", 1234], ["y", Strong("z")]]
    cells = list(drawn("table", table("lr", ["name", "count"], rows)).iter("td"))
    assert ["".join(cell.itertext()) for cell in cells] == ["x", "1,234", "y", "z"]
    assert [cell.get("class") for cell in cells] == ["text", "number"] * 2
    with pytest.raises(ValueError, match="shorter"):
        table("lr", ["name", "count"], [["x"]])


def test_a_bar_leaves_out_what_is_empty() -> None:
    spans = drawn("cell", bar(("kept", 0.25, "a"), ("rules", 0, "b"), ("near", 0.75, "c")))[0]
    assert [(span.get("class"), span.get("style"), span.get("title")) for span in spans] == [
        ("kept", "width:25.00%", "a"),
        ("near", "width:75.00%", "c"),
    ]


def _heights(plot: Element) -> list[float]:
    return [float(bar.attrib["height"]) for bar in plot.iter("rect")]


def test_a_histogram_is_to_scale_and_tells_its_numbers() -> None:
    plot = drawn("histogram", histogram([0, 0, 50, 0, 100, 25], 2, 10, "bytes"))
    first, second, third = _heights(plot)
    assert (first / second, third / second) == (0.5, 0.25)
    assert [title.text for title in plot.iter("title")] == [
        "4 to 7 bytes: 50 documents, 28.6%",
        "16 to 31 bytes: 100 documents, 57.1%",
        "32 to 63 bytes: 25 documents, 14.3%",
    ]
    labels = ["100", "4", "8", "16", "32", "64", "128", "256", "512"]
    assert [text.text for text in plot.iter("text")] == labels


def test_a_histogram_of_nothing_and_of_a_lone_document_among_many() -> None:
    assert _heights(drawn("histogram", histogram([], 0, 8, "bytes"))) == []
    lone = drawn("histogram", histogram([10**9, 1], 0, 8, "bytes"))
    assert min(_heights(lone)) > 1  # still to be seen


def test_numbers_for_people() -> None:
    assert [power(i) for i in (0, 9, 10, 21, 63)] == ["1", "512", "1K", "2M", "8E"]
    assert [counted(n, "copy", "copies") for n in (0, 1, 1234)] == [
        "0 copies",
        "1 copy",
        "1,234 copies",
    ]
    assert [counted(n, "row") for n in (1, 2)] == ["1 row", "2 rows"]
    assert [rate(9, 4), rate(0, 0)] == ["2.25", "-"]
    assert [size(n) for n in (0, 999, 1000, 999_949, 999_950, 10**16)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "999.9 kB",
        "1.0 MB",
        "10,000.0 TB",
    ]
    assert scaled(312, ("", "K")) == "312"


def test_a_share_is_never_rounded_to_nothing_or_to_all() -> None:
    shares = [(0, 7), (7, 7), (1, 10**6), (10**6 - 1, 10**6), (1, 3), (0, 0)]
    assert [percent(part, whole) for part, whole in shares] == [
        "0 %",
        "100 %",
        "<0.1 %",
        ">99.9 %",
        "33.3 %",
        "-",
    ]
