"""What dnt.md proves of norms: scale-free weights, and the Jacobian of attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.functional import jacobian

from dnt_scale.config import ModelConfig, Setting
from dnt_scale.model.block import SETTINGS, Attention, FeedForward, Norm
from dnt_scale.model.dnt import DNT
from dnt_scale.model.init import initial_tensor
from tests.helpers.models import MATRICES, VARIANTS, busy, mean_loss, normal, random_tokens, tiny

PROPERTY = settings(max_examples=12, deadline=None, derandomize=True)
SCALE = st.floats(0.1, 10)
# the scale invariances are exact up to eps, so this makes them exact up to rounding
TINY_EPS = 1e-30


# ---------------------------------------------------------------- scale invariance (dnt.md, [R])


@torch.no_grad()
def rescale(model: DNT, scales: dict[str, list[float] | float]) -> None:
    """Multiply matrices of every block; a list has one factor a head, on that head's rows."""
    for block in model.blocks:
        for name, scale in scales.items():
            weight = block.get_parameter(f"{name}.weight")
            if isinstance(scale, list):
                scale_rows = torch.tensor(scale, dtype=weight.dtype).repeat_interleave(
                    len(weight) // len(scale)
                )
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
def test_qk_norm_makes_each_heads_wq_and_wk_scale_free(
    setting: Setting, q: list[float], k: list[float]
) -> None:
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
    # W_1 alone is not exact
    assert change(gelu, {"attn.w_v": v, "attn.w_o": o, "ffn.w_2": w_2}) < 1e-11


