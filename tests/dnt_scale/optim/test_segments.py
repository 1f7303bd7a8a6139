"""Row-normalised updates of flat partitions, as ZeRO makes them, on real ranks, against those of
whole matrices.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dnt_scale.distributed import process_group
from dnt_scale.optim.segments import Division, Segment
from testbed.run import call
from tests.helpers.optimizers import new_msgdw

SHAPES = [(5, 7), (1, 40), (3, 2), (11, 3)]
STEPS = 4


def matrices(seed: int) -> list[Tensor]:
    generator = np.random.default_rng(seed)
    drawn = [torch.from_numpy(generator.standard_normal(shape)) for shape in SHAPES]
    if seed:
        drawn[0][2] = 0  # a gradient that has a row of zeros
    return drawn


def flat_slice(whole: list[Tensor], first: int, length: int) -> Tensor:
    """Elements [first, first + length) of all matrices, one after the other, with zeros behind
    the last.
    """
    joined = torch.cat([matrix.flatten() for matrix in whole])
    return torch.cat([joined, joined.new_zeros(first + length)])[first : first + length].clone()


def segments_of(first: int, length: int) -> list[Segment]:
    """What a partition [first, first + length) holds of each matrix."""
    segments, begin = [], 0
    for rows, columns in SHAPES:
        end = begin + rows * columns
        low, high = max(begin, first), min(end, first + length)
        held = max(0, high - low)
        segments.append(
            Segment((rows, columns), low - begin if held else 0, low - first if held else 0, held)
        )
        begin = end
    return segments


def step_whole(**options: float | torch.dtype | None) -> list[Tensor]:
    params = [nn.Parameter(matrix) for matrix in matrices(0)]
    optimizer = new_msgdw([{"params": params, "update": "row_normalized"}], lr=0.05, **options)
    for step in range(1, STEPS + 1):
        for parameter, gradient in zip(params, matrices(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [p.detach() for p in params]


def step_partition(bounds: list[int], options: dict[str, float], without_buffer: bool) -> None:
    """This rank's elements of the flat vector move as they do in the whole matrices."""
    me = process_group.start("cpu")
    first, length = bounds[me.rank], bounds[me.rank + 1] - bounds[me.rank]
    flat = flat_slice(matrices(0), first, length)
    optimizer = new_msgdw([{"params": [flat], "update": "row_normalized"}], lr=0.05, **options)
    optimizer.segments[flat] = segments_of(first, length)
    for step in range(1, STEPS + 1):
        gradient = flat_slice(matrices(step), first, length)
        if without_buffer:
            optimizer.add_gradient(flat, gradient, scale=1.0, first=True)
            optimizer.apply()
        else:
            flat.grad = gradient
            optimizer.step()
    expected = flat_slice(step_whole(**options), first, length)
    torch.testing.assert_close(flat, expected, rtol=1e-12, atol=1e-14)
    process_group.stop()


# 114 elements: rows of 7, 40, 2 and 3
CUTS = {
    "inside rows": [0, 17, 114],
    "between matrices": [0, 35, 114],
    "one has nothing, padding behind": [0, 114, 130],
    "a row over three ranks": [0, 36, 74, 116],
    "one has nothing between two": [0, 50, 50, 114],
    "a rank inside one row": [0, 40, 45, 120],
}


@pytest.mark.parametrize("case", CUTS)
def test_cut_rows_move_as_whole_ones(case: str) -> None:
    options = {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.5}
    call(step_partition, CUTS[case], options, case == "inside rows", ranks=len(CUTS[case]) - 1).ok()


def test_nesterov_too() -> None:
    call(step_partition, CUTS["a row over three ranks"], {"nesterov": True}, False, ranks=3).ok()


def test_a_rank_that_holds_everything_asks_no_other() -> None:
    flat = flat_slice(matrices(0), 0, 120)
    optimizer = new_msgdw(
        [{"params": [flat], "update": "row_normalized"}], lr=0.05, weight_decay=0.1
    )
    optimizer.segments[flat] = segments_of(0, 120)
    for step in range(1, STEPS + 1):
        flat.grad = flat_slice(matrices(step), 0, 120)
        optimizer.step()
    assert torch.equal(flat, flat_slice(step_whole(weight_decay=0.1), 0, 120))
    assert not dist.is_initialized()


def test_large_rows_are_worked_on_in_pieces() -> None:
    """More elements than a piece has, with a first and a last row that are cut."""
    shape, start, length = (700, 1000), 123, 650_000
    generator = np.random.default_rng(5)
    values, gradient = (torch.from_numpy(generator.standard_normal(700_000)) for _ in range(2))
    whole = nn.Parameter(values.view(shape).clone())
    whole.grad = gradient.view(shape)
    new_msgdw([{"params": [whole], "update": "row_normalized"}], lr=0.05).step()
    flat = values[start : start + length].clone()
    flat.grad = gradient[start : start + length]
    optimizer = new_msgdw([{"params": [flat], "update": "row_normalized"}], lr=0.05)
    optimizer.segments[flat] = [Segment(shape, start, 0, length)]
    optimizer.step()
    inner = slice(1000 - start, 650_000 // 1000 * 1000 - start)  # rows that are whole here
    torch.testing.assert_close(
        flat[inner], whole.detach().view(-1)[start:][inner], rtol=1e-13, atol=0
    )
    head = gradient[start:1000]
    torch.testing.assert_close(flat[: len(head)], values[start:1000] - 0.05 * head / head.norm())


def test_one_rank_waits_for_no_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: object, **named: object) -> None:
        raise AssertionError("a rank sums alone")

    monkeypatch.setattr(dist, "all_reduce", refused)
    values = torch.arange(3.0)
    assert torch.equal(Division().sum(values), values)
    with process_group.alone():
        assert torch.equal(Division().sum(values), values)
