"""What a user typed is the value: names and paths out of overrides and YAML files, whatever their
text looks like.

YAML and Hydra take 1.10 for a number, 4:00:00 for 14,400 and ~ for nothing, and Hydra's grammar has
no é, ( or &. So text goes around both: its place is taken by a word of letters (:class:`Hidden`),
until all is put together. Which fields are text is found in the annotations of the pydantic models,
here and nowhere else.
"""

import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from antlr4 import CommonTokenStream, InputStream  # type: ignore[import-untyped]
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.overrides_visitor import HydraErrorListener, HydraOverrideVisitor
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from pydantic import BaseModel

Kinds = tuple[Any, ...]  # the types that a value may have; (): not known

UNSET = "???"  # Hydra's word for a value that has to be given
MOST_BRACKETS = 100  # in an override: its parser takes minutes for some hundred open ones
_FLOAT = r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+"
# a key that Hydra reads as a word
_SIMPLE = re.compile(r"(?i)(?!(?:true|false|null|nan|inf)$)[a-z_][a-z0-9_]*")


# --- which fields are text ------------------------------------------------------------------------


def kinds(annotation: Any) -> Kinds:
    """Return the types of an annotation, without Annotated and unions."""
    if _origin(annotation) is Annotated:
        return kinds(get_args(annotation)[0])
    if _origin(annotation) in (Union, UnionType):
        return tuple(kind for part in get_args(annotation) for kind in kinds(part))
    return (annotation,)


def _origin(kind: Any) -> Any:
    return get_origin(kind)


def inside(found: Kinds, key: str) -> Kinds:
    """What a value of these kinds may have at ``key``."""
    more: list[Any] = []
    for kind in found:
        if _origin(kind) is dict:
            more += kinds(get_args(kind)[1])
        elif _is_model(kind):
            for model in _classes(kind, key):
                more += kinds(model.model_fields[key].annotation)
    return tuple(more)


def _classes(model: type[BaseModel], key: str) -> list[type[BaseModel]]:
    """The classes that have a field ``key``: of a section that comes in kinds (config/kinds.py),
    those of its kinds.
    """
    if several := vars(model).get("registry"):
        found: list[type[BaseModel]] = several.having(key)
        return found
    return [model] if key in model.model_fields else []


def at(model: type[BaseModel], key: str) -> Kinds:
    """What a model may have at a dotted key."""
    found: Kinds = (model,)
    for part in key.split("."):
        found = inside(found, part)
    return found


def items(found: Kinds) -> Kinds:
    """What the items of a list of these kinds may be."""
    parts = [part for kind in found if _origin(kind) in (list, tuple) for part in get_args(kind)]
    return tuple(kind for part in parts if part is not ... for kind in kinds(part))


def is_text(found: Kinds) -> bool:
    """Whether what is typed is the value: a name, a path, or words for another program."""
    return str in found or Path in found


def is_place(found: Kinds, key: str) -> bool:
    """Whether it is a path, or a folder that may be a URL too."""
    return Path in found or (str in found and key.rpartition(".")[2] == "dir")


def is_number(found: Kinds) -> bool:
    return bool not in found and (int in found or float in found)


def is_whole(found: Kinds) -> bool:
    return is_number(found) and float not in found


def is_container(found: Kinds) -> bool:
    return not found or any(
        kind is Any or _is_model(kind) or _origin(kind) in (dict, list, tuple) for kind in found
    )


def _has_names(found: Kinds) -> bool:
    """Whether the keys at this place are a model's or names that a user gives."""
    return any(_is_model(kind) or _origin(kind) is dict for kind in found)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


# --- YAML -----------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML in which 1e3 is a number, as in OmegaConf's, and a key stands once."""


class Dumper(yaml.SafeDumper):
    """YAML for :func:`read_yaml`: a text that looks like a number of its is quoted."""


for _class in (_Loader, Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(_FLOAT + "$"), list("-+0123456789.")
    )


