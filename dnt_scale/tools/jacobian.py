"""Jacobians of a model's blocks at the rows it reads: their spectrum, and the paper's propositions.

A block maps (rows, T, D) to the same shape, each row for itself. Derivatives are exact: forward
mode for J v, reverse mode for J^T u, in the dtype of the weights.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dnt_scale.model.batch import Batch
from dnt_scale.model.block import Block
from dnt_scale.model.documents import Documents
from dnt_scale.model.task import Task

Function = Callable[[Tensor], Tensor]

MOST_EXPLICIT = 1024  # columns of a Jacobian that is written out; above, its largest values alone
ROWS_AT_ONCE = 64
LANCZOS_STEPS = 24


@contextmanager
def differentiable() -> Iterator[None]:
    """Compute attention by the one kernel that has derivatives in forward mode."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def block_inputs(task: Task, batch: Batch) -> list[tuple[nn.Module, tuple[Any, ...]]]:
    """Return each block with the arguments it is called with where the model is measured on a
    batch, the first a tensor: no row skips a block, as some do in training.

    Where documents are among them, they are such as hold for copies of the row too, and for
    derivatives in forward mode on any device.
    """
    found: list[tuple[nn.Module, tuple[Any, ...]]] = []

    def keep(module: nn.Module, given: tuple[Any, ...]) -> None:
        plain = (
            Documents(each.begin_BT) if isinstance(each, Documents) else each for each in given
        )
        found.append((module, tuple(plain)))

    hooks = [block.register_forward_pre_hook(keep) for block in task.blocks]
    try:
        with torch.no_grad():
            task.eval_sums(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def jacobian(function: Function, x_1TD: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return d function(x)[tokens] / d x[tokens], the other tokens of x held: (n D, n D), n tokens.

    Row i, column j: how output i moves with input j, both counted token by token.
    """
    _, length, width = x_1TD.shape
    places = [(token, column) for token in tokens for column in range(width)]
    columns = []
    with differentiable():
        for start in range(0, len(places), ROWS_AT_ONCE):
            some = places[start : start + ROWS_AT_ONCE]
            tangents = x_1TD.new_zeros(len(some), length, width)
            for row, (token, column) in enumerate(some):
                tangents[row, token, column] = 1.0
            moved = forward(function, x_1TD.repeat(len(some), 1, 1), tangents)
            columns.append(moved[:, list(tokens)].flatten(1))
    return torch.cat(columns).T


def forward(function: Function, x: Tensor, direction: Tensor) -> Tensor:
    """Return J v of a function at x, in a direction of its shape."""
    with differentiable():
        moved = torch.func.jvp(function, (x,), (direction,))[1]
    assert isinstance(moved, Tensor)
    return moved.detach()


def largest_singular_values(
    function: Function, x: Tensor, steps: int = LANCZOS_STEPS, seed: int = 0
) -> Tensor:
    """Return singular values of the Jacobian at x of all of the function: the largest are right.

    Golub and Kahan's bidiagonalization, orthogonalised anew at each step (Golub, Van Loan: Matrix
    Computations, 10.4), from a random vector of the seed.

    Returns:
        float64 (at most steps,), descending; the first converges first.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(x.numel(), generator=generator).to(x).double()
    with differentiable():
        back = torch.func.vjp(function, x)[1]

    def along(direction: Tensor) -> Tensor:
        return forward(function, x, direction.to(x).view_as(x)).double().flatten()

    def against(direction: Tensor) -> Tensor:
        moved: Tensor = back(direction.to(x).view_as(x))[0]
        return moved.detach().double().flatten()

    lefts: list[Tensor] = []
    rights = [v / v.norm()]
    diagonal, beside = [], []
    for _ in range(min(steps, x.numel())):
        u = orthogonal(along(rights[-1]), lefts)
        diagonal.append(float(u.norm()))
        if diagonal[-1] < 1e-12:
            break
        lefts.append(u / diagonal[-1])
        v = orthogonal(against(lefts[-1]), rights)
        beside.append(float(v.norm()))
        if beside[-1] < 1e-6 * diagonal[0]:
            break
        rights.append(v / beside[-1])
    size = len(diagonal)
    bidiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if size > 1:
        upper = torch.tensor(beside[: size - 1], dtype=torch.float64)
        bidiagonal += torch.diag(upper, 1)
    values: Tensor = torch.linalg.svdvals(bidiagonal)
    return values


def orthogonal(vector: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """Return what of a vector is orthogonal to an orthonormal basis, taken out twice."""
    for _ in range(2):
        for known in basis:
            vector = vector - (vector @ known) * known
    return vector


def spectrum(function: Function, x_1TD: Tensor, token: int) -> dict[str, float | None]:
    """Return largest, median and smallest singular value, and largest / smallest, of the D x D
    Jacobian at a token; of a wide block the largest alone.
    """
    if x_1TD.shape[-1] <= MOST_EXPLICIT:
        values = torch.linalg.svdvals(jacobian(function, x_1TD, [token]).double())
        largest, smallest = float(values[0]), float(values[-1])
        condition = largest / smallest if smallest else None
        middle = float(values.median())
        return {"largest": largest, "median": middle, "smallest": smallest, "condition": condition}

    def one(x_D: Tensor) -> Tensor:
        around = x_1TD.clone()
        around[0, token] = x_D
        return function(around)[0, token]

    values = largest_singular_values(one, x_1TD[0, token].clone())
    return {"largest": float(values[0]), "median": None, "smallest": None, "condition": None}


# --- the paper's propositions ---------------------------------------------------------------------


def propositions(block: Block, x_1TD: Tensor, seed: int = 0) -> dict[str, float]:
    """Return by how much Jacobians of a block change where the paper says that they do not.

    Each is |J' v - J v| / |J v| in a random direction v, 0 but for rounding and the norms' eps
    where the proposition holds (dnt.md, Propositions):

    - ``qk_scale`` (Prop. 5): d logits / dx, with W_q and W_k doubled. 0 with QKNorm, 3 without.
    - ``attention_input_scale`` and ``ffn_input_scale`` (Prop. 2): of each sub-layer at its
      normalised input, when every token's vector is multiplied by a number of its own between 1/2
      and 2 before that. 0 where a norm stands before the sub-layer: not the FFN of S5.
    """
    generator = torch.Generator().manual_seed(seed)
    v_1TD = torch.randn(x_1TD.shape, generator=generator).to(x_1TD)
    scales_1T1 = (4.0 ** torch.rand(1, x_1TD.shape[1], 1, generator=generator) / 2.0).to(x_1TD)
    attention, scaled = block.attn, x_1TD * scales_1T1

    def logits(scale: float) -> Function:
        def of(x: Tensor) -> Tensor:
            z = block.norm_pre1(x)
            q = attention.queries(scale * attention.w_q(z))
            k = attention.keys(scale * attention.w_k(z))
            result: Tensor = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            return result

        return of

    def moved_by_scales(layer: nn.Module, norm: nn.Module) -> float:
        with torch.no_grad():
            one, other = norm(x_1TD), norm(scaled)
        return relative(forward(layer, other, v_1TD), forward(layer, one, v_1TD))

    doubled = forward(logits(2.0), x_1TD, v_1TD)
    return {
        "qk_scale": relative(doubled, forward(logits(1.0), x_1TD, v_1TD)),
        "attention_input_scale": moved_by_scales(attention, block.norm_pre1),
        "ffn_input_scale": moved_by_scales(block.ffn, block.norm_pre2),
    }


def relative(changed: Tensor, before: Tensor) -> float:
    """Return |changed - before| / |before|."""
    return float((changed - before).norm() / before.norm())
