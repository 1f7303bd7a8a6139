"""docs/extend/optimizer.md: its example, as it stands on the page, works."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dnt_scale import config
from dnt_scale.config.optim import OPTIMIZERS
from dnt_scale.optim import algorithms
from dnt_scale.optim.build import build_optimizer
from tests.docs.pages import code_blocks, module_of
from tests.helpers.optimizers import tiny_model

PAGE = "docs/extend/optimizer.md"
NAME = "dnt_scale.optim.algorithms.rmsprop"


@pytest.fixture(scope="module")
def rmsprop() -> Iterator[ModuleType]:
    """The page's file, as if it were in the folder."""
    module = module_of(NAME, code_blocks(PAGE, "python")[0])
    algorithms.rmsprop = module  # type: ignore[attr-defined]
    yield module
    del sys.modules[NAME], algorithms.rmsprop  # type: ignore[attr-defined]
    del OPTIMIZERS._classes["rmsprop"]


def test_the_page_has_a_file_a_yaml_and_a_test() -> None:
    assert (len(code_blocks(PAGE, "python")), len(code_blocks(PAGE, "yaml"))) == (2, 1)


def test_the_pages_test_passes(rmsprop: ModuleType) -> None:
    found = module_of("test_rmsprop_of_the_page", code_blocks(PAGE, "python")[1])
    tests = [value for name, value in vars(found).items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_the_yaml_chooses_it(rmsprop: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "rmsprop.yaml"
    file.write_text(code_blocks(PAGE, "yaml")[0])
    chosen = [f"optim={file}", "optim.smoothing=0.9", "run.name=x", "data.path=x"]
    section = config.load(chosen).optim
    assert isinstance(section, rmsprop.RMSPropConfig)
    assert (section.bytes_a_weight, section.describe()) == (4, "smoothing 0.9")
    optimizer = build_optimizer(tiny_model().named_parameters(), section, seed=1)
    optimizer.allocate()
    for state in optimizer.state.values():
        assert [buffer.dtype for buffer in state.values()] == [torch.float32]
    with pytest.raises(config.ConfigError, match="rmsprop needs the gradient after backward"):
        config.load([*chosen, "optim.gradient_buffer=false", "optim.clip=tensor"])
