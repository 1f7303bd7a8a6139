import bz2
import gzip
import hashlib
import io
import itertools
import json
import lzma
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_prep.read import inputs, oversize, pieces
from data_prep.read.inputs import find_sources, plan_units
from data_prep.read.pieces import read_pieces, stored_bytes
from tests.helpers.reading import pieces_of, read, texts_of

pytestmark = pytest.mark.slow

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
packers = pytest.mark.parametrize("suffix", PACKERS)
archives = pytest.mark.parametrize("suffix", list(PACKERS)[1:])


@packers
@given(raw=st.binary(max_size=200), cut=st.integers(0, 200))
def test_any_bytes_come_back_from_any_packing(suffix: str, raw: bytes, cut: int) -> None:
    pack = PACKERS[suffix]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"one.txt{suffix}").write_bytes(pack(raw))
        Path(folder, f"two.txt{suffix}").write_bytes(
            pack(raw[:cut]) + pack(raw[cut:])
        )  # members after one another
        # Whether it is read as text is for test_documents.py: of all that is said of it, both say
        # the same.
        documents, _, records = read(folder)
        said: dict[str, list[object]] = {f"{name}.txt{suffix}": [] for name in ("one", "two")}
        for document in documents:
            said[Path(document.file).name].append(document.text)
        for record in records:
            said[Path(str(record["file"])).name].append((record["kind"], record["detail"]))
        assert said[f"one.txt{suffix}"] == said[f"two.txt{suffix}"] != []
        if (
            raw
            and raw.isascii()
            and raw.decode().isprintable()
            and not re.search(rb"[^a-z ]|[a-z]{4}", raw)
        ):
            assert said[f"one.txt{suffix}"][0] == raw.decode()


@archives
def test_an_archive_that_is_cut_short_anywhere_is_an_error(tmp_path: Path, suffix: str) -> None:
    raw = b"".join(b'{"text": "line %d"}\n' % number for number in range(50))
    whole = PACKERS[suffix](raw[:300]) + PACKERS[suffix](raw[300:])
    path = tmp_path / f"a.jsonl{suffix}"
    boundary = len(PACKERS[suffix](raw[:300]))
    for length in set(range(1, len(whole))) - {boundary}:
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=r"a\.jsonl\S*: damaged after \d+ unpacked bytes: .*make it again"
        ):
            texts_of(path)
    path.write_bytes(whole)
    assert len(texts_of(path)) == 50


@archives
@given(data=st.data())
def test_a_damaged_archive_is_an_error_or_harmless(suffix: str, data: st.DataObject) -> None:
    whole = bytearray(PACKERS[suffix](b'{"text": "one two three"}\n' * 9))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a.jsonl{suffix}")
        path.write_bytes(bytes(whole) + data.draw(st.binary(max_size=9)))
        try:
            texts_of(path)
        except ValueError as error:
            assert f"{path}: damaged after" in str(error)


@archives
def test_what_follows_an_archive(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    whole = PACKERS[suffix](b"text")
    for rest in (b"\r\n", b"x", b"rest", b"-----BEGIN SIGNATURE-----\n" * 40, b"\1" + bytes(4095)):
        for name in (f"a.txt{suffix}", f"b.jsonl{suffix}"):
            text = b'{"text": "text"}' if "jsonl" in name else b"text"
            (tmp_path / name).write_bytes(PACKERS[suffix](text) + rest)
            documents, counts, [record] = read(tmp_path / name)
            assert ([document.text for document in documents], counts) == (
                ["text"],
                {"trailing_bytes": 1},
            )
            assert (record["file"], record["detail"]) == (
                name,
                f"{len(rest):,} bytes after the last whole member",
            )
    for rest in (b"x" * 70_000, b"rest" + whole, bytes([whole[0] ^ 1]) + whole[1:]):
        path.write_bytes(whole + rest)
        with pytest.raises(
            ValueError,
            match=rf"damaged after 4 unpacked bytes: no member begins .* at byte {len(whole)}",
        ):
            texts_of(path)
    path.write_bytes(b"")
    assert read(path)[:2] == ([], {"empty": 1})


def test_padding_and_skippable_frames(tmp_path: Path) -> None:
    (tmp_path / "a.txt.xz").write_bytes(
        lzma.compress(b"a") + bytes(8) + lzma.compress(b"b") + bytes(4)
    )
    (tmp_path / "b.txt.gz").write_bytes(
        gzip.compress(b"a") + bytes(600) + gzip.compress(b"b") + bytes(7)
    )
    frame = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    (tmp_path / "c.txt.zst").write_bytes(
        frame + zstandard.compress(b"a") + frame + zstandard.compress(b"b") + frame
    )
    assert texts_of(tmp_path) == ["ab", "ab", "ab"]


lines_of_json = st.lists(
    st.one_of(
        st.text(max_size=40).map(
            lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()
        ),
        st.sampled_from(
            [b"", b" \r", b"{", b'{"body": 1}', b'{"text": "\xff"}', b'{"text": "\\ud800"}']
        ),
    ),
    max_size=20,
)


@given(
    lines=lines_of_json,
    final=st.booleans(),
    size=st.integers(1, 120),
    limit=st.integers(0, 60),
    data=st.data(),
)
def test_pieces_do_not_depend_on_how_the_bytes_arrive(
    lines: list[bytes], final: bool, size: int, limit: int, data: st.DataObject
) -> None:
    raw = b"\n".join(lines) + b"\n" * final
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)))))
    chunks = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) if raw[a:b]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", size)
        patch.setattr(oversize, "MAX_DOCUMENT", size + limit)
        at_once, in_chunks = (
            [
                run if isinstance(run, bytes) else (run.file.seek(0), run.file.read(), run.newlines)
                for run in runs
            ]
            for runs in (pieces._runs(iter([raw] if raw else [])), pieces._runs(iter(chunks)))
        )
    assert in_chunks == at_once
    joined = b"".join(run if isinstance(run, bytes) else run[1] + b"\n" * run[2] for run in at_once)
    assert joined == raw
    for run in at_once:
        if isinstance(run, bytes):
            assert len(run) <= size or (
                run.count(b"\n") <= 1 and len(run.rstrip(b"\n")) <= size + limit
            )
        else:
            assert len(run[1]) > size + limit


