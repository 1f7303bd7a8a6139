"""Nasty input never stops a run that is not strict, and what is good in it comes back exactly.

The folder `nasty` holds, with what becomes of it in NASTY: - text: broken UTF-8, UTF-16, a UTF-8
surrogate, overlong UTF-8, NULs, a byte order mark, CRLF, line ends of all kinds, spaces alone, no
final newline, an empty file, a file of newlines, control characters, noncharacters, a broken
character at the very end - JSON lines: good lines, no final newline, a byte order mark, an empty
file, a file of newlines, blank lines, CRLF line ends, scalars and arrays, objects without text or
with one that is null, a number or a list, malformed and cut lines, raw control characters, deep
nesting, huge numbers, NaN, duplicate keys, escaped and lone surrogates, escaped NUL, CRLF and byte
order mark, broken UTF-8, a second byte order mark, empty text, odd keys, lines of the separators
U+2028 and U+0085, binary Names, links and pipes are in test_inputs.py; archives, long documents and
parquet in test_pieces.py.
"""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data_prep.read import pieces
from data_prep.read.documents import FEW, KINDS, Document, Findings
from data_prep.read.pieces import RAW_BYTES
from data_prep.read.raw import Finding
from data_prep.read.sniff import magic_of
from tests.helpers.reading import read, texts_of

DEEP = b"[" * 100_000
HARDLY_TEXT = {"utf16", "utf32", "other_encoding", "not_text", "stand_in"}
NASTY: dict[str, tuple[bytes, list[str], dict[str, int]]] = {
    "broken.txt": (b"caf\xe9 \xff!", ["caf\ufffd \ufffd!"], {"broken_utf8": 1}),
    "utf16.txt": ("hé".encode("utf-16"), ["hé"], {"utf16": 1}),
    "surrogate.txt": (b"a\xed\xa0\x80b", ["a\ufffd\ufffd\ufffdb"], {"broken_utf8": 1}),
    "overlong.txt": (b"\xc0\xaf", ["\ufffd\ufffd"], {"broken_utf8": 1}),
    "end.txt": (b"ok \xf0\x9f\x98", ["ok \ufffd"], {"broken_utf8": 1}),
    "nul.txt": (b"a\0b\0", ["a\0b\0"], {"nul": 1}),
    "mark.txt": (b"\xef\xbb\xbfmarked", ["\ufeffmarked"], {"byte_order_mark": 1}),
    "crlf.txt": (b"a\r\nb\r\n", ["a\r\nb\r\n"], {"crlf": 1}),
    "ends.txt": (
        "\n\ra\r\x0b\x0c\x1c\x85\u2028\u2029".encode(),
        ["\n\ra\r\x0b\x0c\x1c\x85\u2028\u2029"],
        {},
    ),
    "spaces.txt": (b" \t ", [" \t "], {}),
    "no-end.txt": (b"one\ntwo", ["one\ntwo"], {}),
    "empty.txt": (b"", [], {"empty": 1}),
    "newlines.txt": (b"\n\n\n", ["\n\n\n"], {}),
    "odd.txt": ("\x01\x7f\ufdd0\uffff\U0010ffff".encode(), ["\x01\x7f\ufdd0\uffff\U0010ffff"], {}),
    "good.jsonl": (b'{"text": "one"}\n {"id": 2, "text": "two"} \n', ["one", "two"], {}),
    "no-end.jsonl": (b'{"text": "one"}', ["one"], {}),
    "mark.jsonl": (b'\xef\xbb\xbf{"text": "one"}\n', ["one"], {"byte_order_mark": 1}),
    "mark-alone.jsonl": (b"\xef\xbb\xbf", [], {"byte_order_mark": 1, "empty_line": 1}),
    "mark-again.jsonl": (b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}', ["a"], {"malformed_json": 1}),
    "empty.jsonl": (b"", [], {"empty": 1}),
    "newlines.jsonl": (b"\n" * 30, [], {"empty_line": 30}),
    "blank.jsonl": (b'\n{"text": "a"}\n \t\r\n', ["a"], {"empty_line": 2}),
    "crlf.jsonl": (b'{"text": "a"}\r\n{"text": "b"}\r\n', ["a", "b"], {}),
    "scalars.jsonl": (b'1\n"text"\nnull\ntrue\n["text"]\n[]\n1.5e3\nNaN', [], {"no_text": 8}),
    "no-text.jsonl": (
        b'{}\n{"body": "x"}\n{"text": null}\n{"text": 1}\n{"text": ["a"]}\n{"Text": "x"}',
        [],
        {"no_text": 6},
    ),
    "malformed.jsonl": (
        b'{\n{\'text\': \'a\'}\n{"text": "cut\n{"text": "a"} {"text": "b"}\n{"text": '
        b'"a\x01b"}\n{"text": "\\x"}\nx',
        [],
        {"malformed_json": 7},
    ),
    "deep.jsonl": (
        DEEP + b'\n{"deep": ' + DEEP + b"]" * 100_000 + b', "text": "a"}\n{"text": "b"}',
        ["b"],
        {"malformed_json": 2},
    ),
    "numbers.jsonl": (
        b'{"n": 1e999, "text": "a"}\n{"n": %b, "text": "b"}\n{"n": NaN, "text": "c"}\n{"n": '
        b'-Infinity, "text": "d"}' % (b"9" * 5000),
        ["a", "b", "c", "d"],
        {},
    ),
    "twice.jsonl": (b'{"text": "first", "text": "last"}', ["last"], {}),
    "pairs.jsonl": (b'{"text": "\\ud83d\\ude00"}', ["\U0001f600"], {}),
    "lone.jsonl": (
        b'{"text": "x\\ud800y\\ud83d\\ude00"}\n{"other": "\\udfff", "text": "a"}\n{"text": '
        b'"\\ude00\\ud83d"}',
        ["x\ufffdy\U0001f600", "a", "\ufffd\ufffd"],
        {"lone_surrogate": 2},
    ),
    "escaped.jsonl": (
        b'{"text": "a\\u0000"}\n{"text": "a\\r\\nb"}\n{"text": "\\ufeffa"}\n{"text": ""}',
        ["a\0", "a\r\nb", "\ufeffa"],
        {"nul": 1, "crlf": 1, "byte_order_mark": 1, "empty": 1},
    ),
    "broken.jsonl": (
        b'{"text": "caf\xe9"}\n{"text": "\xff\\ud800"}\n{"text": "\xff',
        ["caf\ufffd", "\ufffd\ufffd"],
        {"broken_utf8": 2, "lone_surrogate": 1, "malformed_json": 1},
    ),
    "keys.jsonl": (b'{"": 1, "\\u0074ext": "a", "text ": "b", "\\ud800": 0}', ["a"], {}),
    "separators.jsonl": ('{"text": "a\u2028b\u0085c"}\n'.encode(), ["a\u2028b\u0085c"], {}),
    "binary.jsonl": (bytes(range(256)), [], {"malformed_json": 2}),
}


