"""What all sections share: strictness, numbers and paths as they are typed, the error."""

import difflib
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from dnt_scale.config import paths, typed


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the known word that is most like ``word``; "" where none is by ``cutoff``, 0 to 1."""
    return next(iter(difflib.get_close_matches(word, sorted(known), n=1, cutoff=cutoff)), "")


class ConfigError(ValueError):
    """A field of the run's configuration is wrong; the message says which and what to do, in one
    line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(
            "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in message)
        )


class Strict(BaseModel):
    """Unknown fields are errors, true is no number, 1e3 is a whole one, and nothing changes
    after validation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        types = {name: typed.kinds(field.annotation) for name, field in cls.model_fields.items()}
        return {name: _as_number(value, types.get(name, ())) for name, value in raw.items()}


def _as_number(value: Any, found: typed.Kinds) -> Any:
    """A value for a field that may be a number: true and false are none, a text such as 1e3 is a
    whole one.
    """
    if isinstance(value, list | tuple) and typed.is_number(typed.items(found)):
        return [_as_number(each, typed.items(found)) for each in value]
    if not typed.is_number(found):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    return whole(value) if isinstance(value, str) and typed.is_whole(found) else value


def whole(text: str) -> int | str:
    """The whole number that a text such as 1e3 is; the text itself where it is none, or one of
    over 30 digits.
    """
    try:
        number = Decimal(text)
        if number.is_finite() and number.adjusted() <= 30 and number == number.to_integral_value():
            return int(number)
    except InvalidOperation:
        pass
    return text


# of steps, rows and the like: their products still fit what they go into
Count = Annotated[int, Field(le=10**15)]


Size = Annotated[int, Field(gt=0, le=1 << 20)]


Place = Annotated[Path, BeforeValidator(paths.place)]


Text = Annotated[str, Field(min_length=1)]
