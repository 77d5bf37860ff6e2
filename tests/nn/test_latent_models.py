"""Factor models and mixtures by maximum likelihood: the maximum, independent programs, degenerate samples."""

import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture as Theirs
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.nn.latent_models import (
    FactorModel,
    GaussianMixture,
    factor_likelihood,
    factors_of_rows,
    fitted_factors,
    posterior_map,
)


def drawn(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(rows: int = 200, width: int = 8) -> Tensor:
    x = drawn(rows, width) + 2 * drawn(rows, 3, 1) @ drawn(3, width, 2)
    return x.T @ x / rows


def test_no_change_of_the_factors_has_a_larger_likelihood_and_the_gradient_there_is_zero() -> None:
    s = covariance()
    factors, _ = fitted_factors(s, 3, 1.0)
    best = factor_likelihood(s, factors, 1.0)
    for seed in range(100):
        size = 10.0 ** -(seed % 4)
        assert factor_likelihood(s, factors + size * drawn(8, 3, seed), 1.0) < best
    factors.requires_grad_()
    factor_likelihood(s, factors, 1.0).backward()
    assert factors.grad is not None
    assert factors.grad.abs().max() < 1e-12


def test_a_learned_noise_and_likelihood_are_scikit_learns() -> None:
    x = drawn(200, 8) @ drawn(8, 8, 1)
    x = x - x.mean(dim=0)
    s = x.T @ x / len(x)
    factors, s2 = fitted_factors(s, 3)
    theirs = PCA(3).fit(x.numpy() * (199 / 200) ** 0.5)  # it divides by N - 1
    assert s2 == pytest.approx(theirs.noise_variance_)
    mean = theirs.score(x.numpy() * (199 / 200) ** 0.5)  # of rows whose covariance is theirs times (N - 1) / N
    ours = factor_likelihood(s * 199 / 200, factors, s2)
    assert float(ours) == pytest.approx(mean)


@pytest.mark.parametrize(("rows", "rank"), [(5, 3), (5, 8), (9, 9), (30, 3)])
@pytest.mark.parametrize("variance", [None, 0.5])
def test_rows_give_the_factors_of_their_covariance_where_they_are_few_too(
    rows: int, rank: int, variance: float | None
) -> None:
    x = drawn(rows, 9)
    factors, s2 = factors_of_rows(x, rank, variance)
    expected, expected_s2 = fitted_factors(x.T @ x / rows, rank, variance)
    assert s2 == pytest.approx(expected_s2, abs=1e-12)
    assert factors.shape == expected.shape
    torch.testing.assert_close(factors @ factors.T, expected @ expected.T)


def test_the_posterior_mean_is_that_of_the_joint_gaussian() -> None:
    factors = drawn(6, 2)
    for variance in (1.0, 0.3):
        whole = factors @ factors.T + variance * torch.eye(6, dtype=torch.float64)
        torch.testing.assert_close(posterior_map(factors, variance), torch.linalg.solve(whole, factors))


def test_directions_below_the_noise_are_no_factors() -> None:
    s = torch.diag(torch.tensor([9.0, 0.5, 0.2], dtype=torch.float64))
    factors, _ = fitted_factors(s, 2, 1.0)
    torch.testing.assert_close(factors.norm(dim=0), torch.tensor([8.0**0.5, 0.0], dtype=torch.float64))
    assert posterior_map(factors, 1.0).isfinite().all()


def test_a_factor_model_gives_uncorrelated_features_in_the_samples_dtype_of_images_too() -> None:
    x = (drawn(100, 12) @ drawn(12, 12, 1) + 50).view(100, 3, 2, 2).to(torch.bfloat16)
    model = FactorModel(4)
    model.learn(x.split(30))
    z = model(x)
    assert z.dtype == torch.float32
    assert z.shape == (100, 4)
    off = torch.cov(z.T.double()).fill_diagonal_(0)
    assert off.abs().max() < 1e-3
    restored = FactorModel(4)
    for name, buffer in model.named_buffers():
        setattr(restored, name, buffer)
    assert torch.equal(restored(x), z)


def test_a_mixture_with_known_centres_finds_them_and_one_start_may_be_worse() -> None:
    centres = 12 * drawn(6, 4, 3)
    group = torch.arange(300) % 6
    x = centres[group] + drawn(300, 4)
    model = GaussianMixture(6, variance=1.0)
    model.learn([x])
    assert model.mean_KD is not None
    assert torch.cdist(centres, model.mean_KD).amin(dim=1).max() < 0.6
    assert len(set(model(x).argmax(dim=1).tolist())) == 6
    torch.testing.assert_close(model(x).sum(dim=1), torch.ones(300, dtype=torch.float64))
    assert len(model.likelihoods) == 10
    theirs = Theirs(6, covariance_type="spherical", n_init=10, random_state=0, tol=1e-9, max_iter=500).fit(x.numpy())
    assert max(model.likelihoods) == pytest.approx(theirs.score(x.numpy()), abs=0.1)  # theirs has six variances


def test_a_step_of_expectation_and_maximisation_never_lowers_the_likelihood() -> None:
    x = drawn(80, 3).sign() + 0.4 * drawn(80, 3, 1)
    reached = []
    for iterations in (1, 2, 4, 8, 16):
        model = GaussianMixture(4, starts=1, iterations=iterations)
        model.learn([x])
        reached.append(model.likelihoods[0])
    assert reached == sorted(reached)


def test_degenerate_samples_are_learned_or_refused_in_one_line() -> None:
    for model in (FactorModel(2), GaussianMixture(3)):
        model.learn([torch.ones(5, 4)])
        assert model(torch.ones(5, 4)).isfinite().all()
        with pytest.raises(UserError, match="learned from samples of 4"):
            model(torch.ones(5, 3))
        with pytest.raises(UserError, match="NaN"):
            model.learn([torch.full((5, 4), torch.nan)])
        with pytest.raises(UserError, match="at least"):
            model.learn([])
        with pytest.raises(UserError, match="has not learned"):
            type(model)(2)(torch.ones(2, 2))
    repeated = GaussianMixture(3)
    repeated.learn([torch.eye(2).repeat(4, 1)])  # more components than different samples
    assert repeated(torch.eye(2)).isfinite().all()
    with pytest.raises(UserError, match="rank"):
        FactorModel(5).learn([torch.eye(4)])
    for wrong in ({"rank": 0}, {"rank": 1, "variance": 0.0}):
        with pytest.raises(UserError, match=[*wrong][-1]):
            FactorModel(**wrong)
    for name in ("starts", "iterations"):
        with pytest.raises(UserError, match=name):
            GaussianMixture(2, **{name: 0})
