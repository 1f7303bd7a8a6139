import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_prep.read import Counts, _lines, find_sources, read_documents


def read(*inputs: str | Path) -> list[tuple[str, str]]:
    return [tuple(document) for source in find_sources(inputs) for document in read_documents(source)]


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def test_a_folder_is_read_in_order_of_path(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    for name in ("b.txt", "a/z.md", "a/y.py", "c.rst", "image.png", ".hidden/x.txt", ".x.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")
    (folder / "d.jsonl").write_bytes(jsonl("one", "two"))
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    names = ["a/y.py", "a/z.md", "b.txt", "c.rst"]
    expected = [(f"corpus/{name}", f"text of {name}") for name in names]
    assert read(folder) == [*expected, ("corpus/d.jsonl", "one"), ("corpus/d.jsonl", "two")]


def test_names_never_hold_the_way_to_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus" / "sub").mkdir(parents=True)
    (tmp_path / "corpus" / "sub" / "a.txt").write_text("a")
    expected = [("corpus/sub/a.txt", "a")]
    monkeypatch.chdir(tmp_path / "corpus")
    for item in (".", tmp_path / "corpus", str(tmp_path / "corpus") + "/", "../corpus"):
        assert read(item) == expected
    assert read("*/a.txt") == expected
    assert read(str(tmp_path / "corpus" / "**" / "*.txt")) == expected
    monkeypatch.chdir(tmp_path / "corpus" / "sub")
    assert read("..") == expected


def test_files_named_one_by_one_may_have_any_suffix(tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text("int main;")
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / "x.jsonl").write_bytes(jsonl("x"))
    inputs = [tmp_path / "main.c", tmp_path / "x.jsonl", tmp_path / "LICENSE"]
    assert [(source.name, len(source.files)) for source in find_sources(inputs)] == [("files", 2), ("x.jsonl", 1)]
    assert read(*inputs) == [("main.c", "int main;"), ("LICENSE", "free"), ("x.jsonl", "x")]


def test_a_file_reached_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    assert [text for _, text in read(tmp_path / "b.txt", tmp_path, str(tmp_path / "*.txt"))] == ["b", "a"]


@pytest.mark.parametrize("text", ["a\r\nb\rc\n\n", "\ufeffmarked", "\0\x01", "  spaces \t", "\u2028\u0085", "\n"])
def test_text_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.jsonl").write_bytes(jsonl(text))
    assert [read_text for _, read_text in read(tmp_path)] == [text, text]


def test_broken_utf8_is_replaced_and_empty_documents_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9!")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_text("café")
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "caf\xe9!"}\n{"text": ""}\n\n{"text": "x\\ud800y\\ud83d\\ude00"}')
    [source] = find_sources([tmp_path])
    counts = Counts()
    texts = [text for _, text in read_documents(source, counts)]
    assert texts == ["caf\ufffd!", "café", "caf\ufffd!", "x\ufffdy\U0001f600"]
    assert counts == Counts(4, sum(len(text.encode()) for text in texts), replaced=3, empty=2)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    texts = ["one\nline", "two", "é" * 3_000_000, "last"]
    raw = b"\xef\xbb\xbf" + jsonl(*texts)
    path = tmp_path / f"a.jsonl{suffix}"
    frames = [zstandard.compress(raw[:1000]), zstandard.compress(raw[1000:])]
    path.write_bytes({"": raw, ".gz": gzip.compress(raw), ".zst": b"".join(frames)}[suffix])
    assert [text for _, text in read(path)] == texts


@given(st.lists(st.binary(max_size=20)), st.data())
def test_lines_do_not_depend_on_the_chunks(lines: list[bytes], data: st.DataObject) -> None:
    raw = b"\n".join(lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)))))
    chunks = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    expected = raw.split(b"\n")
    assert list(_lines(chunks)) == (expected if expected[-1] else expected[:-1])


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"text": "cut', '\'{"text": "cut\''),
        (b'{"id": 1, "body": "x"}', "the fields 'id', 'body'"),
        (b"{}", "(none)"),
        (b'{"text": null}', '"text" of type NoneType'),
        (b'["text"]', "a JSON list"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: bytes, found: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl("good") + line + b"\n")
    with pytest.raises(ValueError, match='expected a JSON object with a "text" string; mend') as caught:
        read(path)
    assert f"{path}: line 2: " in str(caught.value)
    assert found in str(caught.value)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_archive_is_named(tmp_path: Path, suffix: str) -> None:
    raw = jsonl(*(os.urandom(40).hex() for _ in range(100)))
    whole = gzip.compress(raw) if suffix == ".gz" else zstandard.compress(raw)
    path = tmp_path / f"a.jsonl{suffix}"
    for content in (whole[: len(whole) // 2], whole[:-5], b"not compressed", whole + b"rest"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.jsonl"):
            read(path)


def test_input_that_is_not_there_or_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="no input"):
        read()
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"empty: no readable file in this folder, expected some ending in \.txt"):
        read(tmp_path / "empty")
    with pytest.raises(ValueError, match="no file matches"):
        read(str(tmp_path / "*.nothing"))
    for item in (tmp_path / "a.parquet", str(tmp_path / "*.parquet")):
        with pytest.raises(ValueError, match=r"a\.parquet: expected text"):
            read(item)
