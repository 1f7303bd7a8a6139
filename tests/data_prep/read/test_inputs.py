import contextlib
import functools
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.read import inputs
from data_prep.read.inputs import find_sources, plan_units
from data_prep.read.pieces import read_pieces, stored_bytes
from tests.helpers.reading import read, texts_of


def test_a_folder_is_read_in_order_of_path(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    for name in (
        "b.txt",
        "a/z.md",
        "a/y.py",
        "c.RST",
        "image.png",
        "data.json",
        ".hidden/x.txt",
        ".x.txt",
        "a.tar.gz",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")
    (folder / "d.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (folder / "e.txt.zst").write_bytes(zstandard.compress(b"packed"))
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    (folder / "round").symlink_to(folder)
    os.mkfifo(folder / "fifo.txt")
    names = ["a/y.py", "a/z.md", "b.txt", "c.RST"]
    expected = [(f"corpus/{name}", 0, f"text of {name}") for name in names]
    lines = [
        ("corpus/d.jsonl", 1, "one"),
        ("corpus/d.jsonl", 2, "two"),
        ("corpus/e.txt.zst", 0, "packed"),
    ]
    assert read(folder)[0] == [*expected, *lines]


def test_names_never_hold_the_way_to_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus" / "sub").mkdir(parents=True)
    (tmp_path / "corpus" / "sub" / "a.txt").write_text("a")
    expected = [("corpus/sub/a.txt", 0, "a")]
    monkeypatch.chdir(tmp_path / "corpus")
    for item in (
        ".",
        tmp_path / "corpus",
        str(tmp_path / "corpus") + "/",
        "../corpus",
        f"file://{tmp_path}/corpus",
    ):
        assert read(item)[0] == expected
    assert read("*/a.txt")[0] == expected
    assert read(str(tmp_path / "corpus" / "**" / "*.txt"))[0] == expected
    monkeypatch.chdir(tmp_path / "corpus" / "sub")
    assert read("..")[0] == expected


def test_files_named_one_by_one_may_have_any_suffix(tmp_path: Path) -> None:
    (tmp_path / "main.odd").write_text("int main;")
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / "x.jsonl").write_text('{"text": "x"}')
    items = [tmp_path / "main.odd", tmp_path / "x.jsonl", tmp_path / "LICENSE"]
    assert [(source.name, len(source.files)) for source in find_sources(items)] == [
        ("files", 2),
        ("x.jsonl", 1),
    ]
    assert read(*items)[0] == [
        ("main.odd", 0, "int main;"),
        ("LICENSE", 0, "free"),
        ("x.jsonl", 1, "x"),
    ]


def test_a_file_reached_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    assert texts_of(tmp_path / "b.txt", tmp_path, str(tmp_path / "*.txt")) == ["b", "a"]


def test_no_two_sources_have_one_name(tmp_path: Path) -> None:
    for name in ("a/data", "b/data", "files"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.txt").write_text(name)
    (tmp_path / "lone.txt").write_text("lone")
    sources = find_sources([tmp_path / name for name in ("a/data", "b/data", "files", "lone.txt")])
    assert [source.name for source in sources] == ["data", "data (2)", "files", "files (2)"]
    assert sources[1].files[0].name == "data (2)/x.txt"


def test_hostile_names_are_shown_printable_and_read(tmp_path: Path) -> None:
    names = [
        b"new\nline.txt",
        b"\x1b[2Jclear.txt",
        b"caf\xe9.txt",
        "naïve 日本.txt".encode(),
        b"[x]*?.txt",
        b" .txt",
    ]
    for name in names:
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(name)
    documents, _, _ = read(tmp_path)
    shown = [document.file.removeprefix(f"{tmp_path.name}/") for document in documents]
    expected = [
        r" .txt",
        r"\x1b[2Jclear.txt",
        r"[x]*?.txt",
        r"caf\udce9.txt",
        r"new\nline.txt",
        "naïve 日本.txt",
    ]
    assert sorted(shown) == sorted(expected)
    assert all(file.encode().decode().isprintable() for file in shown)
    assert texts_of(tmp_path / "[x]*?.txt") == ["[x]*?.txt"]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("nowhere", "nowhere: no such file or folder"),
        ("empty", r"empty: no readable file in this folder, expected some ending in \.txt"),
        ("*.nothing", "no file matches"),
        ("a.zip", r"a\.zip: expected text, .*unpack it first"),
        ("*.zip", r"a\.zip: expected text, .*unpack it first"),
        ("a.parquet.gz", r"a\.parquet\.gz: expected text, .*unpack it first"),
        ("pipe", "pipe: neither a file nor a folder"),
        ("n" * 300, "cannot be read: File name too long"),
        ("a**b", r"a\*\*b: \*\* stands for folders"),
    ],
)
def test_input_that_cannot_be_read(tmp_path: Path, item: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=message):
        find_sources([tmp_path / item])


def test_no_input() -> None:
    with pytest.raises(ValueError, match="no input given"):
        find_sources([])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/x", "pip install s3fs"),
        ("gs://bucket/x", "pip install gcsfs"),
        ("no-such://x", "no-such"),
    ],
)
def test_a_file_system_that_is_not_there(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_sources([url])


def test_a_file_that_vanishes_or_changes_is_named(tmp_path: Path) -> None:
    for name in ("gone.txt", "shorter.jsonl", "gone.parquet"):
        (tmp_path / name).write_bytes(b"some text")
    units = plan_units(find_sources([tmp_path]))
    (tmp_path / "gone.txt").unlink()
    (tmp_path / "gone.parquet").unlink()
    (tmp_path / "shorter.jsonl").write_bytes(b"some")
    for unit, message in zip(
        units,
        [
            "gone.parquet: cannot be read: No such file",
            "gone.txt: cannot be",
            "found 4 bytes, expected 9",
        ],
        strict=True,
    ):
        with pytest.raises(ValueError, match=message):
            list(read_pieces(unit))


def test_the_stamp_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = find_sources([path])
    assert find_sources([path]) == before
    path.write_text("two")
    os.utime(path, ns=(1, 1))
    assert find_sources([path]) != before


def test_units_keep_the_order_and_group_or_cut_by_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "UNIT_BYTES", 100)
    for name, size in [
        ("a.txt", 60),
        ("b.txt", 40),
        ("c.txt", 1),
        ("d.jsonl.gz", 250),
        ("e.jsonl", 250),
        ("f.txt", 500),
    ]:
        (tmp_path / name).write_bytes(b"x" * size)
    units = plan_units(find_sources([tmp_path]))
    planned = [
        ([Path(file.name).name for file in unit.files], unit.start, unit.end) for unit in units
    ]
    assert planned == [
        (["a.txt", "b.txt"], 0, None),
        (["c.txt"], 0, None),
        (["d.jsonl.gz"], 0, None),
        (["e.jsonl"], 0, 100),
        (["e.jsonl"], 100, 200),
        (["e.jsonl"], 200, 250),
        (["f.txt"], 0, None),
    ]
    assert [stored_bytes(unit) for unit in units] == [100, 1, 250, 100, 100, 50, 500]


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_over_http(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    lines = b"".join(
        b'{"text": "line %d %s"}\n' % (number, os.urandom(40).hex().encode())
        for number in range(30_000)
    )
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    pq.write_table(pa.table({"text": ["row one", None, "row three"]}), folder / "b.parquet")
    (folder / "sub" / "c d.txt").write_text("a text")
    (folder / "no.png").write_text("")
    packed = texts_of(folder / "a.jsonl.zst")
    assert len(packed) == 30_000
    with served(folder) as url:
        assert texts_of(f"{url}/a.jsonl.zst?download=1") == packed
        assert read(f"{url}/b.parquet")[0] == [
            ("b.parquet", 1, "row one"),
            ("b.parquet", 3, "row three"),
        ]
        assert read(f"{url}/sub/")[0] == [("sub/c d.txt", 0, "a text")]
        assert [file.name for file in find_sources([f"{url}/sub/*.txt"])[0].files] == [
            "sub/c d.txt"
        ]
        names = [Path(file.name).name for file in find_sources([f"{url}/"])[0].files]
        assert names == ["a.jsonl.zst", "b.parquet", "c d.txt"]
        [unit] = plan_units(find_sources([f"{url}/a.jsonl.zst"]))
        assert unit.files[0].size == (folder / "a.jsonl.zst").stat().st_size
        (folder / "a.jsonl.zst").unlink()
        with pytest.raises(ValueError, match=r"a\.jsonl\.zst: cannot be read"):
            list(read_pieces(unit))
        with pytest.raises(ValueError, match="nothing: not there, or not to be reached"):
            find_sources([f"{url}/nothing"])
    with pytest.raises(ValueError, match="not to be reached"):
        find_sources([f"{url}/a.jsonl.zst"])


def test_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")
    pq.write_table(pa.table({"text": ["row"]}), tmp_path / "d.parquet")
    lines = b"".join(b'{"text": "line %d"}\n' % number for number in range(9))
    found = {
        "a%20.txt": b"a",
        "in/b.jsonl": lines,
        ".c.txt": b"c",
        "d.parquet": (tmp_path / "d.parquet").read_bytes(),
    }
    fs.pipe({f"/.dots/box/{name}": raw for name, raw in found.items()})
    monkeypatch.setattr(inputs, "UNIT_BYTES", 50)
    try:
        texts = [f"line {number}" for number in range(9)]
        assert texts_of("memory://.dots/box/in") == texts
        assert len(plan_units(find_sources(["memory://.dots/box/in"]))) > 2
        assert texts_of("memory://.dots/box/**/*.jsonl") == texts
        assert texts_of("memory://.dots/box") == ["a", "row", *texts]
        assert read("memory://.dots/box/a%20.txt")[0] == [("a%20.txt", 0, "a")]
        with pytest.raises(ValueError, match="not there"):
            find_sources(["memory://box/nothing"])
        with pytest.raises(ValueError, match="no file matches"):
            find_sources(["memory://.dots/box/*.csv"])
    finally:
        fs.rm("/.dots", recursive=True)