@pytest.mark.parametrize("name", NASTY)
def test_nasty_files_one_by_one(tmp_path: Path, name: str) -> None:
    raw, texts, counts = NASTY[name]
    (tmp_path / name).write_bytes(raw)
    documents, found, records = read(tmp_path / name)
    assert [document.text for document in documents] == texts
    assert found == counts
    assert {record["kind"] for record in records} == set(counts)
    # A record can be written and read back, and says where the finding is and what was done.
    assert json.loads(json.dumps(records, ensure_ascii=False).encode()) == records
    lines = raw.split(b"\n")
    for record in records:
        assert record["file"] == name
        assert record["action"] == KINDS[str(record["kind"])][0]
        assert record["line"] in (
            range(1, len(lines) + 1) if name.endswith(".jsonl") and raw else [0]
        )
        lost = record["kind"] in ("malformed_json", "no_text", "empty_line")
        line = lines[int(str(record["line"])) - 1][:RAW_BYTES].decode("utf-8", "backslashreplace")
        assert record["raw"] == (line if lost else "")


def test_nasty_files_all_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (raw, _, _) in NASTY.items():
        (tmp_path / name).write_bytes(raw)
    expected = [text for name in sorted(NASTY) for text in NASTY[name][1]]
    assert texts_of(tmp_path) == expected
    monkeypatch.setattr(pieces, "PIECE_BYTES", 10)
    assert texts_of(tmp_path) == expected


