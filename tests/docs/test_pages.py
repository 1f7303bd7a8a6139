"""The documentation says what is so: links, paths, modules, keys, commands and their options,
the lines' length.
"""

import argparse
import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from dnt_scale import config
from dnt_scale.cli.main import parser
from dnt_scale.sweep.combinations import read_override, with_values
from docs.make import configuration, wrap
from tests.docs.pages import (
    CURRENT,
    HISTORY,
    NAMES,
    ROOT,
    anchors,
    commands,
    lines,
    links,
    spans,
)

TREE = re.compile(r"(dnt_scale|data_prep|cluster|configs|tests|benchmarks|docs)/[\w./*-]*")


def test_there_is_something_to_check() -> None:
    assert {"README.md", "docs/train/start.md", "docs/reference/configuration.md"} <= set(NAMES)
    assert set(NAMES) >= HISTORY and len(CURRENT) > 15
    found = [words for name in CURRENT for words in commands(name)]
    assert ["make", "demo"] in found and ["make", "demo-images"] in found
    assert ["dnt", "eval", "runs/first"] in found
    assert sum(words[0] == "dnt" for words in found) > 50
    assert "#exit-status" in {f"#{anchor}" for anchor in anchors("docs/faults.md")}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in links(name):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        found = (ROOT / name).parent / path if path else ROOT / name
        assert found.exists(), f"{name}: {target}"
        if anchor:
            assert anchor in anchors(found.resolve().relative_to(ROOT).as_posix()), (
                f"{name}: {target}"
            )


@pytest.mark.parametrize("name", CURRENT)
def test_paths_are_there(name: str) -> None:
    for span in spans(name):
        if TREE.fullmatch(span) and "NAME" not in span and "GROUP" not in span:
            assert list(ROOT.glob(span.rstrip("/"))), f"{name}: {span}"


@pytest.mark.parametrize("name", CURRENT)
def test_modules_are_there(name: str) -> None:
    text = "\n".join(
        [*spans(name), *(line for line, language in lines(name) if language is not None)]
    )
    for module in re.findall(r"-m ((?:dnt_scale|data_prep|cluster|benchmarks|docs)[\w.]*)", text):
        assert importlib.util.find_spec(module) is not None, f"{name}: {module}"


@pytest.mark.parametrize("name", CURRENT)
def test_keys_are_there(name: str) -> None:
    known = keys()
    sections = {key.partition(".")[0] for key in known}
    for span in spans(name):
        for key in re.findall(
            r"(?<![\w./-])([a-z]+\.[a-z_]+)(?=[=. ]|$)", re.sub(r"-m \S+", "", span)
        ):
            of_a_file = key.endswith((".py", ".md", ".json", ".jsonl", ".yaml", ".db", ".tar"))
            if key.partition(".")[0] in sections and not of_a_file:
                assert key in known, f"{name}: {span}"


def keys() -> set[str]:
    """SECTION.KEY of every key that the page of the configuration lists."""
    rows = re.findall(
        r"^\| `([a-z_]+\.[a-z_]+)", configuration.PAGE.read_text("utf-8"), re.MULTILINE
    )
    return set(rows)


@pytest.mark.parametrize("name", CURRENT)
def test_options_in_the_text_are_there(name: str) -> None:
    for span in spans(name):
        words = span.split()
        if words[0] == "dnt":
            here = parser()
            words = words[1:]
            while words and (below := subcommands(here)):
                if words[0] in below:
                    here = below[words.pop(0)]
                else:
                    assert not re.fullmatch("[a-z-]+", words[0]), f"{name}: {span}"
                    break
            for word in words:
                if word.startswith("--") and word != "--help":
                    assert word.partition("=")[0] in here._option_string_actions, f"{name}: {span}"


def subcommands(of: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(
        (
            dict(each.choices)
            for each in of._actions
            if isinstance(each, argparse._SubParsersAction)
        ),
        {},
    )


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the pages speak of as a user's own."""
    shutil.copy(ROOT / "configs" / "model" / "dnt_nano.yaml", tmp_path / "mine.yaml")
    shutil.copy(ROOT / "configs" / "cluster" / "gpu.yaml", tmp_path / "site.yaml")
    stages = (ROOT / "docs" / "train" / "stages.md").read_text("utf-8")
    (tmp_path / "three.yaml").write_text(stages.partition("```yaml\n")[2].partition("```")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", CURRENT)
def test_commands_are_taken(name: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command is one that its parser takes, and its overrides make a run; nothing is
    started.
    """
    for words in commands(name):
        is_taken(words, f"{name}: {' '.join(words)}", capsys)


@pytest.mark.parametrize("target", ["demo", "demo-images"])
def test_commands_of_a_demo_are_taken(
    target: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that make would run, and those that it tells of as the next ones."""
    would = subprocess.run(
        ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = would.stdout.replace("\\\n", " ").splitlines()
    found = [line.partition(".venv/bin/dnt ")[2].partition(" #")[0] for line in lines]
    found = [line.removesuffix('"') if line.count('"') % 2 else line for line in found if line]
    assert len(found) >= 6
    for line in found:
        is_taken(["dnt", *shlex.split(line)], f"make {target}: dnt {line}", capsys)


def is_taken(words: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Hold a command against its parser, and its overrides against the configuration."""
    program, rest = Path(words[0]).name, words[1:]
    if program == "make":
        assert f"\n{rest[0]}:" in (ROOT / "Makefile").read_text(), shown
    elif program == "dnt":
        try:
            options, more = parser().parse_known_args([word for word in rest if word != "..."])
        except SystemExit:
            pytest.fail(f"{shown}\n{capsys.readouterr().err}")
        overrides = [*getattr(options, "overrides", []), *more]
        overrides += [word for word in getattr(options, "target", []) if "=" in word]
        assert all("=" in word and not word.startswith("--") for word in overrides), shown
        if rest[0] == "sweep":
            overrides = one_of(overrides)
        makes_a_run(overrides, sweeps=getattr(options, "multirun", False), shown=shown)
    elif "dnt_scale.train" in words:
        found = [word for word in words[words.index("dnt_scale.train") + 1 :] if word != "--fresh"]
        makes_a_run(found, sweeps=False, shown=shown)


def one_of(overrides: list[str]) -> list[str]:
    """The overrides of a sweep with one of the values that each lists."""
    found = [read_override(line) for line in overrides if not line.startswith("cluster")]
    values = [
        each.values[0] if each.values else str(each.interval.start)
        for each in found
        if each.values or each.interval
    ]
    return with_values(found, values)[1]


def makes_a_run(overrides: list[str], *, sweeps: bool, shown: str) -> None:
    found = [word for word in overrides if not word.startswith(("cluster.", "cluster="))]
    if sweeps or not found:
        return
    given = ["run.name=x"] if not any(word.startswith("run.name=") for word in found) else []
    if not any(word.startswith(("data", "preset=")) for word in found):
        given.append("data.path=data/mine")
    try:
        config.load([*given, *found])
    except config.ConfigError as error:
        pytest.fail(f"{shown}\n{error}")


@pytest.mark.parametrize("name", NAMES)
def test_lines_have_at_most_100_columns(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    assert wrap.too_long(text) == [], f"python -m docs.make.wrap {name}"
    assert wrap.wrapped(text) == text


def test_the_page_of_the_configuration_is_current() -> None:
    assert configuration.PAGE.read_text("utf-8") == configuration.page(), (
        "python -m docs.make.configuration"
    )
