"""What is left out is said: a line on the screen, a row in the report, examples in rejects.jsonl;
and in a dry run."""

import gzip
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from data_prep import chunks
from data_prep.options import PrepareOptions
from data_prep.pipeline import prepare, train_tokenizer
from data_prep.report.models import format_left_out
from data_prep.report.terminal import print_plan
from data_prep.shards import PARTIAL, iter_documents
from data_prep.tokenizer import Tokenizer
from data_prep.verify import verify
from testbed.corpus import TEXT, contents, run

RUSSIAN = "Гавань открыта до полной воды, потом лодки уходят домой.\n" * 40
EXPECTED = {
    "other_suffix": 3,
    "stand_in": 2,
    "other_encoding": 2,
    "card": 1,
    "dead_link": 1,
    "empty": 1,
    "hidden": 1,
    "not_text": 1,
    "other_json": 1,
    "trailing_bytes": 1,
}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with something of everything."""
    folder = tmp_path / "mixed"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(TEXT * (number + 1))
    lines = [json.dumps({"text": f"{TEXT}{number}"}) + "\n" for number in range(40)]
    (folder / "sub" / "a.json").write_text("".join(lines[:20]))
    (folder / "sub" / "b.jsonl.gz").write_bytes(
        gzip.compress("".join(lines[20:]).encode()) + b"\r\n"
    )
    (tmp_path / "far" / "c.txt").write_text(TEXT * 3)
    (folder / "far").symlink_to("../far")
    (folder / "sub" / "utf16.txt").write_text(TEXT * 5, encoding="utf-16")
    (folder / "sub" / "LICENSE.md").write_text("Free, " * 90)
    for name in ("x.csv", "y.csv", "z.png"):
        (folder / name).write_text("a,b\n")
    for name in ("ru.txt", "ru-2.txt"):
        (folder / name).write_bytes(RUSSIAN.encode("cp1251"))
    for name in ("lfs.jsonl", "lfs.parquet"):
        (folder / name).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n"
        )
    (folder / "settings.json").write_text('{\n "a": 1\n}')
    (folder / "packed.txt").write_bytes(gzip.compress(RUSSIAN.encode()))
    (folder / "empty.md").touch()
    (folder / ".hidden").touch()
    (folder / "dead.txt").symlink_to("nowhere")
    return folder


def noted(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("note") and "left out" in line]


class Rows(HTMLParser):
    """The cells of every row of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_all_that_is_left_out_is_said_and_nothing_of_it_is_learnt(
    mixed: Path, tmp_path: Path
) -> None:
    _, said = run(mixed, tmp_path / "out")
    [line] = noted(said)
    assert line.startswith(
        "note      left out: 3 other_suffix (such as mixed/x.csv), 2 other_encoding (such as "
        "mixed/ru-2.txt)"
    )
    assert [
        int(part.split()[0]) for part in line.partition("left out: ")[2].split("), ")
    ] == sorted(EXPECTED.values(), reverse=True)
    records = [
        json.loads(record)
        for record in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    ]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {
        row[0]: row
        for row in Rows((tmp_path / "out" / "report.html").read_text()).rows
        if len(row) == 3
    }
    [source] = report["sources"]
    for kind, count in EXPECTED.items():
        assert f"{count} {kind} (" in line
        assert sum(record["kind"] == kind for record in records) == count
        assert source["findings"][kind] == count
        assert rows[kind][2] == str(count)
        assert rows[kind][1]
        assert source["named"][kind] in line
    assert (source["findings"]["utf16"], source["files"]) == (1, 41)
    # What was read is what was meant, and none of the rest is in the set or in the sample.
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.model")
    texts = [
        tokenizer.decode(ids)
        for split in ("train", "val")
        for ids in iter_documents(tmp_path / "out", split)
    ]
    assert len(texts) == 30 + 40 + 2
    assert all(text.startswith(TEXT) for text in texts)
    pieces = {tokenizer.decode([number]) for number in range(tokenizer.vocab_size)}
    assert "Free" not in "".join(pieces)
    assert not any("\u0400" <= char <= "\u04ff" for piece in pieces for char in piece)


