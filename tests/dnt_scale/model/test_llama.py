"""Against transformers' Llama and Gemma 2, and the presets of Llama's shapes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from dnt_scale import config
from dnt_scale.config import ModelConfig, RunConfig
from dnt_scale.costs import memory_plan
from dnt_scale.model.block import SETTINGS
from dnt_scale.model.dnt import DNT
from dnt_scale.model.flops import count_parameters, flops_per_token
from tests.helpers.models import normal, preset, random_tokens, tiny

SHAPE = {
    "layers": 3,
    "width": 48,
    "heads": 6,
    "kv_heads": 2,
    "head_size": 16,
    "ffn_size": 80,
    "vocab_size": 211,
    "context": 128,
    "positions": "rope",
    "tied_head": False,
    "norm_eps": 1e-5,
}
# Their names of what stands in a block, by ours.
MATRICES = {f"attn.w_{letter}": f"self_attn.{letter}_proj" for letter in "qkvo"}
MATRICES |= {"ffn.w_1": "mlp.gate_proj", "ffn.w_3": "mlp.up_proj", "ffn.w_2": "mlp.down_proj"}
LLAMA_NORMS = {"norm_pre1": "input_layernorm", "norm_pre2": "post_attention_layernorm"}
GEMMA_NORMS = {
    "norm_pre1": "input_layernorm",
    "norm_mid1": "post_attention_layernorm",
    "norm_pre2": "pre_feedforward_layernorm",
    "norm_mid2": "post_feedforward_layernorm",
}


def their_settings(ours: ModelConfig) -> dict[str, object]:
    names = {"linear": "linear", "llama3": "llama3", "none": "default"}
    rope = {"rope_type": names[ours.rope.scaling], "rope_theta": ours.rope.theta}
    if ours.rope.scaling != "none":
        rope["factor"] = ours.rope.factor
    if ours.rope.scaling == "llama3":
        rope |= {
            "low_freq_factor": ours.rope.low_freq_factor,
            "high_freq_factor": ours.rope.high_freq_factor,
            "original_max_position_embeddings": ours.rope.original_context,
        }
    return {
        "vocab_size": ours.vocab_size,
        "hidden_size": ours.width,
        "intermediate_size": ours.ffn_size,
        "num_hidden_layers": ours.layers,
        "num_attention_heads": ours.heads,
        "num_key_value_heads": ours.kv_heads,
        "head_dim": ours.sizes.head,
        "max_position_embeddings": ours.context,
        "rms_norm_eps": ours.norm_eps,
        "tie_word_embeddings": ours.tied_head,
        "rope_parameters": rope,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }


def random_model(kind: type[PreTrainedModel], settings: object, gain: float) -> PreTrainedModel:
    """Of random weights, with gains about 1; ``gain`` is what its norms add to their weights."""
    with torch.random.fork_rng():  # its constructor draws from the global generator
        theirs = kind(settings).eval()
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(theirs.named_parameters()):
            noise = normal(parameter.shape, seed, torch.float32)
            parameter.copy_(1 - gain + 0.3 * noise if "norm" in name else 0.2 * noise)
    return theirs


def as_ours(
    theirs: PreTrainedModel, norms: dict[str, str], gain: float, embedding: float
) -> Iterator[tuple[str, Tensor]]:
    """Their weights by our names; ``gain`` is what their norms add to their weights, ``embedding``
    what embeddings are multiplied by.
    """
    read = theirs.get_parameter
    yield "tok_emb.weight", embedding * read("model.embed_tokens.weight")
    yield "norm_out.gain", gain + read("model.norm.weight")
    yield "head.weight", read("lm_head.weight")
    for layer in range(theirs.config.num_hidden_layers):
        for ours, other in MATRICES.items():
            yield f"blocks.{layer}.{ours}.weight", read(f"model.layers.{layer}.{other}.weight")
        for ours, other in norms.items():
            yield f"blocks.{layer}.{ours}.gain", gain + read(f"model.layers.{layer}.{other}.weight")


@torch.no_grad()
def check_logits(ours: ModelConfig, theirs: nn.Module, weights: Iterator[tuple[str, Tensor]]):
    model = DNT(ours)
    model.init_buffers()
    parameters = dict(model.named_parameters())
    for name, value in weights:
        parameters.pop(name).copy_(value)
    assert not parameters
    tokens = random_tokens(ours, 2, ours.context)
    expected = theirs(tokens).logits
    assert expected.std() > 1  # not a comparison of zeros
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=0)


ROPES = {
    "plain": {"theta": 10_000},
    "linear": {"theta": 10_000, "scaling": "linear", "factor": 4},
    # slow and fast frequencies, and some between
    "llama3": {"theta": 500, "scaling": "llama3", "factor": 8, "original_context": 64},
}


@pytest.mark.parametrize("name", ROPES)
def test_s1_is_transformers_llama(name: str) -> None:
    ours = tiny(**SHAPE, setting="S1", activation="swiglu", rope=ROPES[name])
    theirs = random_model(LlamaForCausalLM, LlamaConfig(**their_settings(ours)), gain=0)
    check_logits(ours, theirs, as_ours(theirs, LLAMA_NORMS, 0.0, 1.0))


def test_peri_with_capped_logits_is_transformers_gemma_2() -> None:
    """But for attention's cap and its sliding window, which ours has not."""
    ours = tiny(
        **SHAPE, setting="peri", activation="geglu_tanh", logit_cap=3.0, rope={"theta": 10_000}
    )
    settings = Gemma2Config(
        **their_settings(ours),
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=ours.sizes.head,
        attn_logit_softcapping=None,
        final_logit_softcapping=ours.logit_cap,
        layer_types=["full_attention"] * ours.layers,
    )
    theirs = random_model(Gemma2ForCausalLM, settings, gain=1)
    # its norms have gains 1 + weight, its embedding is scaled by sqrt(width)
    check_logits(ours, theirs, as_ours(theirs, GEMMA_NORMS, 1.0, ours.width**0.5))


