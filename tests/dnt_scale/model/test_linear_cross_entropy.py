"""The loss without logits is the loss written out, in value and in every gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnt_scale.distributed import device_metrics
from dnt_scale.model import dnt, linear_cross_entropy
from dnt_scale.model.batch import IGNORED
from dnt_scale.model.init import init_weights
from testbed.plain_cross_entropy import plain_cross_entropy
from tests.helpers.models import VARIANTS, busy, normal, random_tokens, tiny

ROWS, WIDTH, VOCAB = 37, 16, 61
OPTIONS: dict[str, dict[str, Any]] = {
    "as is": {},
    "padding": {"padding": 3},
    "cap": {"logit_cap": 1.5},
    "z-loss": {"z_loss": 0.1},
    "all": {"padding": 7, "logit_cap": 1.5, "z_loss": 0.1},
}
ours = linear_cross_entropy.linear_cross_entropy
Loss = Callable[..., tuple[Tensor, Tensor]]


def pieces_of(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(linear_cross_entropy, "PIECE_ROWS", {"cpu": rows, "cuda": rows})
    monkeypatch.setattr(linear_cross_entropy, "CONVERTED_ROWS", 8)


def inputs(
    dtype: torch.dtype, rows: int = ROWS, vocab: int = VOCAB, padding: int = 0, ignored: bool = True
) -> list[Tensor]:
    """x, head and targets, of logits of some nats, every fifth of no target."""
    x_ND, head_RD = normal((rows, WIDTH), 0), normal((vocab + padding, WIDTH), 1)
    targets_N = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(2))
    if ignored:
        targets_N[::5] = IGNORED
    return [x_ND.to(dtype).requires_grad_(), head_RD.to(dtype).requires_grad_(), targets_N]


def with_gradients(
    loss: Loss, given: list[Tensor], vocab: int = VOCAB, scale: float = 0.3, **options: Any
) -> list[Tensor]:
    """The loss, its z-loss, and its gradients times `scale`."""
    found, z_part = loss(*given, vocab, **options)
    wanted = [tensor for tensor in given if tensor.requires_grad]
    return [found.detach(), z_part.detach(), *torch.autograd.grad(found * scale, wanted)]


def error(found: Tensor, right: Tensor) -> float:
    """The norm of the difference, as a part of the right one's; 0 of zeros that are found."""
    difference = float((found.double() - right.double()).norm())
    return difference and difference / float(right.double().norm())


