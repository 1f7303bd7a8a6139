"""The model against GPT-2, against a written-out DNT, and against the facts of dnt.md."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.functional import jacobian
from transformers import GPT2Config, GPT2LMHeadModel

from dnt_scale.config import ModelConfig, Setting, config_dir
from dnt_scale.model import (
    DNT,
    IGNORED,
    SETTINGS,
    Attention,
    FeedForward,
    Norm,
    count_parameters,
    document_layout,
    flops_per_token,
    init_weights,
    initial_tensor,
)

PROPERTY = settings(max_examples=12, deadline=None, derandomize=True)
SCALE = st.floats(0.1, 10)
TINY_EPS = 1e-30  # the scale invariances are exact up to eps, so this makes them exact up to rounding


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors are tiny: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**changes: object) -> ModelConfig:
    fields = {"name": "tiny", "layers": 3, "width": 24, "heads": 3, "vocab_size": 29, "context": 12, "setting": "S4"}
    return ModelConfig.model_validate(fields | changes)


def preset(name: str) -> ModelConfig:
    return ModelConfig.model_validate(yaml.safe_load((config_dir() / "model" / f"{name}.yaml").read_text()))


def normal(shape: tuple[int, ...] | torch.Size, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_tokens(config: ModelConfig, rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def busy(config: ModelConfig, dtype: torch.dtype = torch.float64) -> DNT:
    """A model with weights large enough that no part is nearly linear or nearly silent; gains between 0.5 and 1.5."""
    model = DNT(config).to(dtype)
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        value = normal(parameter.shape, seed)
        if name.endswith(".gain"):
            value = 1 + 0.5 * torch.tanh(value)
        elif name.endswith(".weight"):
            value = value * (1.0 if "emb" in name else 1.5 / math.sqrt(parameter.shape[1]))
        parameter.copy_(value)
    return model


def mean_loss(model: DNT, tokens: Tensor, targets: Tensor) -> Tensor:
    """In the model's own precision; the model itself always returns fp32."""
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


# ---------------------------------------------------------------- GPT-2


def gpt2_twin(config: ModelConfig) -> tuple[DNT, GPT2LMHeadModel]:
    """A GPT-2 with random weights, gains and biases, and ours with the same."""
    with torch.random.fork_rng():  # its constructor draws from the global generator
        theirs = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.context,
                n_embd=config.width,
                n_layer=config.layers,
                n_head=config.heads,
                layer_norm_epsilon=config.norm_eps,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            )
        ).eval()
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(theirs.named_parameters()):
            noise = normal(parameter.shape, seed, torch.float32)
            parameter.copy_(1 + 0.3 * noise if ".ln_" in name and name.endswith("weight") else 0.15 * noise)
    ours = DNT(config)
    weights = dict(ours.named_parameters())
    with torch.no_grad():
        for name, value in as_ours(lambda name: theirs.get_parameter(name).detach(), config):
            weights.pop(name).copy_(value)
    assert not weights
    return ours, theirs