@given(lines=lines_of_json, final=st.booleans(), unit=st.integers(1, 60), piece=st.integers(1, 60))
def test_ranges_and_small_pieces_give_the_same_documents(
    lines: list[bytes], final: bool, unit: int, piece: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder, "a.jsonl")
        path.write_bytes(b"\n".join(lines) + b"\n" * final)
        documents, counts, records = read(path)
        patch.setattr(inputs, "UNIT_BYTES", unit)
        patch.setattr(pieces, "PIECE_BYTES", piece)
        found, found_counts, found_records = read(path)
        assert [document.text for document in found] == [document.text for document in documents]
        assert found_counts == counts
        assert [(r["kind"], r["raw"]) for r in found_records] == [
            (r["kind"], r["raw"]) for r in records
        ]
        # Lines are counted in each range, and all newlines are.
        before, lines_before = 0, 0
        numbers = []
        for part in plan_units(find_sources([path])):
            for each in read_pieces(part):
                assert each.start == part.start
                numbers += [
                    lines_before + each.first_line + n for n in range(each.lines.count(b"\n") or 1)
                ]
                before += each.line_count
            lines_before = before
        assert numbers == list(range(1, len(numbers) + 1))
        assert before == path.read_bytes().count(b"\n")


def test_progress_adds_up_to_what_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    monkeypatch.setattr(inputs, "UNIT_BYTES", 5000)
    raw = b"".join(b'{"text": "line %d"}\n' % number for number in range(1000))
    for suffix, pack in PACKERS.items():
        (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(raw))
        (tmp_path / f"a.txt{suffix}").write_bytes(pack(raw))
    pq.write_table(
        pa.table({"text": [str(number) * 9 for number in range(1000)]}), tmp_path / "a.parquet"
    )
    for unit in plan_units(find_sources([tmp_path])):
        found = list(read_pieces(unit))
        assert sum(piece.input_bytes for piece in found) == stored_bytes(unit)
        assert [piece.number for piece in found] == list(range(len(found)))
        assert all(piece.input_bytes >= 0 for piece in found)


@given(
    text=st.text(st.sampled_from("ab \n\u00e9\u20ac\U0001f600"), min_size=1, max_size=120),
    limit=st.integers(4, 30),
    data=st.data(),
)
def test_a_long_text_is_cut_between_characters(text: str, limit: int, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)))))
    chunks = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oversize, "MAX_DOCUMENT", limit)
        parts = list(oversize.cut_text(chunks))
    assert "".join(part.decode() for part in parts) == text
    assert all(0 < len(part) <= limit for part in parts)
    for part, following in itertools.pairwise(parts):
        window = (part + following)[:limit]
        assert part.endswith(b"\n") or (
            b"\n" not in window and (part.endswith(b" ") or b" " not in window)
        )


json_text = st.text(st.sampled_from('ab \\"\n\0\u00e9\u20ac\U0001f600u/'), max_size=80)
json_value = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), json_text),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(json_text, inner, max_size=3),
    max_leaves=8,
)


