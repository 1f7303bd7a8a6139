"""What lies among the files that are read and is none of them; links to folders; globs and names
with brackets."""

import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.read.inputs import InputSource, find_sources
from tests.helpers.reading import read, texts_of


def below(source: InputSource) -> list[str]:
    return [file.name.partition("/")[2] for file in source.files]


def passed(*inputs: str | Path) -> dict[str, str]:
    """The kind of what was passed over, by its name below the INPUT."""
    return {
        finding.file.partition("/")[2]: finding.kind
        for source in find_sources(inputs)
        for finding in source.passed
    }


def fill(folder: Path, *names: str, text: str = "some text") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_whatever_is_passed_over_is_named(tmp_path: Path) -> None:
    fill(
        tmp_path,
        "a.txt",
        "b.csv",
        "c.PDF",
        "d",
        "e.tar.gz",
        "sub/.f.txt",
        ".git/config",
        "old/manifest.json",
    )
    fill(
        tmp_path,
        "old/tokenizer.model",
        "new/.dnt-partial/lock",
        "g.parquet.gz",
        "h.zip",
        "odd\x1b\n.bin",
    )
    (tmp_path / "dead.txt").symlink_to("nowhere")
    (tmp_path / "dead").symlink_to("../nowhere at all")
    (tmp_path / "self.md").symlink_to("self.md")
    os.mkfifo(tmp_path / "fifo.txt")
    [source] = find_sources([tmp_path])
    assert below(source) == ["a.txt"]
    suffixes = ("b.csv", "c.PDF", "d", "e.tar.gz", "g.parquet.gz", "h.zip", "odd\\x1b\\n.bin")
    assert passed(tmp_path) == {
        **dict.fromkeys(suffixes, "other_suffix"),
        **dict.fromkeys(["sub/.f.txt", ".git"], "hidden"),
        **dict.fromkeys(["old", "new"], "prepared_set"),
        **dict.fromkeys(["dead.txt", "dead", "self.md"], "dead_link"),
        "fifo.txt": "not_a_file",
    }
    details = {finding.file.rpartition("/")[2]: finding.detail for finding in source.passed}
    assert (details["b.csv"], details["d"]) == ("the suffix .csv", "a name without a suffix")
    assert details["dead"] == "a link to ../nowhere at all, which is not there"
    assert [finding.file for finding in source.passed] == sorted(
        finding.file for finding in source.passed
    )
    # Of a folder without anything to read, the error tells what is there.
    with pytest.raises(
        ValueError,
        match=r"no readable file in this folder \(passed over: 2, such as HEAD\), expected",
    ):
        fill(tmp_path, ".git/HEAD")
        find_sources([tmp_path / ".git"])
    with pytest.raises(
        ValueError, match=r"dead: a link to \.\./nowhere at all, which is not there"
    ):
        find_sources([tmp_path / "dead"])


def test_what_one_of_several_inputs_passes_over_is_told_once(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "b.csv")
    first, *others = find_sources([str(tmp_path / "*.txt"), tmp_path, tmp_path])
    assert ([finding.kind for finding in first.passed], others) == (["other_suffix"], [])


LINES = '{"text": "a line"}\n{"text": "another"}\n'


def test_cards_beside_data_are_no_documents(tmp_path: Path) -> None:
    fill(
        tmp_path,
        "README.md",
        "LICENSE.txt",
        "licence-mit.md",
        "docs/README.md",
        "docs/guide.md",
        "more/README.rst",
    )
    fill(tmp_path, "more/deep/CITATION.txt", "more/deep/x.jsonl", text=LINES)
    fill(tmp_path, "notes.txt", "readmegrave.txt", text="x")
    [source] = find_sources([tmp_path])
    cards = [
        "README.md",
        "LICENSE.txt",
        "licence-mit.md",
        "more/README.rst",
        "more/deep/CITATION.txt",
    ]
    assert {
        name: kind for name, kind in passed(tmp_path).items() if kind == "card"
    } == dict.fromkeys(cards, "card")
    assert below(source) == [
        "docs/README.md",
        "docs/guide.md",
        "more/deep/x.jsonl",
        "notes.txt",
        "readmegrave.txt",
    ]
    assert {name for name, kind in passed(tmp_path).items() if kind == "beside_data"} == {
        "notes.txt",
        "readmegrave.txt",
    }
    # Named, a card is read; matched, it is read and said.
    assert texts_of(tmp_path / "README.md") == ["some text"]
    assert passed(str(tmp_path / "more" / "*" / "*")) == {"deep/CITATION.txt": "beside_data"}