@given(
    raw=st.binary(max_size=100)
    | st.lists(st.sampled_from(list(b'{}[]":,\\ntextu0d8\n \xff\xc3'))).map(bytes)
)
def test_any_bytes_are_read(raw: bytes) -> None:
    assume(not magic_of(raw + b"\n"))  # which one line of JSON does not outweigh
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.txt").write_bytes(raw)
        Path(folder, "b.jsonl").write_bytes(raw + b'\n{"text": "good"}')
        documents, _, records = read(folder)
        by_name = {Path(document.file).name: document.text for document in documents}
        kinds = {record["kind"] for record in records if str(record["file"]).endswith("a.txt")}
        if not kinds & HARDLY_TEXT and b"{" not in raw:
            assert by_name.get("a.txt", "") == raw.decode("utf-8", "replace")
        assert by_name["b.jsonl"] == "good"
        assert all(document.text.encode() for document in documents)


@given(texts=st.lists(st.text(min_size=1, max_size=30)), ascii_only=st.booleans())
def test_good_text_comes_back_exactly(texts: list[str], ascii_only: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = [
            json.dumps({"id": 1, "body": text}, ensure_ascii=ascii_only) + "\n" for text in texts
        ]
        Path(folder, "a.jsonl").write_bytes("".join(lines).encode())
        documents, counts, _ = read(Path(folder, "a.jsonl"), text_field="body")
        texts_of_lines = [Document("a.jsonl", line, text) for line, text in enumerate(texts, 1)]
        assert documents == [
            document for document in texts_of_lines if document.text.count("\0") < FEW
        ]
        assert set(counts) <= {
            "nul",
            "crlf",
            "byte_order_mark",
            *(["empty"] if not texts else ["not_text"]),
        }


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "cut',
            r"""a\.jsonl: line 2: found '{"text": "cut' \(.*\), expected a JSON""",
        ),
        (
            "a.jsonl",
            b'{"id": 1, "body": "x"}',
            r"line 1: found the fields 'id', 'body', expected a JSON object or a row",
        ),
        ("a.jsonl", b"{}", r"found the fields \(none\)"),
        ("a.jsonl", b'{"text": null}', "found 'text' of type NoneType"),
        ("a.jsonl", b'["text"]', "found a JSON list"),
        ("a.jsonl", b'{"text": "a"}\n\n', "line 2: found an empty line, expected no empty lines"),
        ("a.jsonl", DEEP, "line 1: found .*(nested too deeply|recursion)"),
        (
            "a.txt",
            b"caf\xe9",
            r"a\.txt: found byte 0xe9 at 3, the first of 1 places that are no UTF-8, expected "
            r"UTF-8",
        ),
        ("a.txt", b"a\r\n\r\n", r"a\.txt: found 2 lines that end in \\r\\n, expected"),
        ("a.txt", b"", r"a\.txt: found an empty document, expected some text"),
    ],
)
def test_strict_stops_at_the_first_finding(
    tmp_path: Path, name: str, raw: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name, strict=True)
    assert str(caught.value).endswith("; mend or remove it, or leave out --strict")


def test_strict_takes_good_text_and_says_where_a_range_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.read.inputs.UNIT_BYTES", 20)
    path = tmp_path / "a.jsonl"
    good = b'{"text": "a"}\n' * 5
    path.write_bytes(good)
    assert len(read(path, strict=True)[0]) == 5
    path.write_bytes(good + b"{")
    with pytest.raises(ValueError, match=r"a\.jsonl: line 1 after byte 60: found '{'"):
        read(path, strict=True)


def test_a_byte_order_mark_that_begins_a_range_is_malformed_as_on_any_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.read.inputs.UNIT_BYTES", 14)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n')
    assert read(path)[:2] == ([("a.jsonl", 1, "a")], {"byte_order_mark": 1, "malformed_json": 1})


def test_records_are_limited_and_counts_are_not() -> None:
    findings = Findings()
    for line in range(1500):
        findings.add(Finding("nul", "a", line, "a NUL"))
        findings.add(Finding("malformed_json", "a", line, "x", b"raw"))
    assert findings.to_json()["counts"] == {"nul": 1500, "malformed_json": 1500}
    kinds = [record["kind"] for record in findings.records]
    assert (kinds.count("nul"), kinds.count("malformed_json")) == (20, 1000)


def test_what_is_dropped_is_kept_up_to_a_limit() -> None:
    findings = Findings()
    findings.add(Finding("malformed_json", "a", 1, "x", b"\xff" + b"y" * 70_000))
    findings.add(Finding("malformed_json", "a", 2, "x", b"z" * 65_536, 1_000_000))
    first, second = findings.records
    assert first["raw"] == "\\xff" + "y" * 65_535
    assert first["detail"] == "x; 4,465 bytes are left out here"
    assert second["detail"] == "x; 934,464 bytes are left out here"
