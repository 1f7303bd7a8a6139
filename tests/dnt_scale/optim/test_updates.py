"""The rules of dnt_scale/optim/updates, each against a reference that is written out here."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from dnt_scale import config
from dnt_scale.config import config_dir
from dnt_scale.config.optim import UPDATES
from dnt_scale.model.task import shapes_of
from dnt_scale.optim import updates
from dnt_scale.optim.groups import parameter_groups
from tests.helpers.optimizers import drive, new_msgdw, tensors

FOLDER = Path(updates.__file__).parent


def test_each_rule_is_a_file_of_its_name() -> None:
    assert {path.stem for path in FOLDER.glob("[a-z]*.py")} == UPDATES.every().keys()


# --- row_normalized -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 3), (3, 12), (4, 4)])
def test_the_tall_factor_is_rmnps(shape: tuple[int, int]) -> None:
    """RMNP's optimizer (arXiv 2603.20527, its code): lerp, Nesterov's lerp, rows, factor."""
    ours, theirs = (nn.Parameter(tensors([shape], 1000, torch.float64)[0]) for _ in range(2))
    section = {"update": "row_normalized", "tall_factor": True}
    optimizer = new_msgdw(
        [{"params": [ours], "update": section}],
        lr=0.02,
        weight_decay=0.1,
        momentum=0.95,
        dampening=0.95,
        nesterov=True,
    )
    v = torch.zeros(shape, dtype=torch.float64)
    for step in range(5):
        drive(optimizer, [ours], 1, lambda _, step=step: tensors([shape], step, torch.float64))
        [g] = tensors([shape], step, torch.float64)
        v = torch.lerp(v, g, 0.05)
        d = torch.lerp(g, v, 0.95)
        d = d / d.norm(dim=1, keepdim=True) * max(1.0, shape[0] / shape[1]) ** 0.5
        theirs.data = (1 - 0.02 * 0.1) * theirs.data - 0.02 * d
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


# --- the files of configs/optim -------------------------------------------------------------------

MODELS = ["dnt_nano", "gpt_nano", "dnt_nano model.tied_head=false model.bias=true"]
# what each group holds, by its name in the file; None: the rest, which no pattern matches
WANTED = {
    "rmnp": {
        "embedding": r"tok_emb\.weight|head\.weight",
        "matrices": r"pos_emb\.weight|blocks\.\d+\.(attn\.w_[qkvo]|ffn\.w_2)\.weight",
        "tall": r"blocks\.\d+\.ffn\.w_1\.weight",
        None: r"(.*\.)?(norm|w)_\w+\.(gain|bias)",
    },
}


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_is_in_the_group_meant_for_it(name: str, model: str) -> None:
    wanted = WANTED[name]
    file = yaml.safe_load((config_dir() / "optim" / f"{name}.yaml").read_text())
    assert {label for label in wanted if label} == file["groups"].keys()
    run = config.load([f"optim={name}", *f"model={model}".split(), "run.name=x", "data.path=x"])
    named = {
        parameter: nn.Parameter(torch.empty(shape, device="meta"))
        for parameter, shape in shapes_of(run.model).items()
    }
    patterns = {group.pattern: label for label, group in run.optim.groups.items()}
    for group in parameter_groups(named.items(), run.optim):
        label = patterns.get(group["update"].pattern)
        for parameter in group["names"]:
            assert re.fullmatch(wanted[label], parameter), (label, parameter)
