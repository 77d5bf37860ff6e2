"""The size of a Gaussian weight: closed forms against draws, limits and torch.distributions."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lightspan.subspaces.sparse_gaussian.statistics import (
    kl_to_prior,
    log_exponential_mean,
    rho_of,
    size_mean,
    size_std,
    std_of,
)

WEIGHTS = [(0.0, 0.7), (0.3, 0.7), (-0.3, 0.2), (1.5, 0.1), (-2.0, 1.0)]
DRAWS = 1_000_000


def drawn(mean: float, std: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return mean + std * torch.randn(DRAWS, generator=generator, dtype=torch.float64)


def within_4_standard_errors(expected: Tensor, samples: Tensor) -> bool:
    return abs(samples.mean() - expected) < 4 * samples.std() / len(samples) ** 0.5


@pytest.mark.parametrize(("mean", "std"), WEIGHTS)
def test_mean_and_variance_of_the_size_are_those_of_a_million_draws(mean: float, std: float) -> None:
    theta, (m, s) = drawn(mean, std), torch.tensor([mean, std], dtype=torch.float64)
    assert within_4_standard_errors(size_mean(m, s), theta.abs())
    around = (theta.abs() - size_mean(m, s)).square()
    assert within_4_standard_errors(size_std(m, s).square(), around)
    for rate in (0.5, 1.0):
        assert within_4_standard_errors(log_exponential_mean(m, s, rate).exp(), (rate * theta.abs()).exp())


@pytest.mark.parametrize(("mean", "std"), WEIGHTS)
def test_they_are_the_formulas_of_the_paper(mean: float, std: float) -> None:
    m, s = torch.tensor([mean, std], dtype=torch.float64)
    first = mean * math.erf(mean / (std * 2**0.5)) + std * (2 / math.pi) ** 0.5 * math.exp(-(mean**2) / (2 * std**2))
    assert size_mean(m, s).item() == pytest.approx(first, rel=1e-12)
    assert size_std(m, s).item() ** 2 == pytest.approx(mean**2 + std**2 - first**2, rel=1e-9)


@pytest.mark.parametrize("std", [0.0, 1e-40, 1e-20, 1e-8])
def test_a_small_sigma_gives_the_size_of_mu_and_a_deviation_of_sigma(std: float) -> None:
    mean_S, std_S = torch.tensor([-3.0, -0.01, 0.0, 1e-3, 2.0]), torch.full((5,), std)
    assert torch.allclose(size_mean(mean_S, std_S), mean_S.abs(), rtol=1e-6, atol=max(std, 1e-29))
    far = mean_S != 0
    assert torch.allclose(size_std(mean_S, std_S)[far], std_S.clamp_min(1e-30)[far], rtol=1e-4)


def test_far_from_zero_the_deviation_is_sigma_where_a_difference_of_squares_would_be_lost() -> None:
    mean, std = torch.tensor(100.0), torch.tensor(1e-3)
    assert size_std(mean, std).item() == pytest.approx(1e-3, rel=1e-6)
    assert mean**2 + std**2 - size_mean(mean, std) ** 2 != pytest.approx(1e-6, rel=0.5)


def test_the_divergence_is_that_of_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(1)
    mean_S = torch.randn(50, generator=generator, dtype=torch.float64)
    std_S = torch.rand(50, generator=generator, dtype=torch.float64) + 1e-3
    expected = kl_divergence(Normal(mean_S, std_S), Normal(torch.zeros(50).double(), 0.3)).sum()
    torch.testing.assert_close(kl_to_prior(mean_S, std_S, 0.3), expected)
    assert kl_to_prior(mean_S[:0], std_S[:0], 0.3) == 0
    assert kl_to_prior(torch.zeros(3), torch.full((3,), 0.3), 0.3).item() == pytest.approx(0, abs=1e-6)


def test_rho_and_sigma_are_each_others_inverse() -> None:
    std_S = torch.tensor([1e-6, 6e-4, 0.1, 1.0, 30.0])
    torch.testing.assert_close(std_of(rho_of(std_S)), std_S, rtol=1e-5, atol=0)
    assert std_of(torch.zeros(1)).item() == pytest.approx(math.log(2))


def test_half_types_are_computed_in_float32() -> None:
    mean_S, std_S = torch.tensor([0.5, -0.25]).bfloat16(), torch.tensor([0.25, 0.5]).bfloat16()
    for function in (size_mean, size_std):
        assert torch.equal(function(mean_S, std_S), function(mean_S.float(), std_S.float()))
    assert kl_to_prior(mean_S, std_S, 0.1).dtype == std_of(mean_S).dtype == torch.float32
