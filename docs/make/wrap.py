"""Break the lines of Markdown pages at 100 columns, and leave code, tables, headings and pictures
as they are.

    python -m docs.make.wrap docs/data.md ...

Only paragraphs and items of lists with a line that is too long are broken anew.
"""

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

COLUMNS = 100
ITEM = re.compile(r"(\s*)([-*+]|\d+\.) +")
FENCE = re.compile(r"\s*(```|~~~)")


def too_long(text: str) -> list[int]:
    """Return the numbers of the lines that are too long and could be broken."""
    lines = text.splitlines()
    return [
        number + 1
        for start, end in blocks(lines)
        for number in range(start, end)
        if len(lines[number]) > COLUMNS and " " in lines[number].strip()[:COLUMNS]
    ]


def wrapped(text: str) -> str:
    lines = text.splitlines()
    made, done = list[str](), 0
    for start, end in blocks(lines):
        made += lines[done:start]
        block = lines[start:end]
        done = end
        made += fill(block) if any(len(line) > COLUMNS for line in block) else block
    return "\n".join([*made, *lines[done:]]) + "\n"


def fill(block: list[str]) -> list[str]:
    """Return a paragraph or an item of a list in lines of COLUMNS."""
    first = ITEM.match(block[0])
    indent = first[0] if first else re.match(r"\s*", block[0])[0]  # type: ignore[index]
    hanging = " " * len(indent)
    words = " ".join([block[0][len(indent) :], *(line.strip() for line in block[1:])])
    # What must not begin a line: it would begin an item of a list, a heading or a quotation there.
    words = re.sub(r" (?=([-*+>#]|\d+[.)]) )", "\0", words)
    found = textwrap.wrap(
        words,
        COLUMNS,
        initial_indent=indent,
        subsequent_indent=hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\0", " ") for line in found]


def blocks(lines: list[str]) -> Iterator[tuple[int, int]]:
    """Yield the first line of each paragraph or item, and the line after its last one."""
    start, fenced, depth = None, False, 0  # depth: columns of the item that the lines belong to
    for number, line in enumerate([*lines, ""]):
        item, indent = ITEM.match(line), len(line) - len(line.lstrip())
        fence = FENCE.match(line)
        ends = bool(not line.strip() or fence or fenced or item)
        ends |= line.lstrip().startswith(("|", "#", "!", "<"))
        if start is not None and ends:
            yield start, number
            start = None
        if fence:
            fenced = not fenced
        elif line.strip() and not fenced and start is None:
            if item and indent < depth + 4:
                start, depth = number, len(item[0])
            elif not ends and indent < depth + 4:
                start, depth = number, depth if indent else 0


def main() -> None:
    for name in sys.argv[1:]:
        path = Path(name)
        before = path.read_text("utf-8")
        after = wrapped(before)
        if after != before:
            path.write_text(after, "utf-8")
            print(f"broke lines of {path}")


if __name__ == "__main__":
    main()
