"""Small models whose every part matters, for tests of the model alone."""

import math

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from dnt_scale.config import ModelConfig, config_dir
from dnt_scale.model.dnt import DNT

MATRICES = {"attn.w_q", "attn.w_k", "attn.w_v", "attn.w_o", "ffn.w_1", "ffn.w_2"}
VARIANTS: dict[str, dict[str, object]] = {
    "as is": {},
    "relu": {"activation": "relu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "large eps": {"norm_eps": 0.3},
    "untied head": {"tied_head": False},
    "no final norm": {"final_norm": False},
    "no positions": {"positions": "none"},
    "wide ffn": {"ffn_multiple": 6},
    "rope": {"positions": "rope", "rope": {"theta": 30}},
    "grouped heads": {"heads": 6, "kv_heads": 2, "head_size": 10},
    "swiglu": {"activation": "swiglu", "ffn_size": 40},
    "geglu": {"activation": "geglu"},
    "geglu_tanh": {"activation": "geglu_tanh"},
    "capped logits": {"logit_cap": 2.0},
    "padded vocabulary": {"vocab_multiple": 16},
}
VARIANTS["everything"] = {
    key: value
    for name in ("rope", "grouped heads", "swiglu", "capped logits", "padded vocabulary")
    for key, value in VARIANTS[name].items()
} | {"tied_head": False, "z_loss": 1e-2}


def tiny(**changes: object) -> ModelConfig:
    fields = {
        "name": "tiny",
        "layers": 3,
        "width": 24,
        "heads": 3,
        "vocab_size": 29,
        "context": 12,
        "setting": "S4",
    }
    return ModelConfig.model_validate(fields | changes)


def preset(name: str) -> ModelConfig:
    return ModelConfig.model_validate(
        yaml.safe_load((config_dir() / "model" / f"{name}.yaml").read_text())
    )


def normal(
    shape: tuple[int, ...] | torch.Size, seed: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_tokens(config: ModelConfig, rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


@torch.no_grad()
def busy(config: ModelConfig, dtype: torch.dtype = torch.float64) -> DNT:
    """A model with weights large enough that no part is nearly linear or nearly silent; gains
    between 0.5 and 1.5.
    """
    model = DNT(config).to(dtype)
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        value = normal(parameter.shape, seed)
        if name.endswith(".gain"):
            value = 1 + 0.5 * torch.tanh(value)
        elif name.endswith(".weight"):
            value = value * (1.0 if "emb" in name else 1.5 / math.sqrt(parameter.shape[1]))
        parameter.copy_(value)
    model.init_buffers()
    return model


def mean_loss(model: DNT, tokens: Tensor, targets: Tensor) -> Tensor:
    """In the model's own precision; the model itself always returns fp32."""
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
