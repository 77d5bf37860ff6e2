"""Canonical directions: definition, QR form, scikit-learn's; least squares and Procrustes in the same terms."""

import pytest
import scipy.linalg
import torch
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import LinearRegression, Ridge
from torch import Tensor

from lightspan.subspaces.canonical import CanonicalPair, canonical_pair, linear_map, orthogonal_map, whitened
from lightspan.subspaces.grassmann import orthonormalised, principal_angles

N, D, E = 60, 7, 5


def drawn(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def views(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two views that share three directions, away from the origin."""
    z = drawn(N, 3, seed)
    x, y = z @ drawn(3, D, seed + 1) + drawn(N, D, seed + 2), z @ drawn(3, E, seed + 3) + drawn(N, E, seed + 4)
    return x + 4, y - 2


def pair_of(x: Tensor, y: Tensor, ridge: float = 0.0) -> CanonicalPair:
    return canonical_pair(whitened(x, ridge), whitened(y, ridge))


def about_mean(x: Tensor) -> Tensor:
    return x - x.mean(dim=0)


def test_correlations_are_the_cosines_of_principal_angles_and_the_singular_values_of_the_qr_form() -> None:
    x, y = views()
    for part in (x, x[:, :E]):
        q_x, q_y = (orthonormalised(about_mean(view)[None]) for view in (part, y))
        found = pair_of(part, y).correlation_K
        torch.testing.assert_close(found, torch.linalg.svdvals(q_x.mT @ q_y)[0])
    torch.testing.assert_close(found, principal_angles(q_x, q_y)[0].cos())
    assert bool((found >= 0).all() and (found <= 1).all())


def test_projected_views_have_the_identity_as_covariance_and_the_correlations_between_them() -> None:
    x, y = views()
    pair = pair_of(x, y)
    a, b = pair.first(x), pair.second(y)
    for view in (a, b):
        torch.testing.assert_close(view.T @ view / (N - 1), torch.eye(E, dtype=torch.float64))
        assert float(view.mean(dim=0).abs().max()) < 1e-12
    torch.testing.assert_close(a.T @ b / (N - 1), pair.correlation_K.diag())


def test_whitened_columns_are_uncorrelated_and_of_variance_one_and_dead_directions_are_left_out() -> None:
    x = drawn(50, 3) * torch.tensor([100.0, 1, 0.01])
    found = whitened(torch.cat([x, x[:, :1], torch.ones(50, 1)], dim=1)).rows_NR
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(found.T @ found / 49, torch.eye(3, dtype=torch.float64))


def test_invertible_maps_of_a_view_change_nothing_and_a_view_agrees_with_its_own_image() -> None:
    x, y = views()
    changed = pair_of(x @ drawn(D, D, 8) + 1, 1e3 * y @ drawn(E, E, 9))
    torch.testing.assert_close(changed.correlation_K, pair_of(x, y).correlation_K)
    torch.testing.assert_close(pair_of(x, x @ drawn(D, D, 8)).correlation_K, torch.ones(D, dtype=torch.float64))


def test_leading_directions_are_those_of_scikit_learn() -> None:
    x, y = views()
    pair = pair_of(x, y).leading(2)
    theirs = CCA(n_components=2, scale=False, max_iter=10_000, tol=1e-14).fit(x.numpy(), y.numpy())
    for own, other in zip((pair.first(x), pair.second(y)), theirs.transform(x.numpy(), y.numpy()), strict=True):
        cosine = torch.nn.functional.cosine_similarity(own, torch.as_tensor(other), dim=0)
        torch.testing.assert_close(cosine.abs(), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [N, 6])
def test_a_ridge_is_added_to_the_covariances_as_a_share_of_the_mean_variance(count: int) -> None:
    ridge, roots, crosses = 0.3, [], [about_mean(view[:count]) for view in views()]
    for view in crosses:
        covariance = view.T @ view / (count - 1)
        values, vectors = torch.linalg.eigh(
            covariance + ridge * covariance.diagonal().mean() * torch.eye(len(covariance))
        )
        roots.append(vectors * values.rsqrt() @ vectors.T)
    expected = torch.linalg.svdvals(roots[0] @ (crosses[0].T @ crosses[1] / (count - 1)) @ roots[1])
    found = pair_of(*(view[:count] for view in views()), ridge=ridge)
    torch.testing.assert_close(found.correlation_K, expected)
    assert float(found.correlation_K.max()) < 0.999


def test_without_a_ridge_fewer_rows_than_features_agree_perfectly_whatever_they_are() -> None:
    found = pair_of(drawn(6, 20), drawn(6, 30, 1))
    torch.testing.assert_close(found.correlation_K, torch.ones(5, dtype=torch.float64))


def test_the_linear_map_is_that_of_scikit_learn_and_recovers_a_planted_one() -> None:
    x, y = views()
    own = LinearRegression().fit(x.numpy(), y.numpy())
    torch.testing.assert_close(linear_map(whitened(x), y), torch.as_tensor(own.coef_).T)
    penalty = 0.5 * float(about_mean(x).square().sum()) / D
    theirs = Ridge(penalty).fit(x.numpy(), y.numpy())
    torch.testing.assert_close(linear_map(whitened(x, 0.5), y), torch.as_tensor(theirs.coef_).T)
    planted = drawn(D, E, 5)
    torch.testing.assert_close(linear_map(whitened(x), x @ planted + 3), planted)
    few, target = about_mean(drawn(5, 20)), about_mean(drawn(5, 3, 1))
    torch.testing.assert_close(linear_map(whitened(few), target), torch.linalg.pinv(few) @ target)  # the shortest


def test_the_orthogonal_map_is_that_of_procrustes() -> None:
    x, y = drawn(N, E), drawn(N, E, 1)
    expected = scipy.linalg.orthogonal_procrustes(about_mean(x).numpy(), about_mean(y).numpy())[0]
    torch.testing.assert_close(orthogonal_map(x + 1, y - 1), torch.as_tensor(expected))
    narrow = orthogonal_map(*views())
    torch.testing.assert_close(narrow.T @ narrow, torch.eye(E, dtype=torch.float64))


def test_between_canonical_views_least_squares_is_the_correlations_and_procrustes_the_identity() -> None:
    x, y = views()
    pair = pair_of(x, y)
    a, b = pair.first(x), pair.second(y)
    torch.testing.assert_close(linear_map(whitened(a), b), pair.correlation_K.diag())
    torch.testing.assert_close(orthogonal_map(a, b), torch.eye(E, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_without_a_difference_share_nothing_and_constant_features_count_for_nothing(dtype: torch.dtype) -> None:
    x, y = (view.to(dtype) for view in views())
    for flat in (torch.full((N, 4), 0.1, dtype=dtype), torch.zeros(N, 4, dtype=dtype)):
        assert pair_of(flat, y).correlation_K.shape == (0,)
        assert pair_of(flat, y).first(flat).shape == (N, 0)
        assert not linear_map(whitened(flat), y).any()
        wider = torch.cat([x, flat], dim=1)
        torch.testing.assert_close(pair_of(wider, y).correlation_K, pair_of(x, y).correlation_K)
    assert pair_of(x[:1], y[:1]).correlation_K.shape == (0,)
    assert float(pair_of(x[:2], y[:2]).correlation_K[0]) == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_any_scale_is_the_same_with_a_ridge_too(scale: float) -> None:
    x, y = views()
    torch.testing.assert_close(pair_of(scale * x, y, 0.1).correlation_K, pair_of(x, y, 0.1).correlation_K)
    torch.testing.assert_close(pair_of(scale * x, y, 0.1).first(scale * x), pair_of(x, y, 0.1).first(x))
