"""A language model as transformers has it, and back: settings (config.json), tensors by name.

Where every setting coincides, the model is GPT-2 or Llama; else it is ``dnt``, the class in
``remote_code/``, whose settings and tensors have our names.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, ValidationError
from torch import Tensor

from dnt_scale.config import ConfigError, ModelConfig
from dnt_scale.model.task import shapes_of

Architecture = Literal["gpt2", "llama", "dnt"]

GPT2_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
LLAMA_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_pytorch_tanh"}
# settings that say nothing of the weights or of what is computed from them
OURS_ALONE = {"name", "kind", "vocab_multiple"}
LLAMA_NAMES = {
    "norm_pre1": "input_layernorm",
    "norm_pre2": "post_attention_layernorm",
    **{f"attn.w_{letter}": f"self_attn.{letter}_proj" for letter in "qkvo"},
    "ffn.w_1": "mlp.gate_proj",
    "ffn.w_3": "mlp.up_proj",
    "ffn.w_2": "mlp.down_proj",
}
LLAMA_OUTSIDE = {
    "tok_emb": "model.embed_tokens",
    "norm_out": "model.norm",
    "head": "lm_head",
}
GPT2_NAMES = {
    "norm_pre1": "ln_1",
    "norm_pre2": "ln_2",
    "attn.w_o": "attn.c_proj",
    "ffn.w_1": "mlp.c_fc",
    "ffn.w_2": "mlp.c_proj",
}
GPT2_OUTSIDE = {
    "tok_emb": "transformer.wte",
    "pos_emb": "transformer.wpe",
    "norm_out": "transformer.ln_f",
    "head": "lm_head",
}


class Stored(NamedTuple):
    """One of their tensors: ours, end to end in dimension 0, transposed where ``transposed``."""

    name: str
    ours: tuple[str, ...]
    transposed: bool = False

    def shape(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Return its shape, of the shapes of ours."""
        rest = shapes[self.ours[0]][1:]
        whole = (sum(shapes[name][0] for name in self.ours), *rest)
        return whole[::-1] if self.transposed else whole

    def joined(self, ours: list[Tensor]) -> Tensor:
        """Return theirs of ours."""
        whole = torch.cat(ours) if len(ours) > 1 else ours[0]
        return (whole.T if self.transposed else whole).contiguous()

    def parts(self, theirs: Tensor, shapes: dict[str, tuple[int, ...]]) -> Iterator[Tensor]:
        """Yield ours of theirs, in the order of ``ours``."""
        whole = theirs.T if self.transposed else theirs
        yield from whole.split([shapes[name][0] for name in self.ours])


