"""Make docs/reference/configuration.md out of the pydantic models, the files of configs/ and
notes.yaml.

    python -m docs.make.configuration            # write the page
    python -m docs.make.configuration --check    # exit status 1 where the page is another

A key's type, bounds and description come from its model, its value from ``configs/``. What the page
says beyond a field's description stands in notes.yaml, by key.
"""

import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.cluster_config import ClusterConfig
from data_prep.clean.rules import RULES
from dnt_scale.config import RunConfig, config_dir, load
from dnt_scale.config.kinds import Registry

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "configuration.md"
NOTES = Path(__file__).with_name("notes.yaml")
GIVEN = ["run.name=NAME", "data.path=/SET"]  # what has no default and is not asked of a choice
MIXTURE = ["run.name=NAME", "data.mixture.a={path: /SET, weight: 1}"]
WORDS = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text", Path: "path"}

HEAD = """\
# Configuration

Every key of a run, of a cluster and of the cleaning rules. `dnt train KEY=VALUE` changes a key,
`GROUP=NAME` chooses a file of `configs/GROUP/`; [Start a run](../train/start.md) tells how values
are written. "Default" is what `dnt train` takes where nothing else is said; where the files of a
group differ, it says which has what. A dash: there is no default, the key has to be given.

This page is made by `python -m docs.make.configuration` from the models in `dnt_scale/config/`,
`cluster/cluster_config.py` and `data_prep/clean/rules.py`; a test compares it with them.
"""


@dataclass(frozen=True)
class Row:
    """A line of a table of keys, in Markdown but for the signs that a table needs escaped."""

    key: str
    takes: str
    default: str
    meaning: str


def page() -> str:
    """Return the page's text.

    Raises:
        ValueError: A note is about no key, or a key is told of nowhere.
    """
    notes: dict[str, str] = yaml.safe_load(NOTES.read_text("utf-8"))
    told: set[str] = set()
    parts = [HEAD, *run_sections(notes, told), *cluster_section(notes, told), cleaning_section()]
    if stray := notes.keys() - told:
        raise ValueError(
            f"{NOTES}: no such keys: {', '.join(sorted(stray))}; remove or rename them there"
        )
    return "\n".join(parts)


def run_sections(notes: dict[str, str], told: set[str]) -> Iterator[str]:
    """Yield each section of a run: its files, where it is a group, and its keys."""
    plain = load(GIVEN)
    groups = {path.name for path in config_dir().iterdir() if path.is_dir()}
    for name in RunConfig.model_fields:
        yield f"## {name}\n"
        if about := note(f"{name}.*", notes, told):
            yield wrapped(about)
        if name not in groups:
            section = getattr(plain, name)
            yield table(
                rows(name, type(section), {"": section.model_dump(mode="json")}), notes, told
            )
            continue
        yield choices(name)
        yield from variants(name, notes, told)
    yield "## preset\n"
    yield choices("preset")
    yield "## Recipes for images\n"
    yield choices("augment", "data.augment")


def variants(group: str, notes: dict[str, str], told: set[str]) -> Iterator[str]:
    """Yield the keys of a group: those of every file, then a table for each model of its
    sections.
    """
    files: dict[type[BaseModel], dict[str, Any]] = {}
    for path in sorted((config_dir() / group).glob("*.yaml")):
        given = MIXTURE if (group, path.stem) == ("data", "mixture") else GIVEN
        section = getattr(load([f"{group}={path.stem}", *given]), group)
        files.setdefault(type(section), {})[path.stem] = section.model_dump(mode="json")
    tables = [list(rows(group, model, dumps)) for model, dumps in files.items()]
    if len(tables) == 1:
        yield table(tables[0], notes, told)
        return
    shared = {row.key for row in tables[0]}
    shared = shared.intersection(*({row.key for row in rest} for rest in tables))
    everywhere = {name: dump for dumps in files.values() for name, dump in dumps.items()}
    of_all = [row for row in rows(group, next(iter(files)), everywhere) if row.key in shared]
    # a key that tells the models apart takes what any of them does
    for place, row in enumerate(of_all):
        found = [each.takes for one in tables for each in one if each.key == row.key]
        of_all[place] = replace(row, takes=", ".join(dict.fromkeys(found)))
    yield "Keys of every file:\n"
    yield table(of_all, notes, told)
    for own, dumps in zip(tables, files.values(), strict=True):
        if mine := [row for row in own if row.key not in shared]:
            yield wrapped(f"Of {', '.join(f'`{name}`' for name in dumps)} only:")
            yield table(mine, notes, told)


