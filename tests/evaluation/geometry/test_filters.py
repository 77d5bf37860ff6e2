"""Statistics of 3x3 filters, against numpy, scipy and scikit-learn, and at the ends of their ranges."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy, ortho_group
from sklearn.decomposition import PCA
from torch import Tensor

from lightspan.evaluation.geometry.filters import (
    MOST_ENTROPY,
    FilterBasis,
    counts,
    divergence,
    filters_of,
    has_filters,
    noise_floor,
    orthogonality,
    random_entropy,
    scaled,
    sparsity,
    variance_entropy,
    variance_shares,
)
from lightspan.evaluation.geometry.moments import Moments

EMPTY = 2.0**-23  # of a bin without filters, 1.19e-7


def bank(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    return (torch.randn(count, 9, generator=generator, dtype=torch.float64) @ mixing + 0.3).to(dtype)


def basis_of(filters: Tensor) -> FilterBasis:
    return FilterBasis.of(Moments.of(filters))


def test_only_weights_that_end_in_3_x_3_are_banks_of_filters() -> None:
    assert has_filters((8, 4, 3, 3))
    assert has_filters((8, 4, 5, 3, 3))
    assert not any(has_filters(s) for s in [(9, 9), (8, 3, 3), (8, 4, 3, 1), (8, 4, 5, 5)])
    volume = torch.arange(2 * 3 * 4 * 9.0).view(2, 3, 4, 3, 3)
    assert torch.equal(filters_of(volume)[1], volume[0, 0, 1].double().flatten())


def test_each_filter_is_divided_by_its_own_largest_magnitude_and_zeros_stay() -> None:
    x = bank(50)
    x[3] = 0
    x[4] = 5e-324
    assert torch.equal(scaled(x)[3], torch.zeros(9).double())
    assert torch.equal(scaled(x)[4], torch.ones(9).double())
    assert torch.allclose(scaled(x)[5], x[5] / x[5].abs().max())


@pytest.mark.parametrize("count", [2, 7, 40, 1000])
def test_the_variance_entropy_is_that_of_numpys_singular_values(count: int) -> None:
    x = bank(count)
    variance = np.linalg.svd(x.numpy() - x.numpy().mean(axis=0), compute_uv=False) ** 2 / (count - 1)
    p = variance / variance.sum()
    assert variance_entropy(x) == pytest.approx(entropy(p, base=10), abs=1e-10)
    assert variance_entropy(x) <= math.log10(min(count - 1, 9)) + 1e-12
    assert variance_shares(x)[: len(p)].numpy() == pytest.approx(p[:9], abs=1e-12)


def test_equal_singular_values_have_the_most_entropy_and_rank_one_has_none() -> None:
    signs = torch.cat([torch.eye(9), -torch.eye(9)]).double()
    assert variance_entropy(signs) == pytest.approx(MOST_ENTROPY, abs=1e-12)
    line = torch.outer(torch.randn(30).double(), torch.randn(9).double())
    assert variance_entropy(line) == pytest.approx(0, abs=1e-12)


def test_the_variance_entropy_knows_no_scale_and_no_rotation() -> None:
    x = bank(60)
    turned = x @ torch.from_numpy(ortho_group.rvs(9, random_state=0))
    for same in (1e-30 * x, 1e200 * x, -x, turned, x.flip(0)):
        assert variance_entropy(same) == pytest.approx(variance_entropy(x), abs=1e-9)


@pytest.mark.parametrize("x", [torch.zeros(20, 9), torch.full((20, 9), 0.1), torch.zeros(0, 9), torch.ones(1, 9)])
def test_equal_filters_zeros_one_and_none_have_no_entropy(x: Tensor) -> None:
    assert variance_entropy(x.double()) == 0


def test_sparsity_is_the_share_of_filters_below_a_hundredth_of_the_layers_largest_number() -> None:
    x = torch.zeros(4, 9).double()
    x[0, 0], x[1, 3], x[2, 8] = -2.0, 0.0199, 0.02
    assert sparsity(x) == 0.5
    assert sparsity(x, share=0.001) == 0.25
    assert sparsity(torch.zeros(5, 9)) == 1
    assert sparsity(torch.full((5, 9), 1e-40)) == 0


def test_the_threshold_of_randomness_is_the_published_curve() -> None:
    assert random_entropy(2**40) == pytest.approx(0.951, abs=5e-4)
    for n in (10, 64, 4096):
        exponent = -0.88767525 * (np.log2(n) - 2.30436435)
        assert random_entropy(n) == pytest.approx(1.2618047 / (1 + np.exp(exponent)) - 0.31050834, abs=1e-12)
    assert random_entropy(10) < random_entropy(100) < random_entropy(1000)


def test_noise_is_above_the_threshold_and_a_bank_of_few_patterns_below() -> None:
    noise = torch.randn(400, 9, generator=torch.Generator().manual_seed(0)).double()
    assert variance_entropy(noise) > random_entropy(400)
    assert variance_entropy(noise @ torch.diag(torch.tensor([1.0, 1.0, *[0.1] * 7]).double())) < random_entropy(400)


def test_orthogonality_is_one_of_orthogonal_rows_and_zero_of_equal_ones() -> None:
    assert orthogonality(3 * torch.eye(9).view(9, 1, 3, 3)) == pytest.approx(1, abs=1e-6)
    assert orthogonality(torch.ones(4, 1, 3, 3)) == pytest.approx(0, abs=1e-6)
    assert orthogonality(torch.ones(1, 1, 3, 3)) == 1
    assert orthogonality(torch.zeros(2, 1, 3, 3)) == 0
    x = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    rows = x.flatten(1).numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = 1 - np.abs(rows @ rows.T - np.eye(6)).sum() / 30
    for same in (x, 1e-200 * x, x * torch.arange(1, 7).view(6, 1, 1, 1)):
        assert orthogonality(same) == pytest.approx(expected, abs=1e-12)


def test_the_basis_is_scikit_learns_up_to_sign() -> None:
    x = scaled(bank(500))
    ours, theirs = basis_of(x), PCA(9).fit(x.numpy())
    assert ours.explained_J.numpy() == pytest.approx(theirs.explained_variance_ratio_, abs=1e-10)
    assert ours.mean_J.numpy() == pytest.approx(theirs.mean_, abs=1e-12)
    assert np.abs((ours.basis_JJ.numpy() * theirs.components_).sum(axis=1)) == pytest.approx(np.ones(9), abs=1e-8)
    assert ours.coefficients(x).abs().numpy() == pytest.approx(np.abs(theirs.transform(x.numpy())), abs=1e-8)
    assert (ours.basis_JJ.gather(1, ours.basis_JJ.abs().argmax(1, keepdim=True)) > 0).all()


def test_batches_of_filters_give_the_basis_of_all() -> None:
    x = scaled(bank(300))
    parts = FilterBasis.of(Moments.of(x[:7]) + Moments.of(x[7:7]) + Moments.of(x[7:]))
    assert torch.allclose(parts.basis_JJ, basis_of(x).basis_JJ, atol=1e-10)


def test_counts_are_numpys_histogram() -> None:
    c = basis_of(bank(400)).coefficients(bank(400))
    least, greatest = c.amin(0), c.amax(0)
    ours = counts(c, least, greatest, 70)
    for j in range(9):
        theirs, _ = np.histogram(c[:, j], bins=70, range=(float(least[j]), float(greatest[j])))
        assert np.abs(ours[j].numpy() - theirs).sum() <= 2  # a number on an edge may fall on either side
    one = torch.ones(9).double()
    assert counts(one.expand(5, 9), one, one, 70)[:, 0].tolist() == [5] * 9


def test_the_divergence_is_scipys_sum_over_components() -> None:
    a, b = (counts(bank(300, s), torch.full((9,), -20.0).double(), torch.full((9,), 20.0).double(), 70) for s in (0, 1))
    explained = torch.linspace(0.3, 0.01, 9).double()
    expected = 0.0
    for j in range(9):
        p, q = (x[j].numpy() / x[j].numpy().sum() for x in (a, b))
        p, q = np.where(p > 0, p, EMPTY), np.where(q > 0, q, EMPTY)
        expected += float(explained[j]) * (entropy(p, q) + entropy(q, p))
    assert float(divergence(a, b, explained)) == pytest.approx(expected, rel=1e-12)
    assert float(divergence(b, a, explained)) == pytest.approx(expected, rel=1e-12)
    assert float(divergence(a, a, explained)) == 0
    assert float(divergence(3 * a, a, explained)) == pytest.approx(0, abs=1e-12)
    assert expected > 0


def test_the_noise_floor_is_that_of_resampled_filters_and_falls_with_their_number() -> None:
    explained = torch.full((9,), 1 / 9).double()
    generator = torch.Generator().manual_seed(0)
    pooled = bank(4000)
    ends = pooled.amin(0), pooled.amax(0)
    whole = counts(pooled, *ends, 70)
    floors = {}
    for size in (100, 2000):
        drawn = pooled[torch.randint(len(pooled), (40, 2, size), generator=generator)]
        pairs = [[counts(one, *ends, 70) for one in pair] for pair in drawn]
        expected = torch.stack([divergence(*pair, explained) for pair in pairs])
        floors[size] = noise_floor(_whole(whole, size), _whole(whole, size), explained, 40, generator).mean()
        assert float(floors[size]) == pytest.approx(float(expected.mean()), rel=0.1)
    assert floors[2000] < 0.2 * floors[100]


def test_the_noise_floor_is_drawn_from_both_sets_together() -> None:
    generator = torch.Generator().manual_seed(0)
    narrow, spread = torch.zeros(9, 6).double(), torch.full((9, 6), 20.0).double()
    narrow[:, 2] = 60
    places = torch.arange(6).repeat_interleave((narrow + spread)[0].long())
    expected = []
    for _ in range(200):
        first, second = (places[torch.randint(180, (9, size), generator=generator)] for size in (60, 120))
        rows = [torch.stack([torch.bincount(row, minlength=6) for row in of]).double() for of in (first, second)]
        expected.append(divergence(*rows, torch.ones(9).double()))
    floor = noise_floor(narrow, spread, torch.ones(9).double(), 200, generator)
    assert float(floor.mean()) == pytest.approx(float(torch.stack(expected).mean()), rel=0.1)


def _whole(pool: Tensor, size: int) -> Tensor:
    """A set of `size` with the distribution of the pool."""
    return pool * (size / pool[0].sum())


def test_the_noise_floor_draws_as_many_as_there_are() -> None:
    a = counts(bank(30), torch.full((9,), -9.0).double(), torch.full((9,), 9.0).double(), 5)
    floor = noise_floor(a, a, torch.ones(9).double(), 7, torch.Generator().manual_seed(0))
    assert floor.shape == (7,)
    assert floor.isfinite().all()
    one_bin = torch.zeros(9, 5).double()
    one_bin[:, 2] = 4
    assert (noise_floor(one_bin, one_bin, torch.ones(9).double(), 3, torch.Generator()) == 0).all()
