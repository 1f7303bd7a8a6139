"""The pages of the documentation as tests see them: code blocks, commands, code spans, headings,
links.
"""

import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
HISTORY = {"CHANGELOG.md", "docs/lab-log.md"}  # they tell of what was there, too
# Worked examples speak of files and keys that their readers add, and have tests of their own.
EXAMPLES = {name for name in NAMES if name.startswith("docs/extend/")} - {"docs/extend/index.md"}
CURRENT = [name for name in NAMES if name not in HISTORY | EXAMPLES]
FENCE = re.compile(r"\s*(```|~~~)\s*(\w*)")


@cache
def lines(name: str) -> list[tuple[str, str | None]]:
    """Lines of a page, each with the language of the code block that it is in ("" where none is
    said), or None.
    """
    found = list[tuple[str, str | None]]()
    language: str | None = None
    indented, blank = False, True
    for line in (ROOT / name).read_text("utf-8").splitlines():
        fence = FENCE.match(line)
        if fence:
            language = fence[2] if language is None else None
            found.append(("", None))
        elif language is not None:
            found.append((line, language))
        else:
            indented = line.startswith("    ") and (indented or blank)
            found.append((line[4:], "") if indented else (line, None))
        blank = not line.strip()
    return found


def prose(name: str) -> str:
    """A page without its code blocks."""
    return "\n".join(line for line, language in lines(name) if language is None)


def commands(name: str) -> Iterator[list[str]]:
    """The commands in a page's code blocks as lists of words, without comments."""
    waiting = ""
    for line, language in lines(name):
        if language not in ("", "sh", "bash", "shell"):
            continue
        whole = waiting + line
        if whole.rstrip().endswith("\\"):
            waiting = whole.rstrip()[:-1]
            continue
        waiting = ""
        if re.match(
            r"(sudo |setsid |nohup )?(\.venv/bin/)?(dnt|python|torchrun|srun|make) ", whole
        ):
            words = shlex.split(whole, comments=True)
            yield words[words[0] in ("sudo", "setsid", "nohup") :]


def spans(name: str) -> list[str]:
    """The code spans of a page."""
    return [found.replace("\n", " ") for found in re.findall(r"`([^`]+)`", prose(name))]


def links(name: str) -> list[str]:
    """The targets of a page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(name)))


def anchors(name: str) -> set[str]:
    """What a link may name after # on a page."""
    titles = [line.lstrip("#") for line in prose(name).splitlines() if line.startswith("#")]
    plain = [re.sub(r"[^\w\- ]", "", title).strip().lower() for title in titles]
    return {title.replace(" ", "-") for title in plain}


def code_blocks(name: str, language: str) -> list[str]:
    """The blocks of code of a page in one language, whole."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / name).read_text(), re.M | re.S)


def module_of(name: str, source: str) -> ModuleType:
    """A page's code as a module of this name, imported."""
    module = ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, name, "exec"), module.__dict__)
    return module