# What has another default than the composed run shows, since a run has to be given a name and a set
# to be composed.
DEFAULTS = {"run.name": "-", "run.dir": "`runs/NAME`", "data.path": "-", "data.mixture": "none"}


def rows(prefix: str, model: type[BaseModel], files: dict[str, Any]) -> Iterator[Row]:
    """Yield the keys of a model and of models inside it; ``files`` are its values, by the name
    of their file.
    """
    for name, field in model.model_fields.items():
        key, inner, many = f"{prefix}.{name}", model_in(field.annotation), is_many(field.annotation)
        registry = vars(inner).get("registry") if inner else None
        if inner and not many:
            values = {file: dump[name] for file, dump in files.items() if name in dump}
            for found in rows(key, inner, values):
                if registry and found.key == f"{key}.{registry.tag}":
                    found = replace(
                        found, takes=", ".join(f"`{each}`" for each in registry.every())
                    )
                yield found
            yield from rows_of_kinds(key, inner, registry)
            continue
        default = DEFAULTS.get(key) or shown(
            {file: dump.get(name) for file, dump in files.items()}, many
        )
        yield row(f"{key}.NAME" if inner else key, field, default)
        for each, inside in inner.model_fields.items() if inner else ():
            yield row(f"{key}.NAME.{each}", inside, own_default(inside))
        if inner:
            yield from rows_of_kinds(f"{key}.NAME", inner, registry)


def rows_of_kinds(prefix: str, base: type[BaseModel], registry: Registry | None) -> Iterator[Row]:
    """Yield the keys that the kinds of a section add to its own."""
    for which, model in registry.every().items() if registry else ():
        for name, field in model.model_fields.items():
            if name not in base.model_fields:
                found = row(f"{prefix}.{name}", field, own_default(field))
                yield replace(found, meaning=f"`{which}`: {found.meaning}")


def row(key: str, field: FieldInfo, default: str) -> Row:
    return Row(key, kind(field.annotation, field.metadata), default, field.description or "")


def own_default(field: FieldInfo) -> str:
    return "-" if field.is_required() else code(field.get_default(call_default_factory=True))


def shown(files: dict[str, Any], many: bool) -> str:
    """Return a default, or the defaults by file; of mappings and lists (``many``) what is in
    them.
    """
    if len(files) > 1 and all(file == value for file, value in files.items()):
        return "the file's"
    by_value: dict[str, list[str]] = {}
    for file, value in files.items():
        text = (", ".join(f"`{name}`" for name in value) or "none") if many else code(value)
        by_value.setdefault(text, []).append(file)
    if len(by_value) == 1:
        return next(iter(by_value))
    return "<br>".join(f"{text}: {', '.join(names)}" for text, names in by_value.items())


