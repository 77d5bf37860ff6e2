"""Distributions of masks in [0, 1] that have a gradient in their logits, one logit x an entry.

Sources: binary Concrete is Maddison, Mnih, Teh 2016, arXiv 1611.00712, and Jang, Gu, Poole 2016, arXiv 1611.01144; hard
Concrete is Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", 2018, arXiv
1712.01312, equations 10 to 12.

A sample is a function of logits, temperature T > 0 and uniform numbers u, which `lightspan.subspaces.masks.draws` gives
for (seed, step, name). So gradients are those of the reparameterised sample, and two calls with one u agree.
Computed in float32 or wider. Infinite logits are ordinary: +inf is an entry that stays, -inf one that goes.

Shapes: S, any.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.errors import UserError


def concrete(logits_S: Tensor, temperature: float, uniform_S: Tensor) -> Tensor:
    """Binary Concrete, m = sigmoid((log u - log(1 - u) + x) / T). P(m > 1/2) = sigmoid(x) for every T, and
    dm/dx = m (1 - m) / T.
    """
    require_temperature(temperature)
    return torch.sigmoid((uniform_S.log() - torch.log1p(-uniform_S) + wide(logits_S)) / temperature)


class MaskDistribution(ABC):
    """One of the masks that logits stand for."""

    @abstractmethod
    def sample(self, logits_S: Tensor, temperature: float, uniform_S: Tensor) -> Tensor:
        """A mask [S] in [0, 1], differentiable in the logits."""

    @abstractmethod
    def keep_logits(self, logits_S: Tensor, temperature: float) -> Tensor:
        """log(p / (1 - p)) of the probability p that an entry is open: above 1/2 (Concrete), not zero (hard
        Concrete).
        """

    @abstractmethod
    def mean_mask(self, logits_S: Tensor) -> Tensor:
        """The mask [S] without noise, in [0, 1]: what a network is tested with while its mask is still soft."""

    def keep_probability(self, logits_S: Tensor, temperature: float) -> Tensor:
        """p [S]. Its sum is the expected number of open entries: for hard Concrete Louizos et al.'s expected L0 norm,
        equation 12.
        """
        return torch.sigmoid(self.keep_logits(logits_S, temperature))


@dataclass(frozen=True)
class BinaryConcrete(MaskDistribution):
    """Soft masks in (0, 1)."""

    def sample(self, logits_S: Tensor, temperature: float, uniform_S: Tensor) -> Tensor:
        return concrete(logits_S, temperature, uniform_S)

    def keep_logits(self, logits_S: Tensor, temperature: float) -> Tensor:
        require_temperature(temperature)
        return wide(logits_S)

    def mean_mask(self, logits_S: Tensor) -> Tensor:
        """sigmoid(x): the mean of the Bernoulli variable that T -> 0 leads to."""
        return torch.sigmoid(wide(logits_S))


@dataclass(frozen=True)
class HardConcrete(MaskDistribution):
    """Concrete stretched to (low, high) and cut to [0, 1], so that entries are exactly 0 or 1 with a probability above
    zero: m = min(1, max(0, s (high - low) + low)) for a Concrete s.

    Args:
        low: gamma, < 0.
        high: zeta, > 1.
    """

    low: float = -0.1
    high: float = 1.1

    def __post_init__(self) -> None:
        if not (-math.inf < self.low < 0 and 1 < self.high < math.inf):
            raise UserError(f"HardConcrete low={self.low} must be below 0 and high={self.high} above 1")

    def sample(self, logits_S: Tensor, temperature: float, uniform_S: Tensor) -> Tensor:
        return self._stretched(concrete(logits_S, temperature, uniform_S))

    def keep_logits(self, logits_S: Tensor, temperature: float) -> Tensor:
        """x - T log(-low / high), equation 12."""
        require_temperature(temperature)
        return wide(logits_S) - temperature * math.log(-self.low / self.high)

    def mean_mask(self, logits_S: Tensor) -> Tensor:
        """min(1, max(0, sigmoid(x) (high - low) + low)), equation 13."""
        return self._stretched(torch.sigmoid(wide(logits_S)))

    def _stretched(self, soft_S: Tensor) -> Tensor:
        return (soft_S * (self.high - self.low) + self.low).clamp(0, 1)


def threshold(logits_S: Tensor, at: float = 0.0) -> Tensor:
    """The deterministic mask [S], bool: logits above `at`; at 0 what both distributions have open more often than not
    as T -> 0. A logit that is NaN is closed.
    """
    return logits_S > at


def require_temperature(temperature: float) -> None:
    """Raises: UserError for a temperature that is not finite and above 0."""
    if not 0 < temperature < math.inf:
        raise UserError(
            f"temperature={temperature} of a mask must be a finite number above 0; 0.5 is usual, and thresholds at 0 "
            "are the limit T -> 0"
        )
