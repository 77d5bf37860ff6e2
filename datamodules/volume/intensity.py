"""What the numbers of a scan become. Without torch.

Voxels that are NaN or infinite count as the least finite one.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from lightspan.core.errors import UserError

# A recipe may name the classes listed here.
__all__ = ["IntensityWindow", "Percentiles", "ZScore"]


class Intensity(ABC):
    """Maps the voxels of one scan, finite float32 of any shape, to float32 of the same shape."""

    @abstractmethod
    def __call__(self, values: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class IntensityWindow(Intensity):
    """From `low` to `high`, such as Hounsfield units of CT: below is 0, above 1, and linear between.

    Args:
        low, high: low below high. Soft tissue is about -175 to 250, all but metal -1000 to 1000.
    """

    low: float = -1000.0
    high: float = 1000.0

    def __post_init__(self) -> None:
        if not -np.inf < self.low < self.high < np.inf:
            raise UserError(f"IntensityWindow low={self.low} must be below high={self.high}, and both finite")

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return np.clip((values - np.float32(self.low)) / np.float32(self.high - self.low), 0, 1)


@dataclass(frozen=True)
class Percentiles(Intensity):
    """From one percentile of the voxels other than 0 to another, for MR, whose unit is arbitrary: to [0, 1], as by an
    `IntensityWindow`. A scan of a single number, and 0, become 0.

    Args:
        low, high: in [0, 100], low below high.
    """

    low: float = 0.5
    high: float = 99.5

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 100:
            raise UserError(f"Percentiles low={self.low} must be below high={self.high}, and both lie in [0, 100]")

    def __call__(self, values: np.ndarray) -> np.ndarray:
        body = values[values != 0]
        low, high = np.percentile(body, [self.low, self.high]) if body.size else (0.0, 0.0)
        if not high > low:
            return np.zeros_like(values)
        return np.where(values == 0, np.float32(0), IntensityWindow(float(low), float(high))(values))


@dataclass(frozen=True)
class ZScore(Intensity):
    """Less the mean and over the deviation of the voxels other than 0, which stay 0; a scan of a single number becomes
    0.
    """

    def __call__(self, values: np.ndarray) -> np.ndarray:
        body = values[values != 0].astype(np.float64)
        deviation = body.std() if body.size else 0.0
        if not deviation > 1e-6 * max(1e-30, np.abs(body).max(initial=0)):
            return np.zeros_like(values)
        return np.where(values == 0, 0, (values - body.mean()) / deviation).astype(np.float32)


def finite(values: np.ndarray) -> np.ndarray:
    """With the least finite voxel for those that are not. Raises: ValueError if none is finite."""
    sound = np.isfinite(values)
    if sound.all():
        return values
    if not sound.any():
        raise ValueError("none of its voxels is a finite number")
    return np.where(sound, values, values[sound].min())
