"""How to write, for the shell, an override that Hydra cannot read."""

import shlex
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from dnt_scale.config.typed import MOST_BRACKETS, Kinds, parse


def advice(key: str, value: str, found: Kinds) -> str:
    """How to write an override that Hydra cannot read, for the shell; empty where no quoting
    helps.
    """
    if sum(map(value.count, "([{")) > MOST_BRACKETS:
        return ""
    for candidate in (_requoted(value), _in_quotes(value) if Any in found else None):
        if candidate is not None and parse(f"{key}={candidate}"):
            return shlex.quote(f"{key}={candidate}")
    return ""


def _in_quotes(text: str) -> str:
    return QuotedString(text, Quote.double).with_quotes()


def _requoted(value: str) -> str | None:
    """A list or mapping with quotes around what needs them; None where its brackets do not
    match.
    """
    text = value.strip()
    found, end = _list_or_mapping(text, 0)
    return found if end == len(text) else None


def _element(text: str, start: int) -> tuple[str, int]:
    """What stands at ``start`` in a list or mapping, with quotes where needed, and where it
    ends.
    """
    found, end = _list_or_mapping(text, start)
    if end and text[_next(text, end) : _next(text, end) + 1] in (",", "}", "]", ""):
        return found, end
    end = _word_end(text, start, ",}]")
    word = text[start:end].strip()
    parsed = parse(f"x={word}") if word else None
    return word if parsed and not parsed.is_sweep_override() else _in_quotes(word), end


def _list_or_mapping(text: str, start: int) -> tuple[str, int]:
    """The same of a list or mapping; an end of 0 where there is none, or its brackets do not
    match.
    """
    opening = text[start : start + 1]
    if opening not in ("{", "["):
        return "", 0
    closing, at_, parts = {"{": "}", "[": "]"}[opening], start + 1, []
    while (at_ := _next(text, at_)) < len(text) and text[at_] != closing:
        key = ""
        if opening == "{":
            end = _word_end(text, at_, ":")
            key, at_ = f"{text[at_:end].strip()}: ", _next(text, end + 1)
        element, at_ = _element(text, at_)
        parts.append(key + element)
        at_ = _next(text, at_)
        if text[at_ : at_ + 1] not in (",", closing):
            return "", 0
        at_ += text[at_] == ","
    return (f"{opening}{', '.join(parts)}{closing}", at_ + 1) if at_ < len(text) else ("", 0)


def _next(text: str, start: int) -> int:
    """The next place without a space."""
    return start + len(text[start:]) - len(text[start:].lstrip())


def _word_end(text: str, start: int, ends: str) -> int:
    """Where a word ends: at one of ``ends`` outside of quotes and of brackets that open in it."""
    depth, quote = 0, ""
    for place in range(start, len(text)):
        mark = text[place]
        if quote:
            quote = "" if mark == quote and text[place - 1] != "\\" else quote
        elif mark in "'\"" and not text[start:place].strip():
            quote = mark
        elif not depth and mark in ends:
            return place
        elif mark in "([{":
            depth += 1
        elif mark in ")]}" and depth:
            depth -= 1
    return len(text)
