"""The place of a feature is where its map peaks."""

import torch
from torch.autograd import gradcheck

from lightspan.nn.heads.spatial_softmax import spatial_softmax


def test_a_single_peak_gives_its_coordinates() -> None:
    rows, columns = 3, 5
    for row in range(rows):
        for column in range(columns):
            peak = torch.full((1, 1, rows, columns), -torch.inf)
            peak[..., row, column] = 3.0
            expected = torch.tensor([[[2 * column / (columns - 1) - 1, 2 * row / (rows - 1) - 1]]])
            torch.testing.assert_close(spatial_softmax(peak), expected)


def test_places_are_averaged_by_the_softmax() -> None:
    two = torch.full((1, 1, 2, 2), -torch.inf)
    two[0, 0, 0, 0], two[0, 0, 1, 1] = 0.0, torch.tensor(3.0).log()
    torch.testing.assert_close(spatial_softmax(two), torch.tensor([[[0.5, 0.5]]]))  # (-1 + 3) / 4


def test_constants_mirrors_single_pixels_and_half_precision() -> None:
    constant = torch.full((2, 3, 4, 6), 7.0)
    assert spatial_softmax(constant).abs().max() < 1e-6
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(spatial_softmax(x.flip(3)), spatial_softmax(x) * torch.tensor([-1.0, 1]))
    torch.testing.assert_close(spatial_softmax(x + 100), spatial_softmax(x))
    assert torch.equal(spatial_softmax(torch.ones(1, 1, 1, 1)), torch.zeros(1, 1, 2))
    half = spatial_softmax(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), spatial_softmax(x.bfloat16().float()), atol=5e-3, rtol=0)
    assert gradcheck(spatial_softmax, torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True))
