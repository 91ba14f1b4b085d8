import numpy as np
import pytest
import torch

from sparc3_pl.model.drawing import inverse_cdf


@pytest.mark.parametrize("width", [1, 7, 256, 257, 1000, 50257])
def test_a_number_picks_the_place_that_a_plain_cumulative_sum_picks(width):
    generator = torch.Generator().manual_seed(width)
    weights = torch.randn(40, width, generator=generator).mul(3).softmax(1)
    weights[:, ::5] = 0
    weights[:, -1] += 0.1
    uniforms = torch.rand(40, generator=generator, dtype=torch.float64)
    sums = np.cumsum(weights.double().numpy(), axis=1)
    expected = [np.searchsorted(row, u * row[-1], side="right") for row, u in zip(sums, uniforms.tolist(), strict=True)]
    assert inverse_cdf(weights, uniforms).tolist() == expected


@pytest.mark.parametrize("width", [5, 300, 512])
@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_no_place_of_weight_0_is_drawn(width, number):
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(200, width, generator=generator)
    weights[:, :2] = 0
    weights[:, -2:] = 0
    drawn = inverse_cdf(weights, torch.full((200,), number, dtype=torch.float64))
    assert drawn.tolist() == [2 if number == 0 else width - 3] * 200


def test_what_is_not_a_number_is_still_a_place():
    """So that whoever looks at the values finds what is not finite, and names it."""
    drawn = inverse_cdf(torch.full((3, 700), torch.nan), torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64))
    assert ((drawn >= 0) & (drawn < 700)).all()
