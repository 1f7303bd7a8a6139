"""Numbers, times and misspelt words as people read them."""

import pytest
from pydantic import BaseModel, Field, ValidationError, field_validator

from data_prep.words import (
    clock,
    closest,
    duration,
    first_problem,
    megabytes,
    problems_of,
    scaled,
    size,
)


@pytest.mark.parametrize(
    ("seconds", "exact", "rough"),
    [
        (-3, "0 s", "0 s"),
        (0.25, "0.25 s", "0.25 s"),
        (1.024, "1.02 s", "1 s"),
        (50.4, "50.4 s", "50 s"),
        (119, "119 s", "119 s"),
        (125, "2.08 min", "2.1 min"),
        (360, "6 min", "6 min"),
        (5400, "1.5 h", "1.5 h"),
        (172_799, "48 h", "48 h"),
        (172_800, "2 days", "2 days"),
        (400 * 86_400, "400 days", "400 days"),
    ],
)
def test_a_length_of_time(seconds: float, exact: str, rough: str) -> None:
    assert (duration(seconds), duration(seconds, digits=2)) == (exact, rough)


def test_a_clock_carries_over() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 3599.4, 3600, 90_061)] == [
        "0:00:00",
        "0:01:00",
        "0:59:59",
        "1:00:00",
        "25:01:01",
    ]


def test_a_size_never_shows_a_thousand_of_a_unit() -> None:
    assert [size(count) for count in (999, 999_949, 999_950)] == ["999 bytes", "999.9 kB", "1.0 MB"]
    assert [scaled(value, ("", "K"), 2) for value in (999_994, 999_996)] == [
        "999.99 K",
        "1,000.00 K",
    ]
    assert [megabytes(count) for count in (10_000, 2 * 10**9)] == ["0.01 MB", "2.00 GB"]


def test_a_misspelt_word() -> None:
    assert closest("mian", ["main", "short"]) == "main"
    assert closest("gpu", ["main", "short"]) == closest("x", []) == ""


class Inner(BaseModel, extra="forbid"):
    count: int = Field(ge=0)

    @field_validator("count")
    @classmethod
    def _even(cls, count: int) -> int:
        if count % 2:
            raise ValueError("is odd")
        return count


class Outer(BaseModel):
    inner: Inner


def test_what_pydantic_finds_wrong() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"inner": {"count": 3, "cuont": 4}})
    odd, unknown = problems_of(caught.value)
    assert (odd.field, odd.message, odd.found) == (("inner", "count"), "is odd", 3)
    assert (unknown.field, unknown.kind) == (("inner", "cuont"), "extra_forbidden")
    assert first_problem(caught.value) == "inner.count: is odd"
    assert first_problem(FileNotFoundError(2, "No such file or directory")).startswith("No such")
    with pytest.raises(ValidationError) as whole:
        Outer.model_validate_json("{")
    assert first_problem(whole.value).startswith("Invalid JSON: ")