SCALE_FREE: dict[Setting, set[str]] = {
    "S1": set(),
    "S2": {"attn.w_q", "attn.w_k"},
    "S3": {"attn.w_q", "attn.w_k"},
    "S4": MATRICES,
    "S5": MATRICES,
    "peri": {"attn.w_v", "attn.w_o", "ffn.w_1", "ffn.w_2"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_exactly_these_matrices_are_scale_free(setting: Setting) -> None:
    config = tiny(setting=setting, norm_eps=TINY_EPS, activation="relu")
    changes = {name: change(config, {name: 2.7}) for name in MATRICES}
    assert {name for name, moved in changes.items() if moved < 1e-11} == SCALE_FREE[setting]
    assert all(moved > 0.05 for name, moved in changes.items() if name not in SCALE_FREE[setting])


def test_rotary_positions_shared_heads_and_a_gate_leave_matrices_scale_free() -> None:
    """A gate is linear in W_3, so with a MidNorm that one is scale-free beside W_2."""
    variant = VARIANTS["everything"] | {"norm_eps": TINY_EPS}
    for setting, free in SCALE_FREE.items():
        config = tiny(setting=setting, **variant)
        changes = {name: change(config, {name: 2.7}) for name in MATRICES | {"ffn.w_3"}}
        expected = (free - {"ffn.w_1"}) | ({"ffn.w_3"} if "ffn.w_2" in free else set())
        assert {name for name, moved in changes.items() if moved < 1e-11} == expected


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
def test_the_gradient_is_orthogonal_to_scale_free_weights_and_shrinks_with_their_scale(
    setting: Setting,
) -> None:
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
            weight, gradient = (
                block.get_parameter(f"{name}.weight"),
                first[f"blocks.{layer}.{name}.weight"],
            )
            factor = float(factors.get(name, 1.0))  # type: ignore[arg-type]
            heads = config.heads if name in ("attn.w_q", "attn.w_k") else 1
            products = (weight * gradient).view(heads, -1).sum(1)  # per head under QKNorm
            assert (products.abs() <= 1e-12 * weight.norm() * gradient.norm()).all(), name
            torch.testing.assert_close(weight.grad * factor, gradient, atol=1e-13, rtol=1e-9)


@torch.no_grad()
def test_gelu_is_scale_free_in_w1_only_roughly() -> None:
    """dnt.md's "within about 5 %": the direction of the FFN's output, which is all that MidNorm
    keeps, at width 768 from the initial weights and a unit-RMS input turns by 6 to 7 % when W_1
    grows or shrinks by a quarter, and by 17 to 21 % at a factor of two. W_2 is exact."""
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


# ---------------------------------------------------------------- Jacobians (dnt.md, [R] and Props.
# 2, 5)


def one_head(setting: Setting, width: int = 6, **changes: object) -> Attention:
    """Our Attention with one head, W_o = I and busy weights, so that its output is A V."""
    attention = Attention(tiny(setting=setting, width=width, heads=1, **changes)).double()
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(attention.named_parameters()):
            value = normal(parameter.shape, seed)
            parameter.copy_(1 + 0.3 * torch.tanh(value) if name.endswith("gain") else 0.6 * value)
        attention.w_o.weight.copy_(torch.eye(width))
    return attention


def dnt_md_jacobian(
    X: Tensor, W_q: Tensor, W_k: Tensor, W_v: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Y = W_v X A and dvec(Y)/dvec(X) as dnt.md writes them; columns are tokens, A's columns are
    softmaxes of P's.

    The paper takes the softmax over the first index of P = X^T W_q^T W_k X, so its W_k makes what
    we call queries.
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
    # the paper's names
    W_k, W_q, W_v = (m.weight.detach() for m in (attention.w_q, attention.w_k, attention.w_v))
    x_TD = normal((n, d), seed=9)
    visible = torch.ones(n, n, dtype=torch.bool)
    mask = visible.triu() if causal else visible  # column j sees rows i <= j

    def ours(x: Tensor) -> Tensor:
        if causal:
            return attention(x[None])[0]
        return torch.softmax(
            attention.w_q(x) @ attention.w_k(x).T / math.sqrt(d), dim=1
        ) @ attention.w_v(x)

    Y, formula = dnt_md_jacobian(x_TD.T, W_q, W_k, W_v, mask)
    torch.testing.assert_close(ours(x_TD), Y.T, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(
        jacobian(ours, x_TD).reshape(n * d, n * d), formula, atol=1e-12, rtol=1e-11
    )

    columns = []
    step = 1e-4
    for shift in step * torch.eye(n * d, dtype=x_TD.dtype).view(n * d, n, d):
        f = [ours(x_TD + weight * shift).detach().flatten() for weight in (-2, -1, 1, 2)]
        columns.append((f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * step))  # fourth order
    torch.testing.assert_close(torch.stack(columns, dim=1), formula, atol=1e-8, rtol=0)


COLUMN_SCALES = st.lists(SCALE, min_size=5, max_size=5)


@PROPERTY
@given(scales=COLUMN_SCALES)
def test_prop_2_the_jacobian_at_the_normalised_input_ignores_column_norms(
    scales: list[float],
) -> None:
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
        jacobian(attend, norm(s_T1 * x_TD).detach()),
        jacobian(attend, norm(x_TD).detach()),
        atol=1e-12,
        rtol=1e-10,
    )
    # through the norm, the block of token j is exactly 1/s_j of what it was
    torch.testing.assert_close(
        jacobian(pre_norm, s_T1 * x_TD) * s_T1, jacobian(pre_norm, x_TD), atol=1e-12, rtol=1e-10
    )


def test_without_a_norm_the_jacobian_does_depend_on_column_norms() -> None:
    attention, x_TD = one_head("S1"), normal((5, 6), seed=9)
    at_one, at_two = (jacobian(lambda x: attention(x[None])[0], scale * x_TD) for scale in (1, 2))
    assert (at_one - at_two).abs().max() > 0.1


def attention_logits(attention: Attention, x_TD: Tensor) -> Tensor:
    heads = []
    for linear, norm in ((attention.w_q, attention.norm_q), (attention.w_k, attention.norm_k)):
        heads.append(norm(linear(x_TD).view(len(x_TD), -1, attention.head_size)).transpose(0, 1))
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
    q, k = (
        m(x_TD).view(7, config.heads, d_h).transpose(0, 1) for m in (attention.w_q, attention.w_k)
    )
    cosine = F.cosine_similarity(q[:, :, None], k[:, None], dim=-1)
    torch.testing.assert_close(
        attention_logits(attention, x_TD), math.sqrt(d_h) * cosine, atol=1e-12, rtol=1e-12
    )