@pytest.mark.parametrize(
    ("name", "text", "is_data"),
    [
        ("x.json", LINES, True),
        ("x.json", '[\n{"body": 1},\n{"body": 2}]', True),
        ("x.json.gz", "packed", True),
        ("x.ndjson", "", True),
        ("package.json", '{\n "name": "x",\n "text": "y"\n}', False),
        ("x.json", "[1, 2]", False),
        ("x.csv", "a,b", False),
        ("x.txt", "a text", False),
    ],
)
def test_what_makes_a_readme_a_card(tmp_path: Path, name: str, text: str, is_data: bool) -> None:
    fill(tmp_path, "README.md", "a.txt")
    fill(tmp_path, name, text=text)
    assert ("README.md" in below(find_sources([tmp_path])[0])) is not is_data


def test_a_snapshot_of_a_data_set(tmp_path: Path) -> None:
    """As the cache of the Hugging Face hub has it: links to blobs, one of which was not fetched,
    and a card."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    (snapshot / "data").mkdir(parents=True)
    blobs.mkdir()
    pq.write_table(pa.table({"text": ["one", "two"]}), blobs / "1")
    (blobs / "2").write_text("# A card")
    (snapshot / "README.md").symlink_to(blobs / "2")
    for number in (1, 3):
        (snapshot / "data" / f"train-{number}.parquet").symlink_to(blobs / str(number))
    assert texts_of(snapshot) == ["one", "two"]
    assert passed(snapshot) == {"README.md": "card", "data/train-3.parquet": "dead_link"}


def test_links_to_folders_are_followed_once_each(tmp_path: Path) -> None:
    fill(tmp_path, "in/z/deep/a.txt", "far/b.txt", "far/more/c.txt", "other/d.txt")
    (tmp_path / "in" / "a-link").symlink_to("z/deep")
    (tmp_path / "in" / "far").symlink_to(tmp_path / "far")
    (tmp_path / "in" / "again").symlink_to("../far/more")
    (tmp_path / "far" / "round").symlink_to("../in")
    (tmp_path / "far" / "loop").symlink_to(".")
    (tmp_path / "in" / "z" / "up").symlink_to("..")
    (tmp_path / "in" / ".hidden").symlink_to("../other")
    [source] = find_sources([tmp_path / "in"])
    assert below(source) == ["again/c.txt", "far/b.txt", "z/deep/a.txt"]
    assert passed(tmp_path / "in") == {".hidden": "hidden"}
    assert below(find_sources([str(tmp_path / "in" / "**" / "*.txt")])[0]) == below(source)
    assert below(find_sources([str(tmp_path / "in" / "**")])[0]) == below(source)
    # A pattern finds a folder under each of its names.
    for pattern in (
        "in/**/far/*.txt",
        "in/**/far/more/*.txt",
        "in/*/more/c.txt",
        "in/**/again/*",
        "in/f*/b.txt",
    ):
        assert len(find_sources([str(tmp_path / pattern)])[0].files) == 1
    # An INPUT may be a link itself, and one file has one place in the corpus.
    assert below(find_sources([tmp_path / "in" / "far"])[0]) == [
        "b.txt",
        "more/c.txt",
        "round/z/deep/a.txt",
    ]
    assert len(texts_of(tmp_path / "far", tmp_path / "in", str(tmp_path / "**" / "b.txt"))) == 3


def test_many_links_to_each_other_end(tmp_path: Path) -> None:
    for one in range(12):
        fill(tmp_path, f"{one}/x.txt", text=str(one))
        for other in range(12):
            (tmp_path / str(one) / f"to-{other}").symlink_to(f"../{other}")
    assert len(texts_of(tmp_path / "0")) == 12
    assert len(texts_of(str(tmp_path / "0" / "**" / "to-3" / "**" / "*.txt"))) == 12


BRACKETS = ("proj[v1]", "a*b", "what?", "[!x]", "[", "{a,b}", "sp ace (1)")


@pytest.mark.parametrize("name", BRACKETS)
def test_what_exists_as_typed_is_taken_as_typed(tmp_path: Path, name: str) -> None:
    fill(
        tmp_path,
        f"{name}/a.md",
        f"{name}/sub/b.md",
        f"{name}/{name}.md",
        "projv/no.md",
        "axb/no.md",
        "whatx/no.md",
    )
    here = tmp_path / name
    assert below(find_sources([here])[0]) == sorted(["a.md", "sub/b.md", f"{name}.md"])
    assert [file.path for file in find_sources([here / f"{name}.md"])[0].files] == [
        str(here / f"{name}.md")
    ]
    assert "a.md" in below(find_sources([str(here / "a*.md")])[0])
    assert below(find_sources([str(here / "**" / "b.md")])[0]) == ["sub/b.md"]
    assert below(find_sources([str(here / "s*" / "b.md")])[0]) == ["sub/b.md"]
    fill(tmp_path, f"x/{name}/c.md")
    assert below(find_sources([str(tmp_path / "[x]" / name / "c.md")])[0]) == [f"x/{name}/c.md"]


def test_a_pattern_matches_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(
        tmp_path,
        "a1/x.txt",
        "a2/x.txt",
        "b/y.txt",
        "b/c/z.odd",
        ".h/x.txt",
        "a1/.x.txt",
        "old/manifest.json",
    )
    fill(tmp_path, "old/tokenizer.model", "old/x.txt", "old/sub/x.txt")
    monkeypatch.chdir(tmp_path)
    for pattern, expected in {
        "*/x.txt": ["a1/x.txt", "a2/x.txt"],
        "a[12]/x.txt": ["a1/x.txt", "a2/x.txt"],
        "a[!1]/*": ["a2/x.txt"],
        "**/*.odd": ["b/c/z.odd"],
        "b/**/*": ["c/z.odd", "y.txt"],
        "**/c/**/*.odd": ["b/c/z.odd"],
        "b/?.txt": ["y.txt"],
        "*/../b/y.*": ["a1/../b/y.txt"],
        "a1/../b/*.txt": ["y.txt"],
    }.items():
        assert below(find_sources([pattern])[0]) == expected, pattern
    assert passed("**/x.txt") == {".h": "hidden", "old": "prepared_set"}
    for pattern in ("*.nothing", "nowhere/*.txt", "b/y.txt/*", "[", "a[", "*/nothing"):
        with pytest.raises(ValueError, match=r"no file matches|no such file"):
            find_sources([pattern])


def test_a_home_that_a_quoted_glob_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "data/a.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    for item in ("~/data", "~/data/*.txt", "~/data/a.txt"):
        assert len(find_sources([item])[0].files) == 1
    with pytest.raises(ValueError, match=r"no such file|write the path out"):
        find_sources(["~no-such-user/x"])


@pytest.mark.parametrize("item", ["a\0b", "\udcff", "a\0*", "caf\udce9/*", "\0://x", " ", ""])
def test_odd_bytes_in_a_path_give_one_line(
    item: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:  # what it says differs
        find_sources([item])
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).encode()


def test_at_a_url(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    names = ["README.md", "a.jsonl", "b.json", "c.csv", ".d/x.txt", "p[1]/e.txt", "p1/f.txt"]
    fs.pipe(
        {f"/passed/{name}": (LINES if "json" in name else "some text").encode() for name in names}
    )
    try:
        assert read("memory://passed")[1] == {}
        assert passed("memory://passed") == {
            "README.md": "card",
            "c.csv": "other_suffix",
            ".d/x.txt": "hidden",
        }
        assert len(texts_of("memory://passed/b.json")) == 2
        assert below(find_sources(["memory://passed/p[1]/*.txt"])[0]) == ["e.txt"]
        assert below(find_sources(["memory://passed/p[1]"])[0]) == ["e.txt"]
        assert below(find_sources(["memory://passed/p[0-9]/*.txt"])[0]) == ["p1/f.txt"]
    finally:
        fs.rm("/passed", recursive=True)
