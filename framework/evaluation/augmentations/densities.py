"""Augmentations whose density is known, so that their complexity can be estimated without an encoder.

Shapes: N samples, M augmented samples, D values.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightspan.core.ranges import require_in


class Density(ABC):
    """p(a | x) of flat samples."""

    @abstractmethod
    def draw(self, x_D: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Augmented samples [M D] of one sample."""

    @abstractmethod
    def log_density(self, a_MD: Tensor, x_ND: Tensor) -> Tensor:
        """log p(a | x) [M N], up to what all x have in common; -inf where a cannot be of x."""


class _Masks(Density):
    """Values that are masked are NaN. What is kept has to agree; the mask's own probability is the same for all x."""

    def draw(self, x_D: Tensor, count: int, generator: torch.Generator) -> Tensor:
        return torch.where(self.masks(count, len(x_D), generator), torch.nan, x_D)

    def log_density(self, a_MD: Tensor, x_ND: Tensor) -> Tensor:
        kept_MD = (~a_MD.isnan()).to(x_ND.dtype)
        filled_MD = a_MD.nan_to_num(0.0)
        agreed = [((x_ND == a_D) | (kept_D == 0)).all(dim=1) for a_D, kept_D in zip(filled_MD, kept_MD, strict=True)]
        impossible_MN = ~torch.stack(agreed) if agreed else torch.zeros(0, len(x_ND), dtype=torch.bool)
        return torch.zeros(impossible_MN.shape, dtype=x_ND.dtype).masked_fill(impossible_MN, -torch.inf)

    @abstractmethod
    def masks(self, count: int, width: int, generator: torch.Generator) -> Tensor:
        """bool [M D], true where a value is masked."""


class RandomMask(_Masks):
    """Each value is masked independently.

    Args:
        rate: probability, in [0, 1].
    """

    def __init__(self, rate: float) -> None:
        require_in("[0, 1]", rate=rate)
        self.rate = rate

    def masks(self, count: int, width: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, width, generator=generator) < self.rate


class BlockMask(_Masks):
    """Neighbouring values are masked, in the order of the samples' values, in a ring: of an image, bands of rows.

    Args:
        ratio: share of the values, in [0, 1].
    """

    def __init__(self, ratio: float) -> None:
        require_in("[0, 1]", ratio=ratio)
        self.ratio = ratio

    def masks(self, count: int, width: int, generator: torch.Generator) -> Tensor:
        start_M1 = torch.randint(max(width, 1), (count, 1), generator=generator)
        return (torch.arange(width) - start_M1) % max(width, 1) < round(self.ratio * width)


class GaussianNoise(Density):
    """Independent noise on each value: `grain` of `lightspan.datamodules.image.augment.views.RandomViews`, unclipped.

    Args:
        deviation: above 0, in the unit of the samples.
    """

    def __init__(self, deviation: float) -> None:
        require_in("(0, inf)", deviation=deviation)
        self.deviation = deviation

    def draw(self, x_D: Tensor, count: int, generator: torch.Generator) -> Tensor:
        return x_D + self.deviation * torch.randn(count, len(x_D), generator=generator, dtype=torch.float64)

    def log_density(self, a_MD: Tensor, x_ND: Tensor) -> Tensor:
        return -torch.cdist(a_MD, x_ND, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * self.deviation**2)