def test_a_dry_run_and_a_tokenizer_say_the_same(mixed: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    print_plan(PrepareOptions(inputs=[mixed], out=tmp_path / "out"), console)
    [line] = noted(console.file.getvalue())
    # What only shows when a file is read to its end is not seen.
    missing = {"other_encoding", "trailing_bytes"}
    for kind, count in EXPECTED.items():
        assert (f"{count} {kind} (" in line) is (kind not in missing)
    assert not (tmp_path / "out").exists()
    console = Console(file=io.StringIO(), width=200)
    options = PrepareOptions(inputs=[mixed], out=tmp_path / "work", vocab_size=300, workers=1)
    train_tokenizer(options, tmp_path / "t.model", console)
    [line] = noted(console.file.getvalue())
    assert all(f"{count} {kind} (" in line for kind, count in EXPECTED.items())


def test_an_error_tells_what_was_left_out_too(mixed: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    options = PrepareOptions(inputs=[mixed], out=tmp_path / "out", vocab_size=90_000, workers=1)
    with pytest.raises(ValueError, match="largest that this corpus supports"):
        prepare(options, console)
    [line] = noted(console.file.getvalue())
    assert all(f"{count} {kind} (" in line for kind, count in EXPECTED.items())
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(mixed / "lfs.jsonl", only)
    with pytest.raises(
        ValueError,
        match=r"the corpus is empty: .*only/lfs\.jsonl: a pointer of Git LFS; `git lfs pull`",
    ):
        run(only, tmp_path / "out")
    (only / "lfs.jsonl").unlink()
    (only / "ru.txt").write_bytes(RUSSIAN.encode("cp1251"))
    with pytest.raises(
        ValueError, match=r"the corpus is empty: .*only/ru\.txt: byte 0x.. at 0, the first of"
    ):
        run(only, tmp_path / "out")


def test_the_bytes_do_not_depend_on_workers_tasks_or_what_was_there(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.read.inputs.UNIT_BYTES", 4000)
    monkeypatch.setattr("data_prep.read.pieces.PIECE_BYTES", 2000)
    run(mixed, tmp_path / "one" / "out")
    whole = contents(tmp_path / "one" / "out")
    run(mixed, tmp_path / "two" / "out", workers=2)
    assert contents(tmp_path / "two" / "out") == whole
    tokenizer = tmp_path / "one" / "out" / "tokenizer.model"
    given = {"tokenizer": tokenizer}
    run(mixed, tmp_path / "three" / "out", **given)
    whole = contents(tmp_path / "three" / "out")
    out = tmp_path / "four" / "out"
    for task in (1, 0):
        run(mixed, out, **given, task=(task, 2))
    run(mixed, out, **given)
    assert contents(out) == whole
    # Chunks that other code has made are not taken for these, which say other things of the same
    # files.
    out = tmp_path / "five" / "out"
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "VERSION", 1)
        for task in (1, 0):
            run(mixed, out, **given, task=(task, 2))
        assert list((out / PARTIAL).rglob("*.npz"))
    _, said = run(mixed, out, **given)
    assert "finished parts of" in said
    assert "are not used" in said
    assert contents(out) == whole


def test_nothing_is_told_of_the_set_in_the_making(mixed: Path, tmp_path: Path) -> None:
    run(mixed, tmp_path / "elsewhere")
    (mixed / ".out.prepare").mkdir()  # as jobs leave it
    run(mixed, mixed / "out")
    for name in ("rejects.jsonl", "train-000000.tar"):
        assert (mixed / "out" / name).read_bytes() == (tmp_path / "elsewhere" / name).read_bytes()


def test_appending_tells_of_what_is_appended(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    for number in range(20):
        (tmp_path / "first" / f"{number}.txt").write_text(TEXT * (number + 1))
    run(tmp_path / "first", tmp_path / "before")
    _, said = run(
        mixed,
        tmp_path / "after",
        append=tmp_path / "before",
        vocab_size=16384,
        seq_len=1024,
        val_fraction=0.005,
    )
    assert len(noted(said)) == 1
    assert verify(tmp_path / "after") == []


def test_the_line_names_the_largest_first_and_one_of_each() -> None:
    named = {
        "hidden": "a/.b",
        "card": "a/README",
        "beside_data": "a/x.txt",
        "malformed_json": "a.jsonl, line 3",
    }
    assert (
        format_left_out({"nul": 3, "crlf": 2, "utf16": 1, "malformed_json": 9, "no_text": 0}, named)
        == ""
    )
    assert format_left_out({"card": 1, "hidden": 1200, "dead_link": 2, "empty_line": 8}, named) == (
        "left out: 1,200 hidden (such as a/.b), 2 dead_link, 1 card (a/README)"
    )
    assert (
        format_left_out({"beside_data": 2}, named)
        == "read as documents: 2 text files beside data (such as a/x.txt)"
    )
