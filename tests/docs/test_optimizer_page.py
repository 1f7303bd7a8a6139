"""docs/extend/optimizer.md: its example, as it stands on the page, works."""

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dnt_scale import config
from dnt_scale.config.optim import OPTIMIZERS
from dnt_scale.optim import algorithms
from dnt_scale.optim.build import build_optimizer
from dnt_scale.optim.segments import Segment
from dnt_scale.optim.shards import Shard
from tests.docs.pages import ROOT, code_blocks, module_of
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


def test_a_step_may_look_at_whole_tensors() -> None:
    """The share of positive elements of two tensors that lie in one flat shard."""
    [source] = re.findall(r"^  ```python\n(.*?)^  ```$", (ROOT / PAGE).read_text(), re.M | re.S)
    example = module_of("whole_tensors_of_the_page", textwrap.dedent(source))
    gradient = torch.tensor([1.0, -1.0, 2.0, 3.0, -4.0, -5.0])
    segments = [Segment((2, 2), 0, 0, 4), Segment((2,), 0, 4, 2)]
    shard = Shard(gradient.clone(), gradient, {}, {}, {}, segments, None, torch.Generator)
    assert [float(share) for _, share in example.shares([shard])] == pytest.approx([0.75, 0.0])


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