@given(
    before=st.dictionaries(json_text, json_value, max_size=3),
    after=st.dictionaries(json_text, json_value, max_size=3),
    text=json_text,
    field=st.sampled_from(["text", 'a"\u00e9']),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
    limit=st.integers(14, 40),
    window=st.integers(1, 30),
)
def test_the_text_of_a_long_line_is_found_and_cut(
    before: dict[str, object],
    after: dict[str, object],
    text: str,
    field: str,
    ascii_only: bool,
    indent: int | None,
    limit: int,
    window: int,
) -> None:
    value = before | {field: text} | after
    line = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oversize, "MAX_DOCUMENT", limit)
        patch.setattr(oversize, "WINDOW", window)
        place = oversize.find_text(io.BytesIO(line), 0, field)
        if not isinstance(value[field], str):
            assert place is None
            return
        assert place is not None
        parts = list(oversize.cut_string(io.BytesIO(line), *place))
    assert "".join(json.loads(b'"' + part + b'"') for part in parts) == value[field]
    assert all(len(part) <= limit for part in parts)
    for part in parts:
        json.loads(b'"' + part + b'"').encode()  # no pair of surrogates is torn


@pytest.mark.parametrize(
    "text", ["\\ud83d" * 9, "\\\\ud83d" * 9, "\U0001f600" * 9, "\\" * 40, "x\\u\u20acd" * 9]
)
def test_backslashes_and_pairs_at_a_cut(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in range(14, 30):
        monkeypatch.setattr(oversize, "MAX_DOCUMENT", limit)
        for before in range(8):
            body = json.dumps("x" * before + text)[1:-1].encode()
            parts = list(oversize.cut_string(io.BytesIO(body), 0, len(body)))
            loaded = [json.loads(b'"' + part + b'"') for part in parts]
            assert "".join(loaded) == "x" * before + text
            assert all(part.encode() for part in loaded)
            assert all(len(part) <= limit for part in parts)


def test_the_last_of_several_fields_of_a_long_line_counts() -> None:
    line = b'{"text": "first", "text": "last"}'
    assert oversize.find_text(io.BytesIO(line), 0, "text") == (
        line.index(b"last"),
        line.index(b"last") + 4,
    )
    assert oversize.find_text(io.BytesIO(b'{"text": "first", "text": null}'), 0, "text") is None


def test_a_line_of_just_the_largest_size_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oversize, "MAX_DOCUMENT", 20)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 10)
    whole, long, last = pieces._runs(iter([b"x" * 20 + b"\n" + b"y" * 21 + b"\n" + b"z"]))
    assert (whole, last) == (b"x" * 20 + b"\n", b"z")
    assert not isinstance(long, bytes)
    assert long.newlines == 1
    long.file.close()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "the end of the line at byte 0, where '{' belongs"),
        (b"[1]", r"'\[' at byte 0"),
        (b'{"text": "cut', "the end of the line at byte 13"),
        (b'{"text": "a\nb"}', r"'\\n' at byte 11"),
        (
            b'{"text": "a\\x"}',
            r"byte 11, where a character, a valid escape or the string's end belongs",
        ),
        (b'{"text" "a"}', "where ':' belongs"),
        (b'{"text": }', "'}' at byte 9, where a value belongs"),
        (b'{"text": [1, {"a": "b"', "where a bracket that closes belongs"),
        (b'{"text": "a"} x', "'x' at byte 14, where the end of the line belongs"),
        (b'{"text": "a",}', "where '\"' belongs"),
        (b"{\xff", r"'\\\\xff' at byte 1"),
    ],
)
def test_a_long_line_that_is_malformed(line: bytes, message: str) -> None:
    with pytest.raises(oversize.Malformed, match=message):
        oversize.find_text(io.BytesIO(line), 0, "text")


