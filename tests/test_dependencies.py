"""What the packages import is declared in pyproject.toml, and what is declared is imported."""

import re
import sys
import tomllib
from functools import cache
from importlib import metadata

from packaging.requirements import Requirement

from tests.test_rooms import FILES, ROOMS, ROOT, imports, top

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Declared and never imported, each for a reason.
NOT_IMPORTED = {
    "webdataset": "reads our shards elsewhere, as docs/data.md shows; tests compare its bytes with "
    "ours",
}
# Imported where an extra is installed, by a name that says so when it is not.
EXTRAS = {
    "kitoken": "fast",
    "tensorboard": "tensorboard",
    "optuna": "sweep",
    "transformers": "hf",
    "lm_eval": "eval",
    "torchao": "fp8",
}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    return {canonical(Requirement(line).name) for line in requirements}


def imported() -> dict[str, str]:
    """The top-level names that are imported from outside, with a file that does."""
    found: dict[str, str] = {}
    for path in FILES:
        for name in map(top, imports(path)):
            if name not in sys.stdlib_module_names and name not in ROOMS:
                found.setdefault(name, path.relative_to(ROOT).as_posix())
    return found


packages_distributions = cache(metadata.packages_distributions)  # reads every installed package


def distributions(name: str) -> set[str]:
    """The packages that may give a top-level name."""
    return {canonical(each) for each in packages_distributions().get(name, [])}


def test_what_is_imported_is_declared() -> None:
    ours = declared(PROJECT["dependencies"])
    found = imported()
    assert {"torch", "numpy", "jinja2", "omegaconf"} <= found.keys()
    undeclared = {
        name: file
        for name, file in found.items()
        if name not in EXTRAS and not distributions(name) & ours
    }
    assert not undeclared, "declare them in pyproject.toml"


def test_an_extra_holds_what_is_imported_where_it_is_there() -> None:
    found = imported()
    for name, extra in EXTRAS.items():
        assert name in found
        assert canonical(name) in declared(PROJECT["optional-dependencies"][extra])


def test_what_is_declared_is_imported() -> None:
    used = set().union(*map(distributions, imported()))
    assert declared(PROJECT["dependencies"]) - used == NOT_IMPORTED.keys()
