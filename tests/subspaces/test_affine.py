"""Affine hulls: the nearest point is that of least squares, and nothing but the hull of the points counts."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.subspaces.affine import affine_hull


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, 5, 9, 20])  # of points in 8 dimensions, where 9 span everything
def test_the_residual_is_that_of_least_squares(count: int) -> None:
    points_ND, e_BD = normal(count, 8), normal(6, 8, seed=1)
    hull = affine_hull(points_ND)
    differences_DN = (points_ND[1:] - points_ND[0]).T.numpy()
    offset_DB = (e_BD - points_ND[0]).T.numpy()
    solved_NB = np.linalg.lstsq(differences_DN, offset_DB, rcond=None)[0]
    expected_BD = torch.from_numpy((offset_DB - differences_DN @ solved_NB).T)
    torch.testing.assert_close(hull.residual(e_BD), expected_BD, rtol=0, atol=1e-10)
    assert hull.rank == min(count - 1, 8)


def test_affine_combinations_of_the_points_stay_and_projecting_twice_changes_nothing() -> None:
    points_ND, weights_BN = normal(4, 9), normal(5, 4, seed=2)
    weights_BN[:, 0] += 1 - weights_BN.sum(dim=1)
    hull, e_BD = affine_hull(points_ND), normal(5, 9, seed=1)
    torch.testing.assert_close(hull.nearest(weights_BN @ points_ND), weights_BN @ points_ND, rtol=0, atol=1e-12)
    torch.testing.assert_close(hull.nearest(hull.nearest(e_BD)), hull.nearest(e_BD), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_neither_order_nor_repeated_points_matter(shift: float) -> None:
    points_ND, e_BD = (normal(4, 9) + shift).float(), (normal(3, 9, seed=1) + shift).float()
    hull, again = affine_hull(points_ND), affine_hull(points_ND[[2, 0, 3, 3, 1, 0, 0]])
    assert hull.rank == again.rank == 3
    torch.testing.assert_close(again.residual(e_BD), hull.residual(e_BD), rtol=0, atol=1e-6 + shift * 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_points_are_one_point(dtype: torch.dtype) -> None:
    point_D = normal(7).to(dtype)
    hull = affine_hull(point_D.expand(5, 7))
    assert hull.rank == 0
    e_BD = normal(2, 7, seed=1).to(dtype)
    torch.testing.assert_close(
        hull.residual(e_BD), (e_BD.double() - point_D.double()).to(hull.origin_D), rtol=0, atol=1e-6
    )


def test_half_a_squared_distance_has_the_residual_as_its_gradient() -> None:
    hull, e_BD = affine_hull(normal(4, 9)), normal(3, 9, seed=1).requires_grad_()
    (0.5 * hull.residual(e_BD).square().sum()).backward()
    torch.testing.assert_close(e_BD.grad, hull.residual(e_BD).detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(e_BD.grad @ hull.basis_DK, torch.zeros(3, 4, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("points", [torch.zeros(0, 3), torch.tensor([[0.0, float("nan")]])])
def test_points_that_span_no_hull_are_refused(points: Tensor) -> None:
    with pytest.raises(UserError, match="affine hull"):
        affine_hull(points)
