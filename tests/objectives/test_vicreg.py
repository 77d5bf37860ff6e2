"""VICReg against numpy and lightly, and what each of its terms is blind to."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightspan.objectives.vicreg import covariance, vicreg_loss, vicreg_terms


def rows(count: int = 9, width: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_terms_are_numpys_variances_and_covariances() -> None:
    z1, z2 = 0.7 * rows(), 1.3 * rows(seed=1)
    variance, products = 0.0, 0.0
    for z in (z1.numpy(), z2.numpy()):
        variance += np.maximum(0, 1 - np.sqrt(z.var(axis=0, ddof=1) + 1e-4)).mean() / 2
        c = np.cov(z, rowvar=False)
        products += (np.square(c).sum() - np.square(np.diag(c)).sum()) / 5
    terms = vicreg_terms(z1, z2)
    assert terms.invariance.item() == pytest.approx(np.square((z1 - z2).numpy()).mean(), rel=1e-12)
    assert terms.variance.item() == pytest.approx(variance, rel=1e-12)
    assert terms.covariance.item() == pytest.approx(products, rel=1e-12)


def test_lightly_has_the_same_loss_and_gradient() -> None:
    peers = pytest.importorskip("lightly.loss", reason="the extra `peers` is not installed")
    z1, z2 = (0.5 * rows()).requires_grad_(), rows(seed=1).requires_grad_()
    ours, theirs = vicreg_loss(z1, z2, 20.0, 15.0, 2.0), peers.VICRegLoss(20.0, 15.0, 2.0)(z1, z2)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    for a, b in zip(torch.autograd.grad(ours, (z1, z2)), torch.autograd.grad(theirs, (z1, z2)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_equal_views_that_are_white_have_no_loss_and_a_collapsed_batch_has_only_the_variance() -> None:
    white = 1.1 * torch.linalg.qr(rows(9, 5) - rows(9, 5).mean(dim=0)).Q * 8**0.5
    white -= white.mean(dim=0)
    assert vicreg_loss(white, white).item() == pytest.approx(0, abs=1e-12)
    flat = torch.ones(6, 3, dtype=torch.float64, requires_grad=True)
    terms = vicreg_terms(flat, flat)
    assert [term.item() for term in terms] == pytest.approx([0, 0.99, 0], abs=1e-12)
    vicreg_loss(flat, flat).backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_shifts_of_both_views_and_orders_of_rows_and_features_do_not_matter() -> None:
    z1, z2 = 0.5 * rows(), rows(seed=1)
    loss = vicreg_loss(z1, z2)
    for a, b in ((z2, z1), (z1 + 3, z2 + 3), (z1.flip(0), z2.flip(0)), (z1.flip(1), z2.flip(1))):
        torch.testing.assert_close(vicreg_loss(a, b), loss, rtol=1e-10, atol=0)


def test_gradient_is_that_of_differences() -> None:
    z1, z2 = (0.5 * rows(6, 3)).requires_grad_(), (0.4 * rows(6, 3, seed=1)).requires_grad_()
    assert torch.autograd.gradcheck(vicreg_loss, (z1, z2))


def test_one_row_counts_as_equal_rows_as_on_several_ranks_and_none_as_well() -> None:
    one, equal = (
        vicreg_terms(rows(1), rows(1, seed=1)),
        vicreg_terms(rows(1).repeat(2, 1), rows(1, seed=1).repeat(2, 1)),
    )
    torch.testing.assert_close(one, equal)
    assert [term.item() for term in one[1:]] == pytest.approx([0.99, 0])
    assert [term.item() for term in vicreg_terms(rows(0), rows(0))] == pytest.approx([0, 0.99, 0])


def test_the_covariance_of_one_view_is_the_sum_of_squares_off_the_diagonal_and_changes_with_a_rotation() -> None:
    z = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance_DD = torch.from_numpy(np.cov(z.numpy(), rowvar=False))
    expected = (covariance_DD.square().sum() - covariance_DD.diagonal().square().sum()) / 4
    torch.testing.assert_close(covariance(z), expected)
    torch.testing.assert_close(2 * covariance(z), vicreg_terms(z, z).covariance)
    turned = z @ torch.linalg.qr(z[:4]).Q
    assert (covariance(turned) - expected).abs() > 0.01 * expected
