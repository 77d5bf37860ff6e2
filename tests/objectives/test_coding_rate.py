"""Coding rates: limits that are known exactly, a loop of determinants, and the membership of pairs."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.objectives.coding_rate import (
    cluster_coding_rate,
    coding_rate,
    pairwise_coding_rate,
    pairwise_membership,
    require_distortion,
    total_coding_rate_loss,
)

ROWS, WIDTH, E2 = 12, 5, 0.2


def rows(seed: int = 0, count: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, WIDTH, generator=generator, dtype=torch.float64), dim=1)


def by_loop(z: Tensor, membership: Tensor) -> Tensor:
    """sum_k m_k / N log det(I + D / (m_k e^2) sum_n P_nk z_n z_n^T), determinant by determinant."""
    total = torch.zeros((), dtype=z.dtype)
    for k in range(membership.shape[1]):
        mass = membership[:, k].sum()
        scatter = sum(membership[n, k] * torch.outer(z[n], z[n]) for n in range(len(z)))
        identity = torch.eye(WIDTH, dtype=z.dtype)
        total += mass / len(z) * torch.linalg.det(identity + WIDTH / (mass * E2) * scatter).log()
    return total


def test_the_batched_rates_are_those_of_a_loop() -> None:
    z, membership = rows(), rows(1)[:, :4].softmax(dim=1)
    torch.testing.assert_close(coding_rate(z, E2), by_loop(z, torch.ones(ROWS, 1).double()))
    torch.testing.assert_close(cluster_coding_rate(z, membership, E2), by_loop(z, membership))
    square = rows(2) @ rows(3).T
    square = square.softmax(dim=1)
    torch.testing.assert_close(pairwise_coding_rate(z, square.T, E2), by_loop(z, square))


def test_equal_shares_leave_nothing_to_gain_and_clusters_of_one_cost_a_logarithm() -> None:
    z = rows()
    uniform, alone = torch.full((ROWS, ROWS), 1 / ROWS, dtype=torch.float64), torch.eye(ROWS).double()
    torch.testing.assert_close(pairwise_coding_rate(z, uniform, E2), coding_rate(z, E2), rtol=1e-14, atol=0)
    expected = torch.tensor(math.log(1 + WIDTH / E2), dtype=torch.float64)
    torch.testing.assert_close(pairwise_coding_rate(z, alone, E2), expected, rtol=1e-14, atol=0)


def test_a_membership_of_true_clusters_is_the_compression_of_mcr2() -> None:
    z, label = rows(), torch.arange(ROWS) % 3
    same = (label[:, None] == label).double()
    one_hot = F.one_hot(label).double()
    pairs = pairwise_coding_rate(z, same / same.sum(dim=1), E2)
    torch.testing.assert_close(pairs, cluster_coding_rate(z, one_hot, E2), rtol=1e-14, atol=0)
    unused = F.pad(one_hot, (0, 2))
    torch.testing.assert_close(cluster_coding_rate(z, unused, E2), pairs)


def test_turning_and_reordering_rows_changes_nothing() -> None:
    z, turn = rows(), torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q
    rate = coding_rate(z, E2)
    torch.testing.assert_close(coding_rate(z @ turn, E2), rate)
    torch.testing.assert_close(coding_rate(z.flip(0), E2), rate)


def test_pairs_become_doubly_stochastic_and_symmetric() -> None:
    membership = pairwise_membership(rows(), 0.2, iterations=300)
    ones = torch.ones(ROWS, dtype=torch.float64)
    torch.testing.assert_close(membership.sum(dim=1), ones, rtol=1e-12, atol=0)
    torch.testing.assert_close(membership.sum(dim=0), ones, rtol=1e-9, atol=0)
    torch.testing.assert_close(membership, membership.T, rtol=1e-8, atol=1e-10)
    nearly_alone, nearly_equal = (pairwise_membership(rows(), t, iterations=100) for t in (1e-3, 1e3))
    torch.testing.assert_close(nearly_alone, torch.eye(ROWS).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(nearly_equal, torch.full_like(nearly_equal, 1 / ROWS), rtol=0, atol=1e-3)


def test_equal_views_in_orthogonal_directions_have_the_largest_rate() -> None:
    """WIDTH orthonormal rows: R = WIDTH log(1 + 1 / e^2), and each agrees with its other view, or its opposite."""
    z = torch.eye(WIDTH, dtype=torch.float64)
    expected = -WIDTH * math.log(1 + 1 / E2) - 3.0
    assert float(total_coding_rate_loss(2 * z, 5 * z, E2, 3.0)) == pytest.approx(expected, rel=1e-12)
    assert float(total_coding_rate_loss(z, -z, E2, 3.0)) == pytest.approx(-3.0)


def test_gradients_pass_gradcheck() -> None:
    z, membership = rows(count=4).requires_grad_(), rows(1, 4)[:, :3].softmax(dim=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: coding_rate(a, E2), [z])
    assert torch.autograd.gradcheck(lambda a, b: cluster_coding_rate(a, b, E2), [z, membership])
    square = (rows(2, 4) @ rows(3, 4).T).softmax(dim=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: pairwise_coding_rate(a, b, E2), [z, square])
    assert torch.autograd.gradcheck(lambda a: total_coding_rate_loss(a, a.flip(0), E2, 2.0), [z])


def test_determinants_beyond_float32_have_finite_rates() -> None:
    z = torch.eye(256, dtype=torch.bfloat16)
    rate = coding_rate(z, 1e-4)
    assert rate.dtype == torch.float32
    assert float(rate) == pytest.approx(256 * math.log(1 + 1e4), rel=1e-4)


@pytest.mark.parametrize("distortion", [0.0, -1.0, math.inf, math.nan])
def test_a_distortion_out_of_range_is_refused(distortion: float) -> None:
    with pytest.raises(UserError, match=r"distortion=\S+ must"):
        require_distortion(distortion)
