"""A run that nobody has trained: a folder with a checkpoint of step 0, of weights that matter."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from dnt_scale import config
from dnt_scale.config import ModelConfig
from dnt_scale.model.dnt import DNT
from dnt_scale.tools.convert_weights import from_file
from testbed.configs import composed
from testbed.run import tiny
from tests.helpers.models import busy


def made_run(folder: Path, data: Path, overrides: list[str], *more: str) -> tuple[Path, DNT]:
    """The folder of a run that has a checkpoint of step 0, and its model."""
    chosen = tiny(data, folder / "run", *(f"model.{each}" for each in overrides), *more)
    run = composed(*chosen)
    assert isinstance(run.model, ModelConfig)
    model = busy(run.model, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * (0.2 if parameter.ndim > 1 else 1))
    weights = {
        name: value[: run.model.exported_rows(name)].contiguous()
        for name, value in model.state_dict().items()
    }
    for name in weights:  # what stands there is 0 in training
        dict(model.named_parameters())[name].data[len(weights[name]) :] = 0
    save_file(weights, folder / "weights.safetensors")
    from_file(folder / "weights.safetensors", chosen)
    (folder / "run" / "config.yaml").write_text(config.to_yaml(run))
    return folder / "run", model
