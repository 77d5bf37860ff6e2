"""Values between voxels: torch's grid_sample, its first derivatives, and the second ones that it has not."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.nn.trilinear import trilinear


def sampled(grid: Tensor, at: Tensor) -> Tensor:
    """[B N C], by torch."""
    found = F.grid_sample(grid, (2 * at - 1)[:, :, None, None], padding_mode="border", align_corners=False)
    return found[..., 0, 0].mT


def given(
    seed: int = 0, sides: tuple[int, ...] = (3, 4, 5), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randn(2, 3, *sides, generator=generator, dtype=dtype)
    return grid, 1.4 * torch.rand(2, 40, 3, generator=generator, dtype=dtype) - 0.2  # some beyond the grid


def test_it_is_grid_sample_with_its_derivatives() -> None:
    for sides in ((3, 4, 5), (1, 2, 7), (1, 1, 1)):
        for dtype, error in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            grid, at = (x.requires_grad_() for x in given(0, sides, dtype))
            ours, torchs = trilinear(grid, at), sampled(grid, at)
            torch.testing.assert_close(ours, torchs, atol=error, rtol=error)
            weight = torch.randn_like(ours)
            for left, right in zip(*(torch.autograd.grad((x * weight).sum(), (grid, at)) for x in (ours, torchs)),
                                   strict=True):  # fmt: skip
                torch.testing.assert_close(left, right, atol=10 * error, rtol=10 * error)


def test_it_has_second_derivatives() -> None:
    grid, at = given(1, (2, 3, 2))
    grid, at = grid[:, :2].requires_grad_(), at[:, :3].clamp(0.3, 0.7).requires_grad_()
    assert torch.autograd.gradcheck(trilinear, (grid, at))
    assert torch.autograd.gradgradcheck(trilinear, (grid, at))


def test_a_linear_field_is_met_everywhere_between_the_outer_middles() -> None:
    z, y, x = torch.meshgrid(*((torch.arange(side).double() + 0.5) / side for side in (4, 5, 6)), indexing="ij")
    grid = (2 * x - 3 * y + z)[None, None]
    at = (0.15 + 0.7 * torch.rand(1, 30, 3, dtype=torch.float64)).requires_grad_()
    found = trilinear(grid, at)[0, :, 0]
    torch.testing.assert_close(found, at[0] @ torch.tensor([2.0, -3, 1], dtype=torch.float64))
    (slope,) = torch.autograd.grad(found.sum(), at)
    torch.testing.assert_close(slope[0], torch.tensor([2.0, -3, 1], dtype=torch.float64).expand(30, 3))
    assert trilinear(grid, at[:, :0]).shape == (1, 0, 1)
