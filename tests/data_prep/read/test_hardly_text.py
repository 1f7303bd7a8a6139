"""Whatever is read that is hardly the text that was meant: other encodings, packed, binary,
stand-ins; and JSON."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_prep.read import inputs, sniff
from data_prep.read.inputs import find_sources, plan_units
from tests.helpers.reading import read, texts_of

ENGLISH = "The harbour is open until high water; then the boats go home.\n"
RUSSIAN = "Гавань открыта до полной воды, потом лодки уходят домой.\n" * 9
CHINESE = "潮水表说高水位在九点,港口一直开放到那时。\n" * 9
FRENCH = "Le port est fermé jusqu'à la marée haute, après quoi les bateaux rentrent à l'été.\n" * 9
GERMAN = (
    "Der Hafen öffnet früh, und die Boote fahren später über die Förde zurück nach Süden.\n" * 9
)
JAPANESE = "港は満潮まで開いています。その後、船は家に帰ります。\n" * 9
RECORDS = [
    {"text": f"Note {number}: high water at {number}:00.", "n": [{"text": "inner"}]}
    for number in range(5)
]
TEXTS = [record["text"] for record in RECORDS]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_utf_16_and_32_with_a_mark_are_read(tmp_path: Path, encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith("-be") else ""
    kind = encoding[:6].replace("-", "")
    for text in (ENGLISH, CHINESE, RUSSIAN + "\U0001f600", "a", "é" * 300_000):
        for name, raw in {
            "a.txt": (mark + text).encode(encoding),
            "a.txt.gz": gzip.compress((mark + text).encode(encoding)),
            "a.md.xz": lzma.compress((mark + text).encode(encoding)),
        }.items():
            (tmp_path / name).write_bytes(raw)
            assert read(tmp_path / name)[:2] == ([(name, 0, text)], {kind: 1})
    for name in ("b.jsonl", "b.json", "b.txt", "b.ndjson.zst"):
        raw = (mark + LINES).encode(encoding)
        (tmp_path / name).write_bytes(zstandard.compress(raw) if name.endswith("zst") else raw)
        documents, counts, _ = read(tmp_path / name)
        assert ([(document.line, document.text) for document in documents], counts) == (
            list(enumerate(TEXTS, 1)),
            {kind: 1},
        )


def test_utf_16_that_is_broken_in_places(tmp_path: Path) -> None:
    raw = (ENGLISH * 9).encode("utf-16")
    for broken, text in {
        raw + b"x": ENGLISH * 9 + "\ufffd",
        raw + b"\0\xd8" + "after".encode("utf-16-le"): ENGLISH * 9 + "\ufffdafter",
    }.items():
        (tmp_path / "a.txt").write_bytes(broken)
        assert read(tmp_path / "a.txt")[:2] == (
            [("a.txt", 0, text)],
            {"utf16": 1, "broken_utf8": 1},
        )
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe" + bytes(range(256)) * 99)
    assert read(tmp_path / "a.txt")[0] == []


def test_utf_16_lines_are_not_cut_in_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "UNIT_BYTES", 100)
    path = tmp_path / "a.jsonl"
    for raw, units in (
        (LINES.encode(), len(LINES) // 100 + 1),
        (LINES.encode("utf-16"), 1),
        (json.dumps(RECORDS, indent=1).encode(), 1),
    ):
        path.write_bytes(raw)
        assert len(plan_units(find_sources([path]))) == units
        assert texts_of(path) == TEXTS


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        (CHINESE, "gbk"),
        (CHINESE, "big5"),
        (FRENCH, "latin-1"),
        (GERMAN, "cp1252"),
        (JAPANESE, "shift-jis"),
        (JAPANESE, "euc-jp"),
        (JAPANESE, "iso2022_jp"),
        (ENGLISH, "utf-16-le"),
        (ENGLISH, "utf-32-be"),
    ],
)
def test_other_encodings_are_left_out(tmp_path: Path, text: str, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding, "ignore"))
    (tmp_path / "b.txt").write_text(text)
    documents, counts, [record] = read(tmp_path)
    assert [document.file for document in documents] == [f"{tmp_path.name}/b.txt"]
    kind = "not_text" if encoding.startswith("utf") else "other_encoding"
    assert counts == {kind: 1}
    assert (record["kind"], record["action"]) == (kind, "dropped")
    assert len(str(record["raw"])) <= 4 * 200
    lines = b'{"text": "%b"}\n' * 2
    raw = (
        text.encode(encoding, "ignore").replace(b"\n", b" ").replace(b"\\", b"").replace(b'"', b"")
    )
    if encoding in ("cp1251", "latin-1", "koi8-r", "euc-jp"):
        (tmp_path / "c.jsonl").write_bytes(lines % (raw, b"good"))
        assert read(tmp_path / "c.jsonl")[:2] == ([("c.jsonl", 2, "good")], {"other_encoding": 1})


@pytest.mark.parametrize(
    "raw",
    [
        ENGLISH.encode() * 20 + b"caf\xe9 cr\xe8me br\xfbl\xe9e\n" + ENGLISH.encode() * 20,
        RUSSIAN.encode() + b"\xff\xfe\xfd" + RUSSIAN.encode(),
        ENGLISH.encode() * 20
        + "\U0001f600".encode("utf-16-be", "surrogatepass")
        + b"\xed\xa0\xbd\xed\xb8\x80" * 2,
        b"na\xefve r\xe9sum\xe9",
        ENGLISH.encode() * 9 + b"\0" * 9,
    ],
)
def test_a_few_broken_places_are_mended_as_ever(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(raw)
    assert texts_of(tmp_path / "a.txt") == [raw.decode("utf-8", "replace")]


PACKED = {
    "gzip": gzip.compress(b"text"),
    "zstd": zstandard.compress(b"text"),
    "xz": lzma.compress(b"text"),
    "bzip2": bz2.compress(b"text"),
    "zip": b"PK\x03\x04\x14\0\0\0" + b"x" * 40,
    "PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n",
    "PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "ELF": b"\x7fELF\x02\x01\x01" + bytes(9),
    "SQLite": b"SQLite format 3\0\x10\0",
    "tar": b"a.txt".ljust(257, b"\0") + b"ustar\00000" + b"text",
    "NumPy": b"\x93NUMPY\x01\0v\0{'descr'",
    "JPEG": b"\xff\xd8\xff\xe0\0\x10JFIF",
    "NUL": bytes(500) + b"x" * 40,
}


@pytest.mark.parametrize("what", PACKED)
def test_packed_and_binary_content_is_left_out(tmp_path: Path, what: str) -> None:
    for name in ("a.txt", "b.md", "LICENSE", "c.json", "d.txt.gz", "e.csv"):
        raw = PACKED[what]
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
        documents, counts, [record] = read(tmp_path / name)
        assert (documents, counts) == (
            [],
            {"other_json" if name == "c.json" and what == "NUL" else "not_text": 1},
        )
        assert record["file"] == name
        assert what in str(record["detail"]) or name == "c.json"
        if "with the suffix " in str(record["detail"]):
            suffix = str(record["detail"]).split()[-4]
            (tmp_path / f"{name}{suffix}").write_bytes(raw)
            assert texts_of(tmp_path / f"{name}{suffix}") == (["text"] if name != "c.json" else [])


LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid "
    b"sha256:4d7a214614ab2935c943f9e0ff69d22eadbb\nsize 12345\n"
)
STAND_INS = {
    "lfs": (LFS, "git lfs pull"),
    "annex": (
        b"/annex/objects/SHA256E-s12--2c26b46b68ffc68ff99b453c1d30413413422d706483.jsonl\n",
        "git annex get",
    ),
    "annex-link": (
        b"../.git/annex/objects/7x/Kq/SHA256E-s12--2c26/SHA256E-s12--2c26",
        "git annex get",
    ),
    "s3": (
        b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>A',
        "AccessDenied",
    ),
    "gcs": (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "NoSuchKey"),
    "nginx": (b"<html>\r\n<head><title>404 Not Found</title></head>\r\n<body>", "404 Not Found"),
    "login": (b"<!DOCTYPE html>\n<html lang=en><head><title>Sign in - Example</title>", "Sign in"),
    "json": (b'{"error": "Access to dataset x is restricted"}', "Access to dataset x"),
    "hub": (b"Entry not found", "Entry not found"),
    "raw": (b"404: Not Found\n", "404: Not Found"),
}


@pytest.mark.parametrize("what", STAND_INS)
def test_stand_ins_for_the_real_file_are_left_out(tmp_path: Path, what: str) -> None:
    raw, said = STAND_INS[what]
    for name in (
        "a.txt",
        "b.jsonl",
        "c.json",
        "d.parquet",
        "e.jsonl.gz",
        "f.txt.zst",
        "g.json.xz",
        "data",
    ):
        (tmp_path / name).write_bytes(raw)
        documents, counts, [record] = read(tmp_path / name)
        assert (documents, counts) == ([], {"stand_in": 1}), name
        assert said in str(record["detail"])
    (tmp_path / "h.jsonl.gz").write_bytes(gzip.compress(raw))
    assert read(tmp_path / "h.jsonl.gz")[:2] == ([], {"stand_in": 1})


def test_what_only_resembles_a_stand_in_is_read(tmp_path: Path) -> None:
    page = "<html><head><title>The harbour</title></head><body>404 boats</body></html>"
    for name, text in {
        "a.html": "<html><head><title>404 Not Found</title></head></html>",
        "b.xhtml.gz": "<!DOCTYPE html><title>Error</title>",
        "c.txt": page,
        "d.md": LFS.decode() + ENGLISH * 200,
        "e.txt": "Entry not found in the log of that day.",
    }.items():
        raw = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
        assert texts_of(tmp_path / name) == [text]
    (tmp_path / "f.jsonl").write_text('{"error": "none", "text": "kept"}')
    assert texts_of(tmp_path / "f.jsonl") == ["kept"]


def test_empty_files_are_counted_whatever_they_are(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.json", "d.parquet", "e.jsonl.gz", "f.txt.zst"):
        (tmp_path / name).write_bytes(b"")
    assert read(tmp_path)[:2] == ([], {"empty": 6})


FORMS = {
    "lines": LINES,
    "array": json.dumps(RECORDS),
    "pretty array": json.dumps(RECORDS, indent=2) + "\n",
    "array of lines": "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    "pretty objects": "\n".join(json.dumps(record, indent=4) for record in RECORDS),
    "objects in a line": " ".join(map(json.dumps, RECORDS)),
    "two arrays": json.dumps(RECORDS[:2], indent=1) + "\n" + json.dumps(RECORDS[2:]),
}


@pytest.mark.parametrize("form", FORMS)
def test_json_is_recognised_by_content(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = FORMS[form].encode()
    packed = {
        "": raw,
        ".gz": gzip.compress(raw),
        ".zst": zstandard.compress(raw),
        ".bz2": bz2.compress(raw),
    }
    names = [
        f"{name}{suffix}"
        for name in ("a.json", "b.jsonl", "c.ndjson", "d.txt", "part-00000")
        for suffix in packed
    ]
    for name in names:
        (tmp_path / name).write_bytes(
            packed[Path(name).suffix if Path(name).suffix in packed else ""]
        )
        documents, counts, _ = read(tmp_path / name)
        assert ([document.text for document in documents], counts) == (TEXTS, {}), name
    expected = [f"{tmp_path.name}/{name}" for name in sorted(names) if not name.startswith("part")]
    documents, _, _ = read(tmp_path)
    assert list(dict.fromkeys(document.file for document in documents)) == expected
    assert [document.line for document in documents[:5]] == [1, 2, 3, 4, 5]
    monkeypatch.setattr("data_prep.read.pieces.PIECE_BYTES", 50)
    assert texts_of(tmp_path) == TEXTS * len(expected)


@given(
    values=st.lists(
        st.recursive(
            st.text(st.sampled_from('ab "\\\n{}[],:é'), max_size=6) | st.integers() | st.none(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=3), inner, max_size=3)
            ),
            max_leaves=6,
        ).map(lambda value: {"v": value}),
        max_size=4,
    ),
    indent=st.sampled_from([None, 0, 2]),
    array=st.booleans(),
    size=st.integers(1, 40),
)
def test_values_come_out_a_line_each(
    values: list[object], indent: int | None, array: bool, size: int
) -> None:
    text = (
        json.dumps(values, indent=indent)
        if array
        else "\n".join(json.dumps(v, indent=indent) for v in values)
    )
    raw = text.encode()
    chunks = [raw[at : at + size] for at in range(0, len(raw), size)]
    lines = b"".join(sniff.as_lines(chunks, "elements" if array else "values")).split(b"\n")
    assert [json.loads(line) for line in lines if line.strip()] == values


def test_json_without_the_text_is_not_taken_for_text(tmp_path: Path) -> None:
    for name, value in {
        "package.json": json.dumps({"name": "x", "version": "1"}, indent=2),
        "vocab.json": json.dumps({"a": 1, "b": 2}),
        "alpaca.json": json.dumps([{"instruction": "x"}, {"instruction": "y"}], indent=1),
        "numbers.json": "[1, 2, 3]",
        "none.json": "no JSON",
    }.items():
        (tmp_path / name).write_text(value)
        documents, counts, _ = read(tmp_path / name)
        assert (documents, counts) == ([], {"other_json": 1}), name
    assert texts_of(tmp_path / "alpaca.json", text_field="instruction") == ["x", "y"]
    (tmp_path / "log.txt").write_text('{"level": 1}\n{"level": 2}\n')
    assert read(tmp_path / "log.txt")[:2] == ([], {"no_text": 2})
    for name, text in {
        "a.txt": '{"note": 1}',
        "b.tex": "{\\small\n\\em x}\n",
        "c.py": '{"a": 1,\n "b": 2}\n',
    }.items():
        (tmp_path / name).write_text(text)
        assert texts_of(tmp_path / name) == [text]


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"

    def write(columns: list[str], values: list[pa.Array]) -> None:
        pq.write_table(pa.Table.from_arrays(values, names=columns), path)

    one, other = pa.array(["one"]), pa.array(["other"])
    for columns in (["text", "text"], ["text", "id", "text"], ["text", "text", "text"]):
        write(columns, [one] * len(columns))
        with pytest.raises(
            ValueError, match=rf"found {columns.count('text')} columns 'text', expected one"
        ) as caught:
            texts_of(path)
        assert len(str(caught.value).splitlines()) == 1
    # Names that only begin alike, and others that are double, are no hindrance.
    for columns in (
        ["text.a", "text"],
        ["text", "text.a"],
        ["id", "id", "text"],
        ["Text", "text"],
        ["text", " text"],
    ):
        write(columns, [one if name == "text" else other for name in columns])
        assert texts_of(path) == ["one"]
    write(["text.a", "text"], [one, pa.array([{"a": "x"}])])
    with pytest.raises(ValueError, match="found column 'text' of type struct"):
        texts_of(path)
    write(["m"], [pa.StructArray.from_arrays([one, other], names=["text", "text"])])
    with pytest.raises(ValueError, match="found no column 'text', but 'm'"):
        texts_of(path)
