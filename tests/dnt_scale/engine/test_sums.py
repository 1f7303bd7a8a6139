"""Sums of many squares, where adding them up in fp32 one after the other would lose digits."""

import math

import pytest
import torch

from dnt_scale.engine.reductions import squared_norms


def test_the_squares_of_ten_million_elements_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        1e-3 * torch.randn(shape, generator=generator)
        for shape in ((2500, 4000), (7,), (0, 3), (3, 5))
    ]
    found = squared_norms(tensors)
    exact = torch.stack([tensor.double().square().sum() for tensor in tensors])
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.sqrt(), exact.sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    tensors = [torch.ones(200_000), torch.ones(200_000)]
    tensors[0][150_000] = bad
    assert squared_norms(tensors).isfinite().tolist() == [False, True]