def read_yaml(text: str, found: Kinds) -> Any:
    """The value of a YAML text at a place of these kinds: what is text there is as it was written,
    and so are numbers.

    Raises:
        ValueError: it is no YAML; the message is one line.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _retag(node, found, set())
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (RecursionError, OverflowError) as error:
        raise ValueError(f"nested too deeply or too large ({error})") from None
    finally:
        if loader:
            loader.dispose()


def _retag(node: yaml.Node, found: Kinds, above: set[int]) -> None:
    """Make text of each unquoted scalar that is to be text or a number, and of each key that is
    a name.
    """
    if id(node) in above:
        raise yaml.YAMLError(f"an alias inside of what it stands for{node.start_mark}")
    above = above | {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name in seen and name != "<<":
                raise yaml.YAMLError(f"{name} stands twice{key.start_mark}")
            seen.add(name)
            if _has_names(found) and isinstance(key, yaml.ScalarNode) and name != "<<":
                key.tag = "tag:yaml.org,2002:str"
            _retag(value, found if name == "<<" else inside(found, name), above)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _retag(item, items(found), above)
    elif isinstance(node, yaml.ScalarNode) and node.tag.startswith("tag:yaml.org,2002:"):
        words = (
            is_text(found) or is_number(found) or any(_origin(kind) is Literal for kind in found)
        )
        null = node.tag.endswith(":null") and (NoneType in found or not is_text(found))
        flag = bool in found and node.value.lower() in ("true", "false")
        if words and not null and not flag:
            node.tag = "tag:yaml.org,2002:str"


# --- text that Hydra and OmegaConf do not read ----------------------------------------------------


class Hidden:
    """Stand-ins for texts, which Hydra and OmegaConf carry through whatever they do."""

    def __init__(self) -> None:
        self._mark = f"typed_{secrets.token_hex(4)}_"
        self._texts: list[str] = []

    def hide(self, text: str) -> str:
        """A word of letters, digits and _ that stands for ``text``; always the same one."""
        if text not in self._texts:
            self._texts.append(text)
        return f"{self._mark}{self._texts.index(text)}_"

    def carry(self, text: str, model: type[BaseModel]) -> str:
        """``text`` hidden, but for references to other fields of ``model`` and to the
        environment (``${oc.env:X}``).
        """
        return "".join(
            part if refers else self.hide(part) for refers, part in _parts(text, model) if part
        )

    def carry_all(self, value: Any, model: type[BaseModel]) -> Any:
        """A tree whose strings hold no ``${`` but references."""
        if isinstance(value, dict):
            return {
                self.carry_all(key, model): self.carry_all(inner, model)
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return [self.carry_all(inner, model) for inner in value]
        return self.carry(value, model) if isinstance(value, str) and "${" in value else value

    def hide_all(self, value: Any) -> Any:
        """A tree without any string in which OmegaConf could find something."""
        if isinstance(value, dict):
            return {key: self.hide_all(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.hide_all(inner) for inner in value]
        return self.hide(value) if isinstance(value, str) and "${" in value else value

    def show(self, value: Any) -> Any:
        """What :meth:`hide` was given, in all places of a tree."""
        if isinstance(value, str):
            return re.sub(rf"{self._mark}(\d+)_", lambda match: self._texts[int(match[1])], value)
        if isinstance(value, list):
            return [self.show(inner) for inner in value]
        if isinstance(value, dict):
            shown: dict[Any, Any] = {}
            for key, inner in value.items():
                _merge(shown, self.show(key), self.show(inner))
            return shown
        return value


def _merge(tree: dict[Any, Any], key: Any, value: Any) -> None:
    """Set a key, or what is new in it where both are mappings: one may have been written hidden
    and one not.
    """
    if isinstance(tree.get(key), dict) and isinstance(value, dict):
        for name, inner in value.items():
            _merge(tree[key], name, inner)
    else:
        tree[key] = value


def _parts(text: str, model: type[BaseModel]) -> Iterator[tuple[bool, str]]:
    """A text in pieces: whether each is a reference, as it stands."""
    start = at_ = 0
    while (at_ := text.find("${", at_)) >= 0:
        end = _closing(text, at_ + 2)
        content = text[at_ + 2 : end]
        if end and _is_reference(content, model):
            yield False, text[start:at_]
            yield True, text[at_ : end + 1]
            start = at_ = end + 1
        else:
            at_ += 2
    yield False, text[start:]


def _closing(text: str, start: int) -> int:
    """The place of the bracket that closes one before ``start``; 0: there is none."""
    depth = 1
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if not depth:
            return place
    return 0


def _is_reference(content: str, model: type[BaseModel]) -> bool:
    if re.match(r"oc\.[a-z_.]+:", content):
        return True
    return bool(re.fullmatch(r"\.*\w[\w.]*", content)) and (
        content[0] == "." or content.partition(".")[0] in model.model_fields
    )


# --- overrides ------------------------------------------------------------------------------------


def split(line: str) -> tuple[str, str, str | None]:
    """An override as its prefix (+, ++, ~), key and value; the value is None where there is no
    =.
    """
    key, equal, value = line.partition("=")
    name = key.lstrip("+~")
    return key[: len(key) - len(name)], name, value if equal else None


def meant(value: str, *, place: bool) -> str:
    """The text of a value: what it says, without the quotes that Hydra would need around it.

    A path that exists in quotes is one with quotes in its name.
    """
    if (
        len(value) < 2
        or value[0] not in "'\""
        or value[-1] != value[0]
        or (place and _exists(value))
    ):
        return value
    parsed = parse(f"x={value}")
    quoted = parsed._value if parsed else None
    return quoted.text if isinstance(quoted, QuotedString) else value


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def parse(line: str) -> Override | None:
    """An override in Hydra's grammar; None where it is none."""
    if sum(map(line.count, "([{")) > MOST_BRACKETS:
        return None
    try:
        return OverridesParser.create().parse_override(line)
    except (HydraException, ValueError, RecursionError):  # of a number of 5,000 digits, for one
        return None


def quoted(text: str) -> str:
    """A string of Hydra's grammar."""
    return QuotedString(text, Quote.single).with_quotes()


def choices(value: str) -> list[str]:
    """The texts of a list A,B,C or choice(A,B,C); one that holds a comma stands in quotes, which
    it keeps here.
    """
    if match := re.fullmatch(r"choice\((.*)\)", value.strip(), re.DOTALL):
        value = match[1]
    in_quotes = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
    parts: list[str] = re.findall(rf"\s*({in_quotes}|[^,]*?)\s*(?:,|$)", value, re.DOTALL)
    # at the end there is an empty one
    return parts[:-1] if value and value.rstrip()[-1:] != "," else parts


def key_for_hydra(model: type[BaseModel], key: str, hidden: Hidden) -> str:
    """A dotted key in which the names that a user gave (2024-01-15, 007) are hidden."""
    found: Kinds = (model,)
    parts = []
    for part in key.split("."):
        named = any(_origin(kind) is dict for kind in found)
        parts.append(hidden.hide(part) if named and part and not _SIMPLE.fullmatch(part) else part)
        found = inside(found, part)
    return ".".join(parts)


class SeveralValuesError(ValueError):
    """An override lists several values, which only a sweep takes."""


def value_for_hydra(model: type[BaseModel], key: str, value: str, hidden: Hidden) -> str | None:
    """Return the value of an override as Hydra's grammar has it, with the text in it hidden.

    Args:
        model: what has the field.
        key: the dotted name of the field in it.
        value: what was typed.
        hidden: gives the text back once Hydra and OmegaConf have read what this returns.

    Returns:
        The value; None where the grammar has no such value.

    Raises:
        SeveralValuesError: it is a list of values to choose from, such as 1,2 or range(1,3).
    """
    found = at(model, key)
    if is_text(found):
        is_flag = bool in found and value in ("true", "false")
        if value == UNSET or (value == "null" and NoneType in found) or is_flag:
            return value
        return quoted(hidden.carry(meant(value, place=is_place(found, key)), model))
    parsed = parse(f"x={value}")
    if parsed is None:
        return None
    if parsed.is_sweep_override():
        raise SeveralValuesError(value)
    if value.lstrip()[:1] in ("{", "["):
        return container(f"x={value}", found, hidden, model)
    return value


class Word(str):
    """An unquoted word of an override, and what Hydra takes it for."""

    value: Any


class _Words(HydraOverrideVisitor):
    def _createPrimitive(self, ctx: Any) -> Any:
        value = super()._createPrimitive(ctx)
        if isinstance(value, QuotedString):
            return value
        word = Word(value if isinstance(value, str) else ctx.getText().strip())
        word.value = value
        return word


def container(line: str, found: Kinds, hidden: Hidden, model: type[BaseModel]) -> str:
    """The value of an override, a list or mapping that Hydra reads, with the text in it hidden."""
    lexer = OverrideLexer(InputStream(line))
    parser = OverrideParser(CommonTokenStream(lexer))
    for speaker in (lexer, parser):
        speaker.removeErrorListeners()
        speaker.addErrorListener(HydraErrorListener())
    override = _Words(OverridesParser.create().functions).visit(
        parser.override()  # type: ignore[no-untyped-call]
    )
    return str(Override._get_value_element_as_str(_as_text(override._value, found, hidden, model)))


def _as_text(value: Any, found: Kinds, hidden: Hidden, model: type[BaseModel]) -> Any:
    if isinstance(value, dict):
        return {
            (
                hidden.hide(key) if _has_names(found) and not _SIMPLE.fullmatch(key) else key
            ): _as_text(inner, inside(found, key), hidden, model)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_as_text(inner, items(found), hidden, model) for inner in value]
    if isinstance(value, QuotedString):
        return (
            QuotedString(hidden.carry(value.text, model), Quote.single) if is_text(found) else value
        )
    if not isinstance(value, Word):
        return value
    is_flag = bool in found and isinstance(value.value, bool)
    if not is_text(found) or (value == "null" and NoneType in found) or is_flag:
        return value.value
    return QuotedString(hidden.carry(str(value), model), Quote.single)