def test_long_lines_among_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oversize, "MAX_DOCUMENT", 64)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 32)
    long = "long text " * 20
    lines = [
        b"\xef\xbb\xbf" + json.dumps({"text": long}).encode(),
        b'{"text": "short"}',
        json.dumps({"text": "first", "pad": "x" * 100}).encode(),
        b'{"text": "' + b"x" * 100,
        b'{"body": "' + b"x" * 100 + b'"}',
        b'{"text": "' + b"caf\xe9 \\ud800 \\u0000 and some ASCII around it; " * 9 + b'"}',
        b'{"text": "", "pad": "' + b"x" * 100 + b'"}',
        json.dumps({"text": long}).encode(),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert sum(piece.line_count for piece in pieces_of(tmp_path / "a.jsonl")) == len(lines) - 1
    documents, counts, records = read(tmp_path / "a.jsonl")
    texts: dict[int, str] = {}
    for document in documents:
        texts[document.line] = texts.get(document.line, "") + document.text
    mended = "caf\ufffd \ufffd \0 and some ASCII around it; " * 9
    assert texts == {1: long, 2: "short", 3: "first", 6: mended, 8: long}
    assert {
        "byte_order_mark": 1,
        "cut": 3,
        "malformed_json": 1,
        "no_text": 1,
        "empty": 1,
    }.items() <= counts.items()
    places = {(record["kind"], record["line"]) for record in records}
    assert {
        ("cut", 1),
        ("malformed_json", 4),
        ("no_text", 5),
        ("lone_surrogate", 6),
        ("empty", 7),
        ("cut", 8),
    } <= places


MEASURE = """
import hashlib, sys
from data_prep.read import inputs
from data_prep.read import pieces
from data_prep.read import documents as read
from testbed.peak import peak_kb
text = hashlib.sha256()
for unit in inputs.plan_units(inputs.find_sources([sys.argv[1]])):
    for piece in pieces.read_pieces(unit):
        for document in read.read_documents(piece, "text", read.Findings(), False):
            text.update(document.text.encode())
print(text.hexdigest(), peak_kb() // 1024)
"""


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.zst", "b.txt.bz2"])
def test_memory_is_bounded_whatever_is_long(tmp_path: Path, name: str) -> None:
    block = "A line — of text.\n\\\U0001f600" * 40_000 if name == "a.jsonl" else "x" * (1 << 20)
    repeats = 130 * (1 << 20) // len(block.encode())
    path = tmp_path / name
    opened = {".zst": zstandard.open, ".bz2": bz2.open}.get(path.suffix, io.open)
    inner = json.dumps(block)[1:-1] if "jsonl" in name else block
    with opened(path, "wb") as file:
        file.write(b'{"id": 1, "text": "' if "jsonl" in name else b"")
        for _ in range(repeats):
            file.write(inner.encode())
        file.write(b'"}' if "jsonl" in name else b"")
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    digest, megabytes = ran.stdout.split()
    assert int(megabytes) < 250
    expected = hashlib.sha256()
    for _ in range(repeats):
        expected.update(block.encode())
    assert digest == expected.hexdigest()


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["one", "", None, "b" * 100, "\x00\r\n", "last"]
    for kind in (
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ):
        table = pa.table({"id": range(6), "body": pa.array(texts, pa.string()).cast(kind)})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
        documents, counts, records = read(tmp_path / "a.parquet", text_field="body")
        assert [(d.line, d.text) for d in documents] == [
            (1, "one"),
            (4, "b" * 100),
            (5, "\0\r\n"),
            (6, "last"),
        ]
        assert counts == {"empty": 1, "no_text": 1, "nul": 1, "crlf": 1}
        assert ("no_text", 3) in {(record["kind"], record["line"]) for record in records}
    pq.write_table(pa.table({"text": pa.array([b"caf\xe9", b"ok"])}), tmp_path / "b.parquet")
    assert texts_of(tmp_path / "b.parquet") == ["caf\ufffd", "ok"]
    monkeypatch.setattr(oversize, "MAX_DOCUMENT", 40)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 40)
    documents, counts, _ = read(tmp_path / "a.parquet", text_field="body")
    assert [d.text for d in documents if d.line == 4] == ["b" * 40, "b" * 40, "b" * 20]
    assert counts["cut"] == 1


def test_parquet_without_a_column_of_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError,
        match=r"a\.parquet: found no column 'text', but 'id', 'body'; name .*--text-field",
    ):
        pieces_of(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="found column 'id' of type int64, expected string"):
        pieces_of(tmp_path / "a.parquet", text_field="id")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"row {number} " * 50 for number in range(2000)]}),
        path,
        row_group_size=500,
    )
    whole = path.read_bytes()
    for damaged in (
        b"PAR1",
        b"no parquet at all",
        whole[:-9],
        whole[: len(whole) // 2],
        b"x" * 900 + whole[900:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.parquet: damaged after row \d+: ") as caught:
            pieces_of(path)
        assert re.search(r"expected a whole parquet file, make it again$", str(caught.value))


def test_a_column_of_nulls_ends_in_pieces_too(tmp_path: Path) -> None:
    rows = 200_000
    pq.write_table(pa.table({"text": pa.nulls(rows, pa.string())}), tmp_path / "nulls.parquet")
    [unit] = plan_units(find_sources([tmp_path / "nulls.parquet"]))
    sizes = [len(piece.texts) for piece in read_pieces(unit)]
    assert sum(sizes) == rows
    assert max(sizes) * 64 <= pieces.PIECE_BYTES