# ---------------------------------------------------------------- presets

# size: Llama's own number of weights, with the position of none; layers, width, size of a head
SIZES = {
    "1b": (1_235_814_400, 16, 2048, 64),
    "7b": (6_738_415_616, 32, 4096, 128),
    "70b": (70_553_706_496, 80, 8192, 128),
}


def composed(model: str, *overrides: str) -> RunConfig:
    given = ["run.name=x", "data.path=x", "train.dtype=bf16", *overrides]
    return config.load([f"model={model}", *given])


@pytest.mark.parametrize("size", SIZES)
def test_presets_have_llamas_parameters_and_dnts_norms(size: str) -> None:
    weights, layers, width, head = SIZES[size]
    llama, dnt = preset(f"gpt_llama_{size}"), preset(f"dnt_llama_{size}")
    assert dnt.setting == "S5" and SETTINGS[dnt.setting].mid
    assert llama == dnt.model_copy(update={"name": llama.name, "setting": "S1"})
    assert count_parameters(llama) == weights
    # S5 has three norms of the width and two of a head's a block, S1 two; and an input norm
    assert count_parameters(dnt) - weights == layers * (width + 2 * head) + width
    attention = 12 * layers * width * dnt.context  # heads times their size is the width
    assert flops_per_token(dnt, dnt.context) == 6 * count_parameters(dnt) + attention


@pytest.mark.parametrize("size", SIZES)
def test_the_memory_of_presets_is_the_formula_without_allocating(size: str) -> None:
    """Rows of all matrices divide by 64 ranks, so that there is next to no padding."""
    run = composed(f"dnt_llama_{size}", "engine=fsdp", "optim=msgdw")
    parameters = memory_plan.parameters_of(run.model)
    assert parameters == count_parameters(preset(f"dnt_llama_{size}"))
    for ranks in (1, 64):
        total = memory_plan.memory(run, ranks).total()
        assert 12 * parameters <= total * ranks <= 12 * parameters * 1.0001
    assert memory_plan.checkpoint_bytes(run) == 8 * parameters
