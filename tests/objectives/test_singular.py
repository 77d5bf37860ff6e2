"""The share of the leading singular values: against an SVD, where values coincide, and what does not change it."""

import pytest
import torch

from lightspan.objectives.singular import leading_singular_share


def rows(count: int, width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (3, 4)])
def test_it_is_that_of_an_svd_with_its_gradient(shape: tuple[int, int]) -> None:
    z = rows(*shape).requires_grad_()
    values = torch.linalg.svdvals(z)
    expected = values[:5].mean() / values.sum()
    found = leading_singular_share(z)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, z)[0] for each in (found, expected)))
    assert torch.autograd.gradcheck(leading_singular_share, z)


def test_values_that_coincide_have_a_bounded_gradient() -> None:
    for z in (torch.eye(6, 9), torch.eye(9, 6), torch.ones(4, 5), torch.zeros(4, 5), 1e-30 * rows(4, 5).float()):
        z = z.clone().requires_grad_()
        leading_singular_share(z, 2).backward()
        assert z.grad is not None
        assert z.grad.isfinite().all()
        if z.detach().abs().amax() == 1:
            assert z.grad.abs().amax() <= 1


def test_it_does_not_change_with_rotations_order_or_scale() -> None:
    z, turn = rows(8, 5), torch.linalg.qr(rows(5, 5)).Q
    for same in (z @ turn, z.flip(0), -3e20 * z, 1e-20 * z):
        torch.testing.assert_close(leading_singular_share(same, 2), leading_singular_share(z, 2))
    for factor in (1e25, 1e-25):  # whose squares float32 does not have
        found = leading_singular_share(factor * z.float(), 2)
        torch.testing.assert_close(found.double(), leading_singular_share(z, 2), rtol=1e-4, atol=1e-5)


def test_by_hand_and_at_the_ends() -> None:
    z = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    assert leading_singular_share(z, 2).item() == pytest.approx(0.35)
    assert leading_singular_share(z, 9).item() == pytest.approx(0.25)  # the mean of all
    assert leading_singular_share(torch.ones(7, 3), 1).item() == pytest.approx(1)
    small = torch.diag(torch.tensor([1.0, 1e-6], dtype=torch.float64))  # a value of its own, and no rounding
    assert leading_singular_share(small, 1).item() == pytest.approx(1 / (1 + 1e-6), rel=1e-9)
    line = rows(40, 1, torch.float32) @ rows(1, 30, torch.float32)  # whose other values are rounding errors
    assert leading_singular_share(line, 1).item() == pytest.approx(1, abs=1e-6)
    for nothing in (torch.zeros(7, 3), torch.zeros(0, 3)):
        assert leading_singular_share(nothing).item() == 0


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_rows_that_are_not_finite_give_nan_as_an_overflow_of_half_precision_does(
    wrong: float, shape: tuple[int, int]
) -> None:
    z = rows(*shape, torch.float32)
    z[1, 2] = wrong
    assert leading_singular_share(z.requires_grad_()).isnan()