def as_ours(read: Callable[[str], Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """GPT-2's tensors (weights or gradients) by our names. Its Conv1D stores (in, out) and fuses q, k, v."""
    yield "tok_emb.weight", read("transformer.wte.weight")
    yield "pos_emb.weight", read("transformer.wpe.weight")
    norms = {"norm_out": "transformer.ln_f"}
    for layer in range(config.layers):
        block, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        norms |= {f"{block}.norm_pre1": f"{theirs}.ln_1", f"{block}.norm_pre2": f"{theirs}.ln_2"}
        qkv = zip("qkv", read(f"{theirs}.attn.c_attn.weight").chunk(3, dim=1), strict=True)
        yield from ((f"{block}.attn.w_{letter}.weight", part.T) for letter, part in qkv)
        qkv = zip("qkv", read(f"{theirs}.attn.c_attn.bias").chunk(3), strict=True)
        yield from ((f"{block}.attn.w_{letter}.bias", part) for letter, part in qkv)
        for mine, other in (("attn.w_o", "attn.c_proj"), ("ffn.w_1", "mlp.c_fc"), ("ffn.w_2", "mlp.c_proj")):
            yield f"{block}.{mine}.weight", read(f"{theirs}.{other}.weight").T
            yield f"{block}.{mine}.bias", read(f"{theirs}.{other}.bias")
    for mine, other in norms.items():
        yield f"{mine}.gain", read(f"{other}.weight")
        yield f"{mine}.bias", read(f"{other}.bias")


def gpt2_config(**sizes: int) -> ModelConfig:
    return tiny(setting="S1", norm="layernorm", bias=True, activation="gelu_tanh", norm_eps=1e-5, **sizes)


def test_s1_is_gpt2_in_logits_loss_and_every_gradient() -> None:
    config = gpt2_config(layers=4, width=64, heads=4, vocab_size=211, context=48)
    ours, theirs = gpt2_twin(config)
    tokens = random_tokens(config, 3, 40)

    output = theirs(tokens, labels=tokens)
    assert output.logits.std() > 1  # not a comparison of zeros
    torch.testing.assert_close(ours(tokens), output.logits, atol=1e-5, rtol=0)

    loss = ours(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    torch.testing.assert_close(loss, output.loss, atol=2e-6, rtol=0)
    loss.backward()
    output.loss.backward()
    theirs_by_name = dict(as_ours(lambda name: theirs.get_parameter(name).grad, config))
    assert theirs_by_name.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - theirs_by_name[name]).norm()
        if name.endswith("w_k.bias"):  # the softmax ignores it, so its gradient is all rounding
            assert error < 1e-6 and parameter.grad.norm() < 1e-6
        else:
            assert error <= 1e-5 * theirs_by_name[name].norm(), name


@torch.no_grad()
def test_s1_is_gpt2_at_its_real_vocabulary_and_context() -> None:
    config = gpt2_config(layers=2, width=32, heads=2, vocab_size=50304, context=1024)
    ours, theirs = gpt2_twin(config)
    tokens = random_tokens(config, 1, 1024)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- a DNT written out from dnt.md


def written_out(weights: dict[str, Tensor], config: ModelConfig, tokens_T: Tensor) -> Tensor:
    """Logits of one row, from the equations of dnt.md and nothing of ours but the parameter names."""
    setting, heads = config.setting, config.heads
    d_h = config.width // heads

    def norm(x: Tensor, name: str) -> Tensor:
        d = x.shape[-1]
        squared_length = (x * x).sum(-1, keepdim=True) + d * config.norm_eps
        return math.sqrt(d) * weights[f"{name}.gain"] * x / squared_length.sqrt()

    def attention(x: Tensor, block: str) -> Tensor:
        columns = []
        for head in range(heads):
            rows = slice(head * d_h, (head + 1) * d_h)
            q, k, v = (x @ weights[f"{block}.attn.w_{letter}.weight"][rows].T for letter in "qkv")
            if setting != "S1":
                q, k = norm(q, f"{block}.attn.norm_q"), norm(k, f"{block}.attn.norm_k")
            y = torch.zeros_like(v)
            for t in range(len(x)):
                logits = k[: t + 1] @ q[t] / math.sqrt(d_h)
                exponentials = torch.exp(logits - logits.max())
                y[t] = exponentials / exponentials.sum() @ v[: t + 1]
            columns.append(y)
        return torch.cat(columns, dim=1) @ weights[f"{block}.attn.w_o.weight"].T

    def ffn(x: Tensor, block: str) -> Tensor:
        h = x @ weights[f"{block}.ffn.w_1.weight"].T
        if config.activation == "relu":
            h = h * (h > 0)
        elif config.activation == "gelu":
            h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        else:
            h = h * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return h @ weights[f"{block}.ffn.w_2.weight"].T

    x = weights["tok_emb.weight"][tokens_T]
    if config.positions == "learned":
        x = x + weights["pos_emb.weight"][: len(tokens_T)]
    if setting in ("S3", "S4", "S5"):
        x = norm(x, "norm_in")
    for layer in range(config.layers):
        block = f"blocks.{layer}"
        if setting in ("S4", "S5"):
            u = x + norm(attention(norm(x, f"{block}.norm_pre1"), block), f"{block}.norm_mid1")
            inner = norm(u, f"{block}.norm_pre2") if setting == "S4" else u
            x = u + norm(ffn(inner, block), f"{block}.norm_mid2")
        else:
            u = x + attention(norm(x, f"{block}.norm_pre1"), block)
            x = u + ffn(norm(u, f"{block}.norm_pre2"), block)
    head = weights["tok_emb.weight"] if config.tied_head else weights["head.weight"]
    return (norm(x, "norm_out") if config.final_norm else x) @ head.T


VARIANTS: dict[str, dict[str, object]] = {
    "as is": {},
    "relu": {"activation": "relu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "large eps": {"norm_eps": 0.3},
    "untied head": {"tied_head": False},
    "no final norm": {"final_norm": False},
    "no positions": {"positions": "none"},
    "wide ffn": {"ffn_multiple": 6},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_setting_is_the_written_out_one(setting: Setting, variant: str) -> None:
    config = tiny(setting=setting, **VARIANTS[variant])
    model = busy(config)
    weights = dict(model.named_parameters())
    tokens = random_tokens(config, 2, config.context)
    expected = torch.stack([written_out(weights, config, row) for row in tokens])
    assert expected.std() > 0.3
    torch.testing.assert_close(model(tokens), expected, atol=1e-12, rtol=1e-12)
    error = (model.float()(tokens).double() - expected).abs().max()
    assert error <= 1e-5 * max(1.0, float(expected.std()))  # without a final norm logits are several times larger


@torch.no_grad()
def test_settings_differ_from_each_other() -> None:
    tokens = random_tokens(tiny(), 2, 12)
    logits = {setting: busy(tiny(setting=setting))(tokens) for setting in SETTINGS}
    for a in SETTINGS:
        for b in SETTINGS:
            assert a == b or (logits[a] - logits[b]).abs().max() > 0.1, (a, b)


# ---------------------------------------------------------------- what stands where

PRESENT: dict[Setting, set[str]] = {
    "S1": {"norm_pre1", "norm_pre2"},
    "S2": {"norm_pre1", "norm_pre2", "attn.norm_q", "attn.norm_k"},
    "S3": {"norm_in", "norm_pre1", "norm_pre2", "attn.norm_q", "attn.norm_k"},
    "S4": {"norm_in", "norm_pre1", "norm_pre2", "attn.norm_q", "attn.norm_k", "norm_mid1", "norm_mid2"},
    "S5": {"norm_in", "norm_pre1", "attn.norm_q", "attn.norm_k", "norm_mid1", "norm_mid2"},
}
MATRICES = {"attn.w_q", "attn.w_k", "attn.w_v", "attn.w_o", "ffn.w_1", "ffn.w_2"}


@pytest.mark.parametrize("setting", SETTINGS)
def test_norms_of_a_setting_are_gains_only(setting: Setting) -> None:
    config = tiny(setting=setting, layers=2)
    in_block = PRESENT[setting] - {"norm_in"}
    expected = {"tok_emb.weight", "pos_emb.weight", "norm_out.gain"}
    expected |= {f"{name}.gain" for name in PRESENT[setting] & {"norm_in"}}
    for layer in range(2):
        expected |= {f"blocks.{layer}.{name}.gain" for name in in_block}
        expected |= {f"blocks.{layer}.{name}.weight" for name in MATRICES}
    shapes = {name: parameter.shape for name, parameter in DNT(config).named_parameters()}
    assert shapes.keys() == expected
    for name in expected:
        if name.endswith(".gain"):
            per_head = "norm_q" in name or "norm_k" in name  # one gain of size d_h per layer
            assert shapes[name] == (config.width // config.heads if per_head else config.width,)


def test_biases_and_optional_parts() -> None:
    names = set(dict(DNT(tiny(norm="layernorm", bias=True, layers=1)).named_parameters()))
    assert {"blocks.0.attn.w_q.bias", "blocks.0.ffn.w_2.bias", "blocks.0.norm_mid2.bias", "norm_in.bias"} <= names
    names = set(dict(DNT(tiny(norm="layernorm", bias=False)).named_parameters()))
    assert not any(name.endswith("bias") for name in names)
    bare = set(dict(DNT(tiny(final_norm=False, positions="none", tied_head=False)).named_parameters()))
    assert "head.weight" in bare and not bare & {"norm_out.gain", "pos_emb.weight"}


@pytest.mark.parametrize("setting", SETTINGS)
@torch.no_grad()
def test_a_later_token_never_changes_earlier_logits(setting: Setting) -> None:
    config = tiny(setting=setting)
    model = busy(config)
    tokens = random_tokens(config, 2, config.context)
    logits = model(tokens)
    for position in (1, 6, config.context - 1):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % config.vocab_size
        other = model(changed)
        torch.testing.assert_close(other[:, :position], logits[:, :position], atol=1e-12, rtol=0)
        assert ((other - logits)[:, position:].abs().amax(dim=(0, 2)) > 1e-6).all()  # and reaches all later ones


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch_or_on_what_follows() -> None:
    config = tiny()
    model = busy(config)
    tokens = random_tokens(config, 4, config.context)
    alone = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(model(tokens), alone, atol=1e-12, rtol=0)
    torch.testing.assert_close(model(tokens[:, :5]), model(tokens)[:, :5], atol=1e-12, rtol=0)


def test_a_row_longer_than_the_context_is_refused() -> None:
    model = busy(tiny())
    model(random_tokens(tiny(), 1, 12))
    with pytest.raises(ValueError, match=r"13 tokens.*model\.context is 12.*model\.context=13"):
        model(random_tokens(tiny(), 1, 13))
    with pytest.raises(ValueError, match=r"model\.context"):
        model(random_tokens(tiny(), 1, 13), random_tokens(tiny(), 1, 13))


@torch.no_grad()
def test_loss_is_the_fp32_sum_over_counted_targets() -> None:
    config = tiny()
    model = busy(config, torch.float32)
    tokens, targets = random_tokens(config, 2, 12), random_tokens(config, 2, 12, seed=1)
    log_p = torch.log_softmax(model(tokens).double(), dim=-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(model(tokens, targets).double(), -log_p.sum(), atol=1e-4, rtol=0)
    ignored = targets.clone()
    ignored[0, 3:] = ignored[1, 0] = IGNORED
    torch.testing.assert_close(model(tokens, ignored).double(), -log_p[ignored != IGNORED].sum(), atol=1e-4, rtol=0)
    assert model(tokens, torch.full_like(targets, IGNORED)) == 0
    assert model.bfloat16()(tokens, targets).dtype == torch.float32


# ---------------------------------------------------------------- sizes

# size: layers, width, millions of parameters with the position table, and without it as dnt.md counts
SIZES = {"124m": (12, 768, 124, 123.6), "774m": (36, 1280, 774, 772.3), "1.4b": (48, 1536, 1438, 1436.5)}


@pytest.mark.parametrize("size", SIZES)
def test_presets_have_the_papers_parameter_counts(size: str) -> None:
    layers, width, millions, without_positions = SIZES[size]
    config = preset(f"dnt_{size}")
    assert (config.setting, config.vocab_size, config.context) == ("S5", 50304, 1024)
    # S5: three norms of the width and two of a head's a block; InputNorm and the final norm
    gains = layers * (3 * width + 2 * width // config.heads) + 2 * width
    assert count_parameters(config, positions=False) - gains == layers * 12 * width**2 + 50304 * width
    assert count_parameters(config) - count_parameters(config, positions=False) == 1024 * width
    assert round(count_parameters(config) / 1e6) == millions
    assert count_parameters(config, positions=False) / 1e6 == pytest.approx(without_positions, abs=0.06)


def test_the_largest_preset_is_dnt_mds_formula() -> None:
    assert 48 * 12 * 1536**2 + 50304 * 1536 == 1_436_221_440  # "1436M"
    gains = 48 * (3 * 1536 + 2 * 64) + 2 * 1536
    assert count_parameters(preset("dnt_1.4b"), positions=False) == 1_436_221_440 + gains


def test_every_dnt_preset_has_its_gpt_twin() -> None:
    names = {path.stem for path in (config_dir() / "model").glob("*.yaml")}
    dnts = {name for name in names if name.startswith("dnt_")}
    assert dnts == {"dnt_nano", "dnt_124m", "dnt_774m", "dnt_1.4b"}
    assert names - dnts == {name.replace("dnt", "gpt") for name in dnts}
    for name in dnts:
        dnt, gpt = preset(name), preset(name.replace("dnt", "gpt"))
        assert gpt.setting == "S1" and SETTINGS[dnt.setting].mid
        assert gpt == dnt.model_copy(update={"name": gpt.name, "setting": "S1"})
        matrices = gpt.layers * 12 * gpt.width**2 + gpt.vocab_size * gpt.width
        assert count_parameters(gpt, positions=False) == matrices + (2 * gpt.layers + 1) * gpt.width
    assert 5e6 < count_parameters(preset("dnt_nano")) < 10e6


def test_count_parameters_counts_what_is_there() -> None:
    for config in (tiny(), tiny(tied_head=False, positions="none"), tiny(norm="layernorm", bias=True)):
        total = sum(parameter.numel() for parameter in DNT(config).parameters())
        assert count_parameters(config) == total
        table = config.context * config.width if config.positions == "learned" else 0
        assert count_parameters(config, positions=False) == total - table


def test_flops_per_token_by_hand() -> None:
    config = tiny(setting="S1", layers=2, width=8, heads=2, vocab_size=10, context=32)
    # 2 blocks of 12 * 8 * 8 = 768, embedding 80, five gains of 8: N = 1656; 6 N = 9936
    # attention: forward 2 * (2 * 16 * 8) a layer for q k^T and a v, three times that with the backward: 1536 a layer
    assert flops_per_token(config, seq_len=16) == 9936 + 2 * 1536
    untied = config.model_copy(update={"tied_head": False})
    assert flops_per_token(untied, seq_len=16) == 9936 + 6 * 80 + 2 * 1536


# ---------------------------------------------------------------- scale invariance (dnt.md, [R])


@torch.no_grad()
def rescale(model: DNT, scales: dict[str, list[float] | float]) -> None:
    """Multiply matrices of every block; a list has one factor a head, on that head's rows."""
    for block in model.blocks:
        for name, scale in scales.items():
            weight = block.get_parameter(f"{name}.weight")
            if isinstance(scale, list):
                scale_rows = torch.tensor(scale, dtype=weight.dtype).repeat_interleave(len(weight) // len(scale))
                weight.mul_(scale_rows[:, None])
            else:
                weight.mul_(scale)


def change(config: ModelConfig, scales: dict[str, list[float] | float]) -> float:
    """How far the logits move when the matrices are rescaled."""
    model = busy(config)
    tokens = random_tokens(config, 2, config.context)
    with torch.no_grad():
        before = model(tokens)
        rescale(model, scales)
        return float((model(tokens) - before).abs().max())


HEAD_SCALES = st.lists(SCALE, min_size=3, max_size=3)


@pytest.mark.parametrize("setting", ["S2", "S3", "S4", "S5"])
@PROPERTY
@given(q=HEAD_SCALES, k=HEAD_SCALES)
def test_qk_norm_makes_each_heads_wq_and_wk_scale_free(setting: Setting, q: list[float], k: list[float]) -> None:
    assert change(tiny(setting=setting, norm_eps=TINY_EPS), {"attn.w_q": q, "attn.w_k": k}) < 1e-11


@pytest.mark.parametrize("setting", ["S4", "S5"])
@PROPERTY
@given(v=SCALE, o=SCALE, w_1=SCALE, w_2=SCALE)
def test_mid_norm_makes_wv_wo_and_relu_ffn_scale_free(
    setting: Setting, v: float, o: float, w_1: float, w_2: float
) -> None:
    config = tiny(setting=setting, norm_eps=TINY_EPS, activation="relu")
    assert change(config, {"attn.w_v": v, "attn.w_o": o, "ffn.w_1": w_1, "ffn.w_2": w_2}) < 1e-11
    gelu = config.model_copy(update={"activation": "gelu"})
    assert change(gelu, {"attn.w_v": v, "attn.w_o": o, "ffn.w_2": w_2}) < 1e-11  # W_1 alone is not exact


SCALE_FREE: dict[Setting, set[str]] = {
    "S1": set(),
    "S2": {"attn.w_q", "attn.w_k"},
    "S3": {"attn.w_q", "attn.w_k"},
    "S4": MATRICES,
    "S5": MATRICES,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_exactly_these_matrices_are_scale_free(setting: Setting) -> None:
    config = tiny(setting=setting, norm_eps=TINY_EPS, activation="relu")
    changes = {name: change(config, {name: 2.7}) for name in MATRICES}
    assert {name for name, moved in changes.items() if moved < 1e-11} == SCALE_FREE[setting]
    assert all(moved > 0.05 for name, moved in changes.items() if name not in SCALE_FREE[setting])


def test_at_the_default_eps_and_fp32_the_loss_is_scale_free_to_rounding() -> None:
    everything: dict[str, list[float] | float] = {
        "attn.w_q": [2.0, 0.5, 3.0],
        "attn.w_k": [0.4, 5.0, 1.5],
        "attn.w_v": 3.0,
        "attn.w_o": 0.5,
        "ffn.w_1": 2.5,
        "ffn.w_2": 0.7,
    }
    tokens, targets = random_tokens(tiny(), 2, 12), random_tokens(tiny(), 2, 12, seed=1)
    moved: dict[Setting, float] = {}
    for setting in SETTINGS:
        model = busy(tiny(setting=setting, activation="relu"), torch.float32)
        with torch.no_grad():
            before = mean_loss(model, tokens, targets)
            rescale(model, everything)
            moved[setting] = float(abs(mean_loss(model, tokens, targets) - before))
    assert moved["S4"] < 2e-5 and moved["S5"] < 2e-5
    assert min(moved["S1"], moved["S2"], moved["S3"]) > 1e-2  # the control


@pytest.mark.parametrize("setting", ["S4", "S5"])
def test_the_gradient_is_orthogonal_to_scale_free_weights_and_shrinks_with_their_scale(setting: Setting) -> None:
    config = tiny(setting=setting, norm_eps=TINY_EPS, activation="relu")
    tokens, targets = random_tokens(config, 2, 12), random_tokens(config, 2, 12, seed=1)
    model = busy(config)
    mean_loss(model, tokens, targets).backward()
    first = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    factors: dict[str, list[float] | float] = {"attn.w_q": 2.0, "attn.w_o": 5.0, "ffn.w_2": 0.25}
    rescale(model, factors)
    model.zero_grad()
    mean_loss(model, tokens, targets).backward()
    for layer, block in enumerate(model.blocks):
        for name in MATRICES:
            weight, gradient = block.get_parameter(f"{name}.weight"), first[f"blocks.{layer}.{name}.weight"]
            factor = float(factors.get(name, 1.0))  # type: ignore[arg-type]
            heads = config.heads if name in ("attn.w_q", "attn.w_k") else 1
            products = (weight * gradient).view(heads, -1).sum(1)  # per head under QKNorm
            assert (products.abs() <= 1e-12 * weight.norm() * gradient.norm()).all(), name
            torch.testing.assert_close(weight.grad * factor, gradient, atol=1e-13, rtol=1e-9)


@torch.no_grad()
def test_gelu_is_scale_free_in_w1_only_roughly() -> None:
    """dnt.md's "within about 5 %": the direction of the FFN's output, which is all that MidNorm keeps, at width 768
    from the initial weights and a unit-RMS input turns by 6 to 7 % when W_1 grows or shrinks by a quarter, and by
    17 to 21 % at a factor of two. W_2 is exact."""
    config = tiny(width=768, heads=12)
    ffn = FeedForward(config).double()
    for name, parameter in ffn.named_parameters():
        parameter.copy_(initial_tensor(name, parameter.shape, config, 0))
    x = normal((64, 768), seed=0)

    def turned_by(name: str, scale: float) -> float:
        before = F.normalize(ffn(x), dim=-1)
        ffn.get_parameter(name).mul_(scale)
        after = F.normalize(ffn(x), dim=-1)
        ffn.get_parameter(name).div_(scale)
        return float((after - before).norm() / before.norm())

    for scale in (0.8, 1.25):
        assert 0.03 < turned_by("w_1.weight", scale) < 0.08
    for scale in (0.5, 2.0):
        assert 0.1 < turned_by("w_1.weight", scale) < 0.25
        assert turned_by("w_2.weight", scale) < 1e-14


# ---------------------------------------------------------------- Jacobians (dnt.md, [R] and Props. 2, 5)


def one_head(setting: Setting, width: int = 6, **changes: object) -> Attention:
    """Our Attention with one head, W_o = I and busy weights, so that its output is A V."""
    attention = Attention(tiny(setting=setting, width=width, heads=1, **changes)).double()
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(attention.named_parameters()):
            value = normal(parameter.shape, seed)
            parameter.copy_(1 + 0.3 * torch.tanh(value) if name.endswith("gain") else 0.6 * value)
        attention.w_o.weight.copy_(torch.eye(width))
    return attention


def dnt_md_jacobian(X: Tensor, W_q: Tensor, W_k: Tensor, W_v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Y = W_v X A and dvec(Y)/dvec(X) as dnt.md writes them; columns are tokens, A's columns are softmaxes of P's.

    The paper takes the softmax over the first index of P = X^T W_q^T W_k X, so its W_k makes what we call queries.
    """
    d, n = X.shape
    P = X.T @ W_q.T @ W_k @ X
    A = torch.softmax((P / math.sqrt(d)).masked_fill(~mask, -math.inf), dim=0)
    Y = W_v @ X @ A
    eye_n = torch.eye(n, dtype=X.dtype)
    J = torch.block_diag(*(torch.diag(a) - torch.outer(a, a) for a in A.T))
    C = torch.zeros(n * d, n * d, dtype=X.dtype)  # C vec(X) = vec(X^T)
    for i in range(d):
        for j in range(n):
            C[i * n + j, j * d + i] = 1
    dP = torch.kron(X.T @ W_k.T @ W_q, eye_n) @ C + torch.kron(eye_n, X.T @ W_q.T @ W_k)
    return Y, torch.kron(A.T.contiguous(), W_v) + torch.kron(eye_n, W_v @ X) @ J @ dP / math.sqrt(d)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_jacobian_formula(causal: bool) -> None:
    """Without a mask against a written-out attention, causal against our Attention module."""
    d, n = 6, 5
    attention = one_head("S1")
    W_k, W_q, W_v = (m.weight.detach() for m in (attention.w_q, attention.w_k, attention.w_v))  # the paper's names
    x_TD = normal((n, d), seed=9)
    visible = torch.ones(n, n, dtype=torch.bool)
    mask = visible.triu() if causal else visible  # column j sees rows i <= j

    def ours(x: Tensor) -> Tensor:
        if causal:
            return attention(x[None])[0]
        return torch.softmax(attention.w_q(x) @ attention.w_k(x).T / math.sqrt(d), dim=1) @ attention.w_v(x)

    Y, formula = dnt_md_jacobian(x_TD.T, W_q, W_k, W_v, mask)
    torch.testing.assert_close(ours(x_TD), Y.T, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(jacobian(ours, x_TD).reshape(n * d, n * d), formula, atol=1e-12, rtol=1e-11)

    columns = []
    step = 1e-4
    for shift in step * torch.eye(n * d, dtype=x_TD.dtype).view(n * d, n, d):
        f = [ours(x_TD + weight * shift).detach().flatten() for weight in (-2, -1, 1, 2)]
        columns.append((f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * step))  # fourth order
    torch.testing.assert_close(torch.stack(columns, dim=1), formula, atol=1e-8, rtol=0)


COLUMN_SCALES = st.lists(SCALE, min_size=5, max_size=5)


@PROPERTY
@given(scales=COLUMN_SCALES)
def test_prop_2_the_jacobian_at_the_normalised_input_ignores_column_norms(scales: list[float]) -> None:
    attention = one_head("S1")
    norm = Norm(6, tiny(norm_eps=TINY_EPS)).double()
    with torch.no_grad():
        norm.gain.copy_(1 + 0.3 * torch.tanh(normal((6,), seed=3)))
    x_TD, s_T1 = normal((5, 6), seed=9), torch.tensor(scales, dtype=torch.float64)[:, None]

    def attend(x: Tensor) -> Tensor:
        return attention(x[None])[0]

    def pre_norm(x: Tensor) -> Tensor:
        return attend(norm(x))

    torch.testing.assert_close(
        jacobian(attend, norm(s_T1 * x_TD).detach()), jacobian(attend, norm(x_TD).detach()), atol=1e-12, rtol=1e-10
    )
    # through the norm, the block of token j is exactly 1/s_j of what it was
    torch.testing.assert_close(jacobian(pre_norm, s_T1 * x_TD) * s_T1, jacobian(pre_norm, x_TD), atol=1e-12, rtol=1e-10)


def test_without_a_norm_the_jacobian_does_depend_on_column_norms() -> None:
    attention, x_TD = one_head("S1"), normal((5, 6), seed=9)
    at_one, at_two = (jacobian(lambda x: attention(x[None])[0], scale * x_TD) for scale in (1, 2))
    assert (at_one - at_two).abs().max() > 0.1


def attention_logits(attention: Attention, x_TD: Tensor) -> Tensor:
    heads = []
    for linear, norm in ((attention.w_q, attention.norm_q), (attention.w_k, attention.norm_k)):
        heads.append(norm(linear(x_TD).view(len(x_TD), attention.heads, -1)).transpose(0, 1))
    return heads[0] @ heads[1].transpose(1, 2) / math.sqrt(heads[0].shape[-1])


@PROPERTY
@given(q=SCALE, k=SCALE)
def test_prop_5_qk_norm_frees_the_logits_derivative_of_weight_norms(q: float, k: float) -> None:
    x_TD = normal((4, 6), seed=9)
    for setting in ("S1", "S2"):
        attention = one_head(setting, norm_eps=TINY_EPS)  # type: ignore[arg-type]

        def logits(x: Tensor, attention: Attention = attention) -> Tensor:
            return attention_logits(attention, x)

        before = jacobian(logits, x_TD)
        assert before.abs().max() > 0.1
        with torch.no_grad():
            attention.w_q.weight.mul_(q)
            attention.w_k.weight.mul_(k)
        factor = q * k if setting == "S1" else 1.0  # the control grows with both norms
        torch.testing.assert_close(jacobian(logits, x_TD), factor * before, atol=1e-12, rtol=1e-10)


@torch.no_grad()
def test_qk_norm_logits_are_sqrt_d_h_times_the_cosine() -> None:
    config = tiny(setting="S2", norm_eps=TINY_EPS)
    attention = busy(config).blocks[0].attn
    d_h = config.width // config.heads
    x_TD = normal((7, config.width), seed=5)
    attention.norm_q.gain.fill_(1)
    attention.norm_k.gain.fill_(1)
    q, k = (m(x_TD).view(7, config.heads, d_h).transpose(0, 1) for m in (attention.w_q, attention.w_k))
    cosine = F.cosine_similarity(q[:, :, None], k[:, None], dim=-1)
    torch.testing.assert_close(attention_logits(attention, x_TD), math.sqrt(d_h) * cosine, atol=1e-12, rtol=1e-12)


# ---------------------------------------------------------------- initial weights


def test_an_initial_tensor_is_a_function_of_seed_and_name_alone() -> None:
    config = tiny()
    shapes = {name: parameter.shape for name, parameter in DNT(config).named_parameters()}
    before = torch.get_rng_state()
    first = {name: initial_tensor(name, shape, config, 7) for name, shape in shapes.items()}
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        for state, (name, shape) in enumerate(reversed(shapes.items())):  # another order, other global states
            torch.manual_seed(state)
            value = initial_tensor(name, shape, config, 7)
            assert value.dtype == torch.float32 and torch.equal(value, first[name]), name
    model = DNT(config)
    init_weights(model, 7)
    assert all(torch.equal(parameter, first[name]) for name, parameter in model.named_parameters())


def test_initial_tensors_differ_by_name_and_seed_and_not_by_setting() -> None:
    config = tiny()
    shape = torch.Size((24, 24))
    names = [f"blocks.{layer}.attn.w_{letter}.weight" for layer in range(3) for letter in "qkv"]
    drawn = [initial_tensor(name, shape, config, seed) for name in names for seed in (0, 1, 2**63)]
    flat = torch.stack(drawn).flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(len(drawn))
    assert correlation.abs().max() < 5 / math.sqrt(flat.shape[1])
    # the twin of a DNT starts from the same matrices
    gpt = tiny(setting="S1")
    assert all(torch.equal(initial_tensor(n, shape, config, 3), initial_tensor(n, shape, gpt, 3)) for n in names)


def test_initial_scales_are_nano_gpts() -> None:
    config = preset("dnt_124m")
    square = torch.Size((768, 768))
    small = 0.02 / math.sqrt(2 * 12)
    stds = {
        "tok_emb.weight": 0.02,
        "pos_emb.weight": 0.02,
        "blocks.0.attn.w_q.weight": 0.02,
        "blocks.11.attn.w_v.weight": 0.02,
        "blocks.3.ffn.w_1.weight": 0.02,
        "blocks.3.attn.w_o.weight": small,
        "blocks.3.ffn.w_2.weight": small,
        "head.weight": 0.02,
    }
    for name, std in stds.items():
        value = initial_tensor(name, square, config, 1234).double()
        assert float(value.std()) == pytest.approx(std, rel=5e-3), name  # five standard errors
        assert abs(float(value.mean())) < 5 * std / 768, name
        kurtosis = float(((value - value.mean()) / value.std()).pow(4).mean())
        assert kurtosis == pytest.approx(3, abs=0.04), name
    unscaled = config.model_copy(update={"residual_init_scaled": False, "init_std": 0.1, "gain_init": 0.7})
    assert float(initial_tensor("blocks.3.ffn.w_2.weight", square, unscaled, 0).std()) == pytest.approx(0.1, rel=5e-3)
    assert torch.equal(initial_tensor("norm_in.gain", torch.Size((5,)), unscaled, 0), torch.full((5,), 0.7))
    assert torch.equal(initial_tensor("norm_in.gain", torch.Size((5,)), config, 0), torch.ones(5))
    assert torch.equal(initial_tensor("blocks.0.ffn.w_1.bias", torch.Size((5,)), config, 0), torch.zeros(5))


GOLDEN_WEIGHTS = {
    "tok_emb.weight": [-0.0275689829, -0.000405767671, -0.00744901737, -0.0353306346],
    "blocks.0.attn.w_q.weight": [0.0269289184, -0.0189475883, -0.00611390639, -0.00985973142],
    "blocks.2.ffn.w_2.weight": [-0.00654707011, 0.00335020479, 0.00237549772, -0.000904477143],
}
GOLDEN_LOSSES: dict[Setting, float] = {"S1": 3.352856, "S2": 3.353352, "S3": 3.352672, "S4": 3.391563, "S5": 3.392473}


def test_initial_weights_are_what_they_were() -> None:
    """A change here means that old runs cannot be repeated: change it knowingly."""
    for name, expected in GOLDEN_WEIGHTS.items():
        value = initial_tensor(name, torch.Size((4, 24)), tiny(), 1234)
        torch.testing.assert_close(value[0, :4], torch.tensor(expected), atol=2e-8, rtol=0)


@pytest.mark.parametrize("setting", SETTINGS)
@torch.no_grad()
def test_initial_loss_is_what_it_was(setting: Setting) -> None:
    config = tiny(setting=setting)
    model = DNT(config)
    init_weights(model, 1234)
    tokens = (torch.arange(24) * 7 % 29).view(2, 12)
    loss = model(tokens, (tokens * 5 + 3) % 29) / 24
    assert float(loss) == pytest.approx(GOLDEN_LOSSES[setting], abs=1e-5)


# ---------------------------------------------------------------- documents in a row

EOS = 5


def documents_in_a_row(config: ModelConfig) -> tuple[list[Tensor], Tensor]:
    """Documents, each behind its eos but the first, which begins in the row before; and the two rows of them."""
    tokens = random_tokens(config, 1, 24)[0]
    tokens[tokens == EOS] += 1
    for begin in (4, 5, 9, 12, 19):  # one document is empty, and the second row begins with a document
        tokens[begin] = EOS
    documents = [tokens[a:b] for a, b in zip((0, 4, 5, 9, 12, 19), (4, 5, 9, 12, 19, 24), strict=True)]
    return documents, tokens.view(2, 12)


@pytest.mark.parametrize("variant", ["as is", "no positions", "untied head"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_masked_documents_are_as_if_each_were_alone(setting: Setting, variant: str) -> None:
    config = tiny(setting=setting, **VARIANTS[variant])
    masked, plain = busy(config, torch.float32), busy(config, torch.float32)
    masked.document_eos = EOS
    documents, rows = documents_in_a_row(config)
    logits = masked(rows).flatten(0, 1)
    alone = torch.cat([plain(document[None])[0] for document in documents])
    torch.testing.assert_close(logits, alone, atol=1e-5 * max(1.0, float(alone.detach().std())), rtol=0)
    assert (plain(rows).flatten(0, 1) - alone).abs().max() > 0.1

    weights = normal(logits.shape, 3, torch.float32)
    (logits * weights).sum().backward()
    (alone * weights).sum().backward()
    for (name, ours), theirs in zip(masked.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm(), name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.sampled_from([EOS, 1, 2, 3]), min_size=9, max_size=9), min_size=1, max_size=3))
def test_the_layout_of_documents_by_hand(rows: list[list[int]]) -> None:
    positions_BT, mask_B1TT = document_layout(torch.tensor(rows), EOS)
    for row, positions_T, mask_TT in zip(rows, positions_BT.tolist(), mask_B1TT[:, 0].tolist(), strict=True):
        begin = 0
        for place, token in enumerate(row):
            begin = place if token == EOS else begin
            assert positions_T[place] == place - begin
            assert mask_TT[place] == [begin <= other <= place for other in range(9)]


@torch.no_grad()
def test_without_an_eos_in_the_row_masking_changes_nothing() -> None:
    config = tiny()
    masked, plain = busy(config), busy(config)
    masked.document_eos = config.vocab_size  # no token has it
    tokens = random_tokens(config, 2, 12)
    torch.testing.assert_close(masked(tokens), plain(tokens), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_blocks_keep_one_mask(dtype: torch.dtype) -> None:
    config = tiny(layers=4)
    masked = busy(config, dtype)
    masked.document_eos = EOS
    _, rows = documents_in_a_row(config)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape == (2, 1, 12, 12):
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        masked(rows)
    assert len(kept) == config.layers  # else this looks for another shape than attention keeps
    assert {tensor.dtype for tensor in kept} == {dtype}
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept}) == 1


def test_masked_documents_in_bf16() -> None:
    config = tiny()
    masked = busy(config, torch.bfloat16)
    masked.document_eos = EOS
    _, rows = documents_in_a_row(config)
    loss = masked(rows[:, :-1], rows[:, 1:])
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in masked.parameters())
    exact = busy(config)
    exact.document_eos = EOS
    with torch.no_grad():
        assert float(loss.detach()) == pytest.approx(float(exact(rows[:, :-1], rows[:, 1:])), rel=0.05)
