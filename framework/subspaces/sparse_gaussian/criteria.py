"""What an active coordinate of a sparse Gaussian is worth: those with the lowest scores leave the subspace.

Source: SSVI (arXiv 2402.11025), section 4 and its appendix, where the signal-to-noise ratio of the size comes out best
by about half a point. theta ~ N(mu, sigma^2). A score of one's own is a subclass with one line.
Shapes: S, any.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.subspaces.sparse_gaussian.statistics import LEAST_STD, log_exponential_mean, size_mean, size_std


class Criterion(ABC):
    """A function of mean and standard deviation, entry by entry; only its order counts."""

    @abstractmethod
    def of(self, mean_S: Tensor, std_S: Tensor) -> Tensor:
        """Scores [S], higher is better; one that is NaN counts as the lowest."""


class SizeSNR(Criterion):
    """SNR(|theta|) = E|theta| / std|theta|; where sigma vanishes it orders by |mu| among equal sigmas."""

    def of(self, mean_S: Tensor, std_S: Tensor) -> Tensor:
        return size_mean(mean_S, std_S) / size_std(mean_S, std_S)


class MeanSize(Criterion):
    """E|theta|."""

    def of(self, mean_S: Tensor, std_S: Tensor) -> Tensor:
        return size_mean(mean_S, std_S)


class SizeOfMean(Criterion):
    """|mu|."""

    def of(self, mean_S: Tensor, std_S: Tensor) -> Tensor:
        return wide(mean_S).abs()


class SNR(Criterion):
    """|mu| / sigma."""

    def of(self, mean_S: Tensor, std_S: Tensor) -> Tensor:
        return wide(mean_S).abs() / wide(std_S).clamp_min(LEAST_STD)


class MeanExponential(Criterion):
    """E e^(rate |theta|), by its logarithm, which has the same order.

    Args:
        rate: the paper's lambda, above 0.
    """

    def __init__(self, rate: float = 1.0) -> None:
        if not rate > 0:
            raise UserError(f"{type(self).__name__} rate={rate} must be above 0")
        self.rate = rate

    def of(self, mean_S: Tensor, std_S: Tensor) -> Tensor:
        return log_exponential_mean(mean_S, std_S, self.rate)


class ExponentialSNR(MeanExponential):
    """E e^(rate |theta|) / std e^(rate |theta|), whose second moment is the mean at twice the rate."""

    def of(self, mean_S: Tensor, std_S: Tensor) -> Tensor:
        once_S, twice_S = (log_exponential_mean(mean_S, std_S, rate) for rate in (self.rate, 2 * self.rate))
        return torch.expm1(twice_S - 2 * once_S).clamp_min(0).rsqrt()