class Operations(TorchDispatchMode):
    """Keeps which operations made tensors inside, and their numbers of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        leaves = tree_leaves(result)
        self.made += [(name, leaf.numel()) for leaf in leaves if isinstance(leaf, Tensor)]
        return result

    def products(self) -> int:
        return sum(name in ("mm", "addmm_") for name, _ in self.made)


@pytest.mark.parametrize("rows", [1, 4, 256])
@pytest.mark.parametrize("ignored", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_plain_loss(dtype, name, ignored, rows, monkeypatch) -> None:
    pieces_of(monkeypatch, rows)
    options = dict(OPTIONS[name])
    given = inputs(dtype, padding=options.pop("padding", 0), ignored=ignored)
    found = with_gradients(ours, given, **options)
    right = with_gradients(plain_cross_entropy, given, **options)
    assert float(right[0]) > 10
    for one, other in zip(found, right, strict=True):
        assert one.dtype == other.dtype == dtype
        assert error(one, other) < (1e-6 if dtype == torch.float32 else 1e-14)
    assert not found[3][VOCAB:].any()


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_those_of_finite_differences(name, monkeypatch) -> None:
    pieces_of(monkeypatch, 3)
    options = dict(OPTIONS[name])
    given = inputs(torch.float64, padding=options.pop("padding", 0))
    *_, grad_x_ND, grad_head_RD = with_gradients(ours, given, scale=1.0, **options)
    steps = normal(given[0].shape, 5), normal(given[1].shape, 6)
    expected = (steps[0] * grad_x_ND).sum() + (steps[1] * grad_head_RD).sum()

    @torch.no_grad()
    def loss_at(distance: float) -> Tensor:
        moved = (tensor + distance * step for tensor, step in zip(given[:2], steps, strict=True))
        return ours(*moved, given[2], VOCAB, **options)[0]

    found = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    assert float(found) == pytest.approx(float(expected), rel=1e-7)


@pytest.mark.parametrize("name", OPTIONS)
def test_in_bf16_it_is_as_right_as_the_plain_loss(name, monkeypatch) -> None:
    """However many pieces the gradient of the head is summed from."""
    pieces_of(monkeypatch, 4)
    options = dict(OPTIONS[name])
    given = inputs(torch.bfloat16, rows=301, padding=options.pop("padding", 0))
    exact = [
        tensor.detach().double().requires_grad_() if tensor.is_floating_point() else tensor
        for tensor in given
    ]
    right = with_gradients(plain_cross_entropy, exact, **options)
    found = with_gradients(ours, given, **options)
    plain = with_gradients(plain_cross_entropy, given, **options)
    for one, other, exactly in zip(found, plain, right, strict=True):
        assert one.dtype == other.dtype
        assert error(one, exactly) <= 1.25 * error(other, exactly) + 1e-4


@pytest.mark.parametrize("name", ["as is", "untied head", "capped logits", "everything"])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_every_gradient_of_a_model_is_that_of_the_plain_loss(name, z_loss, monkeypatch) -> None:
    """A tied head's is added to the embedding's."""
    section = tiny(**VARIANTS[name] | {"z_loss": z_loss})
    batch = random_tokens(section, 3, 13)
    batch[1, 6:] = IGNORED
    pieces_of(monkeypatch, 5)
    results = []
    for loss in (ours, plain_cross_entropy):
        monkeypatch.setattr(dnt, "linear_cross_entropy", loss)
        model = dnt.DNT(section)
        init_weights(model, 3)
        model.init_buffers()
        device_metrics.take(torch.device("cpu"))
        total = model.loss_sum(batch)
        names, recorded = device_metrics.take(torch.device("cpu"))
        (total * 0.1).backward()
        measured = model.eval_sums(batch)["loss"]
        assert names == ["train/z_loss"] * bool(z_loss)
        results.append(
            {name: weight.grad for name, weight in model.named_parameters()}
            | {"loss": total.detach(), "measured": measured.detach(), "recorded": recorded}
        )
    found, right = results
    assert found.keys() == right.keys()
    for name, one in found.items():
        assert error(one, right[name]) < 2e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_no_tensor_has_the_logits_of_more_rows_than_a_piece(dtype, name, monkeypatch) -> None:
    pieces_of(monkeypatch, 4)
    options = dict(OPTIONS[name])
    given = inputs(dtype, rows=400, padding=options.pop("padding", 0))
    most = max(tensor.numel() for tensor in given)
    with Operations() as seen:
        with_gradients(ours, given, **options)
    assert most < 400 * VOCAB / 2
    assert max(elements for _, elements in seen.made) <= most


def test_what_is_not_asked_for_is_not_computed(monkeypatch) -> None:
    pieces_of(monkeypatch, 10)
    x_ND, head_RD, targets_N = inputs(torch.float32, rows=40, ignored=False)

    def products(*given: Tensor) -> int:
        with Operations() as seen:
            ours(*given, VOCAB)
        return seen.products()

    assert products(x_ND, head_RD, targets_N) == 4 * 3
    assert products(x_ND.detach(), head_RD, targets_N) == 4 * 2
    assert products(x_ND, head_RD.detach(), targets_N) == 4 * 2
    with torch.no_grad():
        assert products(x_ND, head_RD, targets_N) == 4


@pytest.mark.parametrize("wanted", [0, 1])
def test_the_gradient_of_one_of_the_two_alone(wanted) -> None:
    given = inputs(torch.float32)
    both = with_gradients(ours, given)
    given[1 - wanted].requires_grad_(False)
    assert torch.equal(with_gradients(ours, given)[2], both[2 + wanted])


def test_rows_without_any_target() -> None:
    given = inputs(torch.float32)
    given[2].fill_(IGNORED)
    loss, z_part, *gradients = with_gradients(ours, given, z_loss=0.1)
    assert loss == 0 == z_part
    assert [gradient.shape for gradient in gradients] == [(ROWS, WIDTH), (VOCAB, WIDTH)]
    assert not any(gradient.any() for gradient in gradients)


def test_a_loss_that_is_not_finite_is_seen() -> None:
    given = inputs(torch.float32)
    with torch.no_grad():
        given[0][1, 0] = torch.inf
    assert not with_gradients(ours, given)[0].isfinite()


def test_a_second_backward_is_refused() -> None:
    """The first one has scaled the gradients where they lie."""
    loss = ours(*inputs(torch.float32), VOCAB)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_host_need_not_know_which_rows_count() -> None:
    """A fake tensor has no values that anything could wait for."""
    with FakeTensorMode():
        given = [torch.empty(9, 4), torch.empty(7, 4), torch.empty(9, dtype=torch.int64)]
        for tensor in given[:2]:
            tensor.requires_grad_()
        found = with_gradients(ours, given, vocab=6, logit_cap=1.0, z_loss=0.1)
    assert [tensor.shape for tensor in found] == [(), (), (9, 4), (7, 4)]


def test_a_model_of_float64_computes_in_float64() -> None:
    section = tiny()
    model, batch = busy(section), random_tokens(section, 2, 13)
    assert model.loss_sum(batch).dtype == torch.float64
