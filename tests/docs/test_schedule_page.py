"""docs/extend/schedule.md: its example, as it stands on the page, works."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from dnt_scale import config
from dnt_scale.config.optim import SCHEDULES
from dnt_scale.optim import schedules
from tests.docs.pages import code_blocks, module_of

PAGE = "docs/extend/schedule.md"
NAME = "dnt_scale.optim.schedules.inverse_sqrt"


@pytest.fixture(scope="module")
def inverse_sqrt() -> Iterator[ModuleType]:
    """The page's file, as if it were in the folder."""
    module = module_of(NAME, code_blocks(PAGE, "python")[0])
    schedules.inverse_sqrt = module  # type: ignore[attr-defined]
    yield module
    del sys.modules[NAME], schedules.inverse_sqrt  # type: ignore[attr-defined]
    del SCHEDULES._classes["inverse_sqrt"]


def test_the_pages_test_passes(inverse_sqrt: ModuleType) -> None:
    found = module_of("test_inverse_sqrt_of_the_page", code_blocks(PAGE, "python")[1])
    found.test_it_falls_from_the_end_of_warmup()


def test_the_command_chooses_it(inverse_sqrt: ModuleType) -> None:
    chosen = ["optim.schedule.name=inverse_sqrt", "optim.schedule.shift=100"]
    section = config.load([*chosen, "run.name=x", "data.path=x"]).optim.schedule
    assert isinstance(section, inverse_sqrt.InverseSquareRoot)
    assert (section.shift, section.warmup) == (100, 0.05)
    with pytest.raises(config.ConfigError, match=r"optim\.schedule\.shift"):
        config.load([*chosen, "optim.schedule.shift=-1", "run.name=x", "data.path=x"])
