"""What the name of a file says: of which kind it is, how it is packed, and whether it is read."""

import re
from pathlib import Path

from data_prep.read.formats import ROW_FORMATS, row_suffixes
from data_prep.read.streams import PACKED, packing

JSONL_SUFFIXES = (".jsonl", ".ndjson")


JSON_SUFFIXES = (*JSONL_SUFFIXES, ".json")


TEXT_SUFFIXES = tuple(
    """
    .txt .text .md .markdown .rst .adoc .org .tex .html .htm .xhtml .xml .py .pyi .c .h .cc
    .cpp .cxx .hh .hpp .cu .cuh .m .mm .java .kt .scala .groovy .clj .js .mjs .jsx .ts .tsx
    .vue .css .scss .go .rs .swift .cs .fs .vb .rb .php .pl .pm .lua .r .jl .f .f90 .f95
    .pas .hs .ml .mli .erl .ex .exs .elm .lisp .el .scm .rkt .d .nim .zig .dart .v .sv .vhd
    .asm .s .sh .bash .zsh .fish .ps1 .bat .sql .proto .yaml .yml .toml .ini .cfg .cmake .mk
    .gradle .tf
    """.split()  # noqa: SIM905
)


# What stands beside data to tell of it.
CARD = re.compile(
    r"(?:readme|licen[cs]e)(?:[._-].*)?"
    r"|(?:copying|copyright|notice|citation|changelog|contributing|code_of_conduct|contributors|authors"
    r"|data(?:set)?[_-]?card|model[_-]?card|datasheet)(?:\.\w+)?",
    re.IGNORECASE,
)


ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar")


def is_wanted(name: str) -> bool:
    """Return whether a file of this name is read where a folder is."""
    bare = bare_name(name)
    if bare.endswith(row_suffixes()):
        return not packing(name)
    return bare.endswith((*TEXT_SUFFIXES, *JSON_SUFFIXES))


def is_hidden(below: str) -> bool:
    return any(part.startswith(".") for part in below.split("/"))


def kind_of(name: str) -> str:
    """Return the kind of a file by its name, as `File.kind` has it."""
    bare = bare_name(name)
    if bare.endswith(JSONL_SUFFIXES):
        return "jsonl"
    if bare.endswith(".json"):
        return "json"
    rows = (kind for kind, each in ROW_FORMATS.items() if bare.endswith(each.suffix))
    return next(rows, "text")


def bare_name(name: str) -> str:
    """Return a name in lower case, without the suffix of its compression."""
    return name.lower().removesuffix(packing(name))


def describe_suffix(below: str) -> str:
    name = Path(below).name
    suffix = Path(bare_name(name)).suffix + packing(name)
    return f"the suffix {printable(suffix)}" if suffix else "a name without a suffix"


def is_card_name(below: str) -> bool:
    name = below.rpartition("/")[2]
    return CARD.fullmatch(name.removesuffix(packing(name))) is not None


def refuse_archive(path: str, name: str) -> None:
    bare = bare_name(name)
    if bare.endswith(ARCHIVES) or (bare.endswith(row_suffixes()) and packing(name)):
        raise ValueError(
            f"{path}: expected text, {', '.join(JSON_SUFFIXES)}, each also with "
            f"{', '.join(PACKED)}, or {', '.join(row_suffixes())}; unpack it first"
        )


def printable(name: str) -> str:
    """Return a name without what could break a line, a terminal or an encoding."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
