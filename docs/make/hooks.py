"""What MkDocs does not do by itself: pages made of other files, links out of docs/, globs in the
navigation.
"""

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# Pages of the site that are files of the repository's root.
OF_THE_ROOT = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
PACKAGES = ("dnt_scale", "data_prep", "cluster")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    assert config.nav is not None
    config.nav = expanded(config.nav, named(config.nav))
    return config


def named(entry: Any) -> set[str]:
    """Return the pages that the navigation names one by one."""
    if isinstance(entry, dict | list):
        return set().union(
            *(named(each) for each in (entry.values() if isinstance(entry, dict) else entry))
        )
    return {entry}


def expanded(entry: Any, known: set[str]) -> Any:
    """Return an entry of the navigation with the pages that its globs match, but for those that
    it names.
    """
    if isinstance(entry, dict):
        return {title: expanded(inside, known) for title, inside in entry.items()}
    if isinstance(entry, list):
        inside = [expanded(each, known) for each in entry]
        return [page for each in inside for page in (each if isinstance(each, list) else [each])]
    if "*" not in entry:
        return entry
    found = [*(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").glob(entry))]
    found += [name for name in made() if PurePosixPath(name).match(entry)]
    return sorted(
        {*found} - known, key=lambda name: (not name.endswith("index.md"), name.removesuffix(".md"))
    )


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, text in made().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where their targets are on the site; name files of the repository that are
    not on it.
    """
    source = OF_THE_ROOT.get(page.file.src_uri)
    here = ROOT if source else (ROOT / "docs" / page.file.src_uri).parent

    def led(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:") or not path:
            return match[0]
        found = (here / path).resolve()
        name = {ROOT / file: name for name, file in OF_THE_ROOT.items()}.get(found)
        if name is None and found.is_relative_to(ROOT / "docs"):
            name = found.relative_to(ROOT / "docs").as_posix()
        if name is not None:
            place = os.path.relpath(name, PurePosixPath(page.file.src_uri).parent)
            return f"{image}[{text}]({place}{'#' * bool(anchor)}{anchor})"
        return f"{text} (`{found.relative_to(ROOT)}`)" if found.exists() else match[0]

    return LINK.sub(led, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave out the roles of docstrings, such as :mod: in front of a module's name."""
    return re.sub(r":(mod|class|func|meth|data|attr):(?=<code>)", "", html)


def made() -> dict[str, str]:
    """Return the text of each page that is made of other files, by the page's name."""
    pages = {name: (ROOT / file).read_text("utf-8") for name, file in OF_THE_ROOT.items()}
    pages["reference/commands.md"] = commands()
    for package in PACKAGES:
        for folder in sorted({path.parent for path in (ROOT / package).rglob("*.py")}):
            room = ".".join(folder.relative_to(ROOT).parts)
            pages[f"reference/api/{room}.md"] = "\n\n".join([f"# {room}", *modules(folder)])
    return pages


def modules(folder: Path) -> Iterator[str]:
    """Yield what mkdocstrings takes for each module of a package."""
    for path in sorted(folder.glob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.stem not in ("__init__", "__main__"):
            yield f"::: {name}"


def commands() -> str:
    """Return the help of every `dnt` command as a page."""
    from dnt_scale.cli.main import parser

    os.environ["COLUMNS"] = "100"
    parts = ["# Commands", "What `dnt COMMAND --help` prints, for each command."]
    for found in every(parser()):
        parts += [f"## {found.prog}", f"```text\n{found.format_help().rstrip()}\n```"]
    return "\n\n".join(parts)


def every(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser and all commands below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from every(below)