def exported_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of our tensors without rows that only fill them up."""
    found = {}
    for name, shape in shapes_of(model).items():
        rows = model.exported_rows(name)
        found[name] = shape if rows is None else (rows, *shape[1:])
    return found


def architecture_of(model: ModelConfig) -> Architecture:
    """Return the class of transformers that computes just what the model does."""
    plain = model.setting == "S1" and model.final_norm and model.logit_cap is None
    whole_heads = model.sizes.head * model.heads == model.width
    if (
        plain
        and (model.norm, model.bias, model.positions) == ("layernorm", True, "learned")
        and model.activation in GPT2_ACTIVATIONS
        and whole_heads
        and model.sizes.kv_heads == model.heads
    ):
        return "gpt2"
    if (
        plain
        and (model.norm, model.positions) == ("rmsnorm", "rope")
        and model.activation in LLAMA_ACTIVATIONS
        and model.width % model.heads == 0  # transformers refuses others
    ):
        return "llama"
    return "dnt"


def stored_tensors(architecture: Architecture, names: list[str]) -> list[Stored]:
    """Return their tensors, of the names of ours."""
    if architecture == "dnt":
        return [Stored(name, (name,)) for name in names]
    found = []
    for name in names:
        module, _, kind = name.rpartition(".")
        kind = "weight" if kind == "gain" else kind
        if not module.startswith("blocks."):
            outside = LLAMA_OUTSIDE if architecture == "llama" else GPT2_OUTSIDE
            found.append(Stored(f"{outside[module]}.{kind}", (name,)))
            continue
        _, layer, part = module.split(".", 2)
        if architecture == "llama":
            found.append(Stored(f"model.layers.{layer}.{LLAMA_NAMES[part]}.{kind}", (name,)))
            continue
        matrix = kind == "weight" and not part.startswith("norm")  # Conv1D has (in, out)
        if part in GPT2_NAMES:
            place = f"transformer.h.{layer}.{GPT2_NAMES[part]}.{kind}"
            found.append(Stored(place, (name,), matrix))
        elif part == "attn.w_q":  # and with it w_k and w_v
            three = tuple(name.replace("w_q", f"w_{letter}") for letter in "qkv")
            found.append(Stored(f"transformer.h.{layer}.attn.c_attn.{kind}", three, matrix))
    return found


# --- config.json ----------------------------------------------------------------------------------


def settings_of(model: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    """Return what config.json says of the model, without ids and dtype."""
    if architecture == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": model.vocab_size,
            "n_positions": model.context,
            "n_embd": model.width,
            "n_layer": model.layers,
            "n_head": model.heads,
            "n_inner": model.sizes.ffn,
            "activation_function": GPT2_ACTIVATIONS[model.activation],
            "layer_norm_epsilon": model.norm_eps,
            "initializer_range": model.init_std,
            "tie_word_embeddings": model.tied_head,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }
    if architecture == "llama":
        scaling: dict[str, Any] = {"rope_type": "default"}
        if model.rope.scaling != "none":
            scaling = {"rope_type": model.rope.scaling, "factor": model.rope.factor}
        if model.rope.scaling == "llama3":
            scaling |= {
                "low_freq_factor": model.rope.low_freq_factor,
                "high_freq_factor": model.rope.high_freq_factor,
                "original_max_position_embeddings": model.rope.original_context,
            }
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": model.vocab_size,
            "hidden_size": model.width,
            "intermediate_size": model.sizes.ffn,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.sizes.kv_heads,
            "head_dim": model.sizes.head,
            "hidden_act": LLAMA_ACTIVATIONS[model.activation],
            "max_position_embeddings": model.context,
            "rms_norm_eps": model.norm_eps,
            "attention_bias": model.bias,
            "mlp_bias": model.bias,
            "initializer_range": model.init_std,
            "tie_word_embeddings": model.tied_head,
            # releases before 5 read the first two, later ones the third
            "rope_theta": model.rope.theta,
            "rope_scaling": None if model.rope.scaling == "none" else scaling,
            "rope_parameters": {"rope_theta": model.rope.theta, **scaling},
        }
    return {
        "architectures": ["DNTForCausalLM"],
        "model_type": "dnt",
        "auto_map": {
            "AutoConfig": "configuration_dnt.DNTConfig",
            "AutoModelForCausalLM": "modeling_dnt.DNTForCausalLM",
        },
        **model.model_dump(mode="json", exclude=OURS_ALONE),
    }


def _of(values: dict[str, str]) -> BeforeValidator:
    """Return what makes ours of one of their values."""
    return BeforeValidator(lambda value: values.get(value, value) if isinstance(value, str) else 0)


class _GPT2(BaseModel):
    """config.json of a GPT-2, with the defaults of transformers."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: Annotated[
        Literal["gelu_tanh", "gelu", "relu"],
        _of({"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}),
    ] = "gelu_tanh"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    add_cross_attention: Literal[False] = False

    def ours(self) -> dict[str, Any]:
        return {
            "layers": self.n_layer,
            "width": self.n_embd,
            "heads": self.n_head,
            "vocab_size": self.vocab_size,
            "context": self.n_positions,
            "setting": "S1",
            "norm": "layernorm",
            "bias": True,
            "activation": self.activation_function,
            "ffn_size": self.n_inner,
            "norm_eps": self.layer_norm_epsilon,
            "tied_head": self.tie_word_embeddings,
        }


class _Rope(BaseModel):
    rope_theta: float | None = None
    rope_type: Annotated[Literal["none", "linear", "llama3"], _of({"default": "none"})] = Field(
        "none", validation_alias=AliasChoices("rope_type", "type")
    )
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None


class _Llama(BaseModel):
    """config.json of a Llama, with the defaults of transformers."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: Annotated[
        Literal["swiglu", "geglu", "geglu_tanh"],
        _of({theirs: ours for ours, theirs in LLAMA_ACTIVATIONS.items()}),
    ] = "swiglu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None

    def ours(self) -> dict[str, Any]:
        if self.attention_bias != self.mlp_bias:
            raise ConfigError(
                f"attention_bias is {self.attention_bias}, mlp_bias {self.mlp_bias}; expected both "
                "the same: our blocks have biases everywhere or nowhere"
            )
        rope = self.rope_parameters or self.rope_scaling or _Rope()
        llama3 = rope.rope_type == "llama3"
        turning: dict[str, Any] = {
            "theta": rope.rope_theta or self.rope_theta or 10_000.0,
            "scaling": rope.rope_type,
            "factor": rope.factor,
        }
        if llama3:
            turning |= {
                "original_context": rope.original_max_position_embeddings,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
            }
        return {
            "layers": self.num_hidden_layers,
            "width": self.hidden_size,
            "heads": self.num_attention_heads,
            "kv_heads": self.num_key_value_heads,
            "head_size": self.head_dim,
            "ffn_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "context": self.max_position_embeddings,
            "setting": "S1",
            "bias": self.attention_bias,
            "activation": self.hidden_act,
            "norm_eps": self.rms_norm_eps,
            "positions": "rope",
            "rope": turning,
            "tied_head": self.tie_word_embeddings,
        }


def read_settings(folder: Path) -> tuple[Architecture, ModelConfig]:
    """Return what config.json of a folder describes.

    Raises:
        ConfigError: there is none, or of no model that we have.
    """
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror}; expected a folder that `dnt export` or transformers wrote"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from None
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    try:
        if kind == "gpt2":
            ours = _GPT2.model_validate(raw).ours()
        elif kind == "llama":
            ours = _Llama.model_validate(raw).ours()
        elif kind == "dnt":
            ours = {
                key: raw[key] for key in ModelConfig.model_fields.keys() - OURS_ALONE & raw.keys()
            }
        else:
            raise ConfigError(
                f"{file}: model_type is {kind!r}, expected dnt, gpt2 or llama; others cannot be "
                "imported"
            )
        return kind, ModelConfig.model_validate({**ours, "name": "imported"})
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "model"
        raise ConfigError(
            f"{file}: {where} is {problem['input']!r:.60}: {problem['msg']}; it is no model that "
            "`dnt` has"
        ) from None