def code(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "`true`", False: "`false`", None: "`null`"}[value]
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def kind(annotation: Any, metadata: list[Any]) -> str:
    """Return what values an annotation permits, with the bounds in its metadata."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(inside[0], [*metadata, *inside[1:]])
    if origin in (Union, UnionType):
        found = [kind(each, metadata if each is not NoneType else []) for each in inside]
        return ", ".join(sorted(dict.fromkeys(found), key=lambda text: text == "`null`"))
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in inside)
    if annotation is NoneType:
        return "`null`"
    if origin in (list, tuple):
        each = kind(inside[0], [])
        return f"list of {len(inside)} of: {each}" if origin is tuple else f"list of: {each}"
    if origin is dict or annotation is dict or model_in(annotation):
        return "mapping"
    return WORDS.get(annotation, "text") + bounds(metadata)


SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
MANY = 1e6  # an upper bound above it only keeps products of numbers finite


def bounds(metadata: list[Any]) -> str:
    """Return the bounds in a field's metadata, such as " > 0, <= 1"."""
    flat = [
        one
        for each in metadata
        for one in (each.metadata if isinstance(each, FieldInfo) else [each])
    ]
    found = [(sign, getattr(each, name, None)) for each in flat for name, sign in SIGNS.items()]
    shown = [f"{sign} {bound:g}" for sign, bound in found if bound is not None and bound < MANY]
    return f" {', '.join(shown)}" if shown else ""


def model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model that an annotation is, or has as items."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [model for each in get_args(annotation) if (model := model_in(each))]
    return found[0] if found else None


def is_many(annotation: Any) -> bool:
    return get_origin(annotation) in (dict, list)


def table(found: Iterable[Row], notes: dict[str, str], told: set[str]) -> str:
    """Return keys as a Markdown table, each with its description and its note.

    Raises:
        ValueError: A key has neither.
    """
    lines = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for row in found:
        parts = (row.meaning.rstrip("."), note(row.key, notes, told))
        meaning = ". ".join(part for part in parts if part)
        if not meaning:
            raise ValueError(
                f"{row.key}: no description; give its field one, or tell of it in {NOTES}"
            )
        cells = (f"`{row.key}`", row.takes, row.default, meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def note(key: str, notes: dict[str, str], told: set[str]) -> str:
    told.add(key)
    return " ".join(notes.get(key, "").split())


def wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False) + "\n"


def choices(group: str, key: str | None = None) -> str:
    """Return the files of a group as a table, each with the comment that it begins with.

    Args:
        key: what is given their names; None: the group.
    """
    lines = [f"| `{key or group}=` | |", "|---|---|"]
    for path in sorted((config_dir() / group).glob("*.yaml")):
        lines.append(f"| `{path.stem}` | {comment(path)} |")
    return "\n".join([*lines, ""])


def comment(path: Path) -> str:
    """Return the comment that a YAML file begins with, as one line and without its examples of
    code.
    """
    found = []
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        if not line.startswith("#  "):
            found.append(line.removeprefix("#").strip())
    return " ".join(found).removesuffix(", for example").replace("|", "\\|")


def cluster_section(notes: dict[str, str], told: set[str]) -> Iterator[str]:
    """Yield the keys of a cluster's file."""
    yield "## cluster\n"
    yield wrapped(note("cluster.*", notes, told))
    yield choices("cluster")
    found = []
    for name, field in ClusterConfig.model_fields.items():
        default = own_default(field)
        if name == "python":
            default = "the one that runs `dnt`"
        elif is_many(field.annotation):
            default = "none"
        found.append(row(f"cluster.{name}", field, default))
    yield table(found, notes, told)


def cleaning_section() -> str:
    """Return the cleaning rules and their settings, a line a rule."""
    lines = [
        "## Cleaning rules\n",
        wrapped(
            "`dnt data prepare --clean FILE` takes these, in the file's order "
            "([Data](../data.md#clean))."
        ),
        choices("clean"),
        "| rule | what it does | settings and defaults |",
        "|---|---|---|",
    ]
    for name, (settings, build) in RULES.items():
        found = [f"`{key}`: {own_default(field)}" for key, field in settings.model_fields.items()]
        summary = " ".join((inspect.getdoc(build) or "").partition("\n\n")[0].split())
        does = summary.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{name}` | {does} | {'<br>'.join(found) or 'none'} |")
    return "\n".join([*lines, ""])


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        current = PAGE.is_file() and PAGE.read_text("utf-8") == text
        found = "current" if current else "not current; run python -m docs.make.configuration"
        print(f"{PAGE}: {found}")
        return 0 if current else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, "utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
