"""docs/extend/data.md as it stands: its code put where it says, its commands run, its tests too."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from testbed.run import Finished, python

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extend" / "data.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def insert(file: Path, text: str, *, before: str) -> None:
    """Put text into a file, above the only line that begins so."""
    lines = file.read_text().splitlines(keepends=True)
    [place] = [number for number, line in enumerate(lines) if line.startswith(before)]
    file.write_text("".join([*lines[:place], text, *lines[place:]]))


def insert_into_dict(file: Path, entry: str, *, name: str) -> None:
    """Put an entry at the end of a module's dict."""
    source = file.read_text()
    start = source.index(f"\n{name}: dict")
    end = source.index("\n}\n", start)
    file.write_text(source[: end + 1] + entry + source[end + 1 :])


RULE, RULE_NAME, RULE_TEST, READER, READER_IMPORT, READER_NAME = blocks("python")
RULE_COMMAND, READER_COMMAND = (
    shlex.split(block.replace("\\\n", " "))[1:] for block in blocks("bash")
)
[RULES_FILE] = blocks("yaml")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages with what the page adds, and nothing else changed."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("dnt_scale", "data_prep", "cluster", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    rules = folder / "data_prep/clean/rules.py"
    insert(rules, f"{RULE}\n\n", before="RULES: dict")
    insert_into_dict(rules, RULE_NAME, name="RULES")
    [name] = re.findall(r"^`([\w./]+)`:$", PAGE, re.MULTILINE)
    assert not (folder / name).exists()
    (folder / name).write_text(READER)
    formats = folder / "data_prep/read/formats.py"
    insert(formats, READER_IMPORT, before="from data_prep.read import parquet")
    insert_into_dict(formats, READER_NAME, name="ROW_FORMATS")
    return folder


def dnt(tree: Path, folder: Path, *words: str) -> Finished:
    """A `dnt` command of that tree, run in a folder."""
    code = f"import os, sys; os.chdir({str(folder)!r}); from dnt_scale.cli.main import main"
    code += f"; sys.exit(main({list(words)!r}))"
    return python("-P", "-c", code, env={"PYTHONPATH": str(tree)})


def test_the_rule_drops_pages_of_links(tree: Path, tmp_path: Path) -> None:
    texts = [f"page {number} of a text that has words and no links" for number in range(40)]
    texts.append("https://a.org https://b.org https://c.org and more")
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "pages.jsonl").write_text("".join(lines))
    (tmp_path / "links.yaml").write_text(RULES_FILE)
    said = dnt(tree, tmp_path, *RULE_COMMAND).ok()
    assert "rules     -1: link_share 1\n" in said.err and "rules     -1: link_share 1" in PAGE
    report = json.loads((tmp_path / "data/pages/report.json").read_text())
    assert report["rules"]["link_share"]["samples"][0]["detail"] == "link words 0.6 > 0.3"

    misspelt = RULES_FILE.replace("max_link_words", "max_links_word")
    (tmp_path / "links.yaml").write_text(misspelt)
    again = [word.replace("data/pages", "data/again") for word in RULE_COMMAND]
    assert "did you mean max_link_words?" in dnt(tree, tmp_path, *again).error()


def test_the_rule_s_own_test_passes(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "test_rule.py").write_text(
        "from data_prep.clean.page import Page\n"
        f"from data_prep.clean.rules import LinkShare, link_share\n\n\n{RULE_TEST}"
    )
    words = ("-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_rule.py"))
    assert "1 passed" in python(*words, env={"PYTHONPATH": str(tree)}).ok().out


def test_the_format_is_read_and_what_is_wrong_with_it_is_said(tree: Path, tmp_path: Path) -> None:
    rows = [f'{number},"talk {number}, said ""aloud"",\nin two lines"\r\n' for number in range(40)]
    (tmp_path / "talks.csv").write_text("\ufeffid,speech\r\n" + "".join(rows) + "40,\r\n")
    said = dnt(tree, tmp_path, *READER_COMMAND).ok()
    assert said.err.count("round trip exact)") == 1
    report = json.loads((tmp_path / "data/talks/report.json").read_text())
    [source] = report["sources"]
    assert (source["read"], source["findings"]) == (40, {"empty": 1})
    assert source["examples"][0]["text"].endswith('said "aloud",\nin two lines')

    def refused(content: bytes) -> str:
        (tmp_path / "talks.csv").write_bytes(content)
        again = [word.replace("data/talks", "data/again") for word in READER_COMMAND]
        return dnt(tree, tmp_path, *again).error()

    assert "found no column 'speech', but 'id', 'text'; name the" in refused(b"id,text\n1,a\n")
    assert "talks.csv: damaged after row 1: " in refused(b'id,speech\n1,a\n2,"a"b\n')
    assert "the corpus is empty" in refused(b"")
