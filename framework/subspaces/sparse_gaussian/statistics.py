"""A Gaussian weight theta ~ N(mu, sigma^2): its size |theta|, its divergence from the prior, its parameter rho.

Source: Li, Miao, Qiu, Zhang, "Training Bayesian Neural Networks with Sparse Subspace Variational Inference" (SSVI),
ICLR 2024, arXiv 2402.11025. |theta| follows the folded normal distribution (Leone, Nelson, Nottingham 1961); with a =
|mu| / sigma, E|theta| = |mu| + sigma d(a) and Var|theta| = sigma^2 (1 - 2 a d - d^2), where d(a) = 2 (phi(a) - a
Phi(-a)). That is mu erf(mu / (sigma sqrt 2)) + sigma sqrt(2 / pi) exp(-mu^2 / (2 sigma^2)) and mu^2 + sigma^2 -
(E|theta|)^2, without the difference of nearly equal squares that the second one is for a small sigma.
Everything is entry by entry, in float32 or wider; sigma = 0 is the limit of a small one.
Shapes: S, any.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.devices import wide, widest_float

LEAST_STD = 1e-30
"""What a sigma below it counts as, so that weights of up to 1e8 over it stay finite in float32."""


def std_of(rho_S: Tensor) -> Tensor:
    """sigma = softplus(rho) = log(1 + e^rho)."""
    return F.softplus(wide(rho_S))


def rho_of(std_S: Tensor) -> Tensor:
    """The inverse of `std_of`; sigma must be above 0."""
    std_S = wide(std_S)
    return std_S + (-torch.expm1(-std_S)).log()


def kl_to_prior(mean_S: Tensor, std_S: Tensor, prior_std: float) -> Tensor:
    """Sum over all entries of KL(N(mu, sigma^2) || N(0, prior_std^2)), a scalar in nats; 0 for no entry."""
    mean_S, std_S = wide(mean_S), wide(std_S)
    each_S = (prior_std / std_S).log() + (std_S.square() + mean_S.square()) / (2 * prior_std**2) - 0.5
    return each_S.sum()


def size_mean(mean_S: Tensor, std_S: Tensor) -> Tensor:
    """E|theta|."""
    mean_S, std_S = _sound(mean_S, std_S)
    return mean_S.abs() + std_S * _gain(mean_S.abs() / std_S)


def size_std(mean_S: Tensor, std_S: Tensor) -> Tensor:
    """Standard deviation of |theta|, between sigma sqrt(1 - 2 / pi) at mu = 0 and sigma far from it."""
    mean_S, std_S = _sound(mean_S, std_S)
    a_S = mean_S.abs() / std_S
    d_S = _gain(a_S)
    return std_S * (1 - 2 * a_S * d_S - d_S.square()).sqrt()


def log_exponential_mean(mean_S: Tensor, std_S: Tensor, rate: float) -> Tensor:
    """log E e^(rate |theta|), in the widest type of the device.

    E = e^(l^2 s^2 / 2 + l mu) Phi(mu / s + l s) + e^(l^2 s^2 / 2 - l mu) Phi(-mu / s + l s), with l the rate and s
    sigma.
    """
    mean_S, std_S = (x.to(widest_float(x.device)) for x in _sound(mean_S, std_S))
    half_S, a_S = (rate * std_S).square() / 2, mean_S / std_S
    sides = (rate * side * mean_S + torch.special.log_ndtr(side * a_S + rate * std_S) for side in (1, -1))
    return half_S + torch.logaddexp(*sides)


def _gain(a_S: Tensor) -> Tensor:
    """d(a) = 2 (phi(a) - a Phi(-a)), for a >= 0: what folding adds to the mean, in units of sigma."""
    density_S = (-a_S.square() / 2).exp() / math.sqrt(2 * math.pi)
    return 2 * density_S - a_S * torch.special.erfc(a_S / math.sqrt(2))


def _sound(mean_S: Tensor, std_S: Tensor) -> tuple[Tensor, Tensor]:
    return wide(mean_S), wide(std_S).clamp_min(LEAST_STD)
