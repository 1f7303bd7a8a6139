"""Jacobians of blocks against autograd, the attention's against its closed form, propositions."""

import pytest
import torch

from dnt_scale.config import load
from dnt_scale.model.block import SETTINGS
from dnt_scale.model.dnt import DNT
from dnt_scale.model.init import init_weights
from dnt_scale.tools.jacobian import (
    MOST_EXPLICIT,
    block_inputs,
    jacobian,
    largest_singular_values,
    propositions,
    spectrum,
)

T, D, HEADS = 5, 16, 2


def model(setting, heads=HEADS):
    chosen = [f"model.setting={setting}", "model.layers=2", f"model.width={D}", "model.context=8"]
    chosen += [f"model.heads={heads}", "model.vocab_size=32", "model.norm_eps=1e-12"]
    task = DNT(load(["model=dnt_nano", *chosen, "data.path=unused", "run.name=x"]).model)
    init_weights(task, 3)
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            if "weight" in name:
                parameter.mul_(10.0)  # at 0.02 all blocks are nearly the identity
    return task.double()


def rows(seed=1):
    return torch.randn(1, T, D, generator=torch.Generator().manual_seed(seed)).double()


def by_autograd(function, x):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.jacobian(function, x).reshape(T * D, T * D)


@pytest.mark.parametrize("setting", ["S1", "S5"])
def test_a_block_against_autograd(setting):
    block = model(setting).blocks[1]
    x = rows()
    whole = by_autograd(block, x)
    torch.testing.assert_close(jacobian(block, x, range(T)), whole)
    at_token = whole.view(T, D, T, D)[3, :, 3]
    torch.testing.assert_close(jacobian(block, x, [3]), at_token)
    values = torch.linalg.svdvals(at_token)
    found = spectrum(block, x, 3)
    assert found["largest"] == pytest.approx(float(values[0]))
    assert found["smallest"] == pytest.approx(float(values[-1]))
    assert found["condition"] == pytest.approx(float(values[0] / values[-1]))


def test_the_largest_values_without_the_matrix(monkeypatch):
    block, x = model("S4").blocks[0], rows()
    exact = torch.linalg.svdvals(by_autograd(block, x))
    assert float(largest_singular_values(block, x)[0]) == pytest.approx(float(exact[0]), rel=1e-6)
    torch.testing.assert_close(largest_singular_values(block, x, steps=T * D), exact)
    explicit = spectrum(block, x, 2)
    monkeypatch.setattr("dnt_scale.tools.jacobian.MOST_EXPLICIT", D - 1)
    wide = spectrum(block, x, 2)
    assert wide["largest"] == pytest.approx(explicit["largest"]) and wide["smallest"] is None
    assert MOST_EXPLICIT > D


def test_attention_against_the_closed_form():
    """docs/dnt.md, of one head without a mask: X is (D, T), its columns the tokens."""
    attention = model("S1", heads=1).blocks[0].attn
    w_q, w_k, w_v = (getattr(attention, name).weight.detach() for name in ("w_q", "w_k", "w_v"))
    x = rows()
    X = x[0].T

    def unmasked(z):
        return (w_v @ z[0].T @ torch.softmax(z[0] @ w_k.T @ w_q @ z[0].T / D**0.5, dim=0)).T[None]

    A = torch.softmax(X.T @ w_k.T @ w_q @ X / D**0.5, dim=0)  # column j: whom token j attends to
    J = torch.block_diag(*(torch.diag(a) - torch.outer(a, a) for a in A.T))
    C = torch.zeros(T * D, T * D, dtype=torch.float64)  # vec(X) to vec(X^T)
    for d in range(D):
        for t in range(T):
            C[d * T + t, t * D + d] = 1.0
    kron, one = torch.kron, torch.eye(T, dtype=torch.float64)
    inner = kron((X.T @ w_q.T @ w_k).contiguous(), one) @ C + kron(
        one, (X.T @ w_k.T @ w_q).contiguous()
    )
    formula = kron(A.T.contiguous(), w_v) + kron(one, w_v @ X) @ J @ inner / D**0.5
    torch.testing.assert_close(jacobian_of(unmasked, x), formula)
    # and the model's own, causal: the same with the softmax over what a token may see
    hidden = torch.full((T, T), -torch.inf).double().tril(-1)
    A = torch.softmax(X.T @ w_k.T @ w_q @ X / D**0.5 + hidden, dim=0)
    J = torch.block_diag(*(torch.diag(a) - torch.outer(a, a) for a in A.T))
    formula = kron(A.T.contiguous(), w_v) + kron(one, w_v @ X) @ J @ inner / D**0.5
    with_w_o = kron(one, attention.w_o.weight.detach()) @ formula
    torch.testing.assert_close(jacobian(attention, x, range(T)), with_w_o)


def jacobian_of(function, x):
    return torch.autograd.functional.jacobian(function, x).reshape(T * D, T * D)


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_setting_has_the_propositions_that_its_norms_give(setting):
    found = propositions(model(setting).blocks[1], rows())
    norms = SETTINGS[setting]
    assert found["qk_scale"] == pytest.approx(0.0 if norms.qk else 3.0, abs=1e-6)
    assert found["attention_input_scale"] < 1e-6
    assert (found["ffn_input_scale"] < 1e-6) == norms.pre_ffn
    assert norms.pre_ffn or found["ffn_input_scale"] > 0.05


def test_blocks_get_what_the_model_gives_them():
    task = model("S5")
    batch = torch.arange(9)[None] % 32
    (first, (x, mask, *_)), (second, (y, *_)) = block_inputs(task, batch)
    assert [first, second] == list(task.blocks) and mask is None
    torch.testing.assert_close(first(x), y)
    assert not task.blocks[0]._forward_pre_hooks


def test_a_block_of_documents_has_the_jacobian_of_each_document_alone():
    task = model("S4")
    task.document_eos = 7
    batch = torch.tensor([[1, 2, 7, 3, 4, 5]])  # the second document begins at the third token
    block, (x, *more) = block_inputs(task, batch)[1]
    masked = jacobian(lambda z: block(z, *more), x, [2, 3, 4])
    alone = jacobian(block, x[:, 2:], [0, 1, 2])
    torch.testing.assert_close(masked, alone)
    unmasked = jacobian(block, x, [2, 3, 4])
    assert (unmasked - alone).norm() > 1e-3 * alone.norm()
