"""Mean and deviation of each band over what was seen of it, and standardised pictures.

Shapes: C bands.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class BandMoments(NamedTuple):
    """Mean and standard deviation of each band's reflectance, float32 [C]. A band that was never seen has 0 and 1."""

    mean: Tensor
    std: Tensor

    def standardised(self, values: Tensor, valid: Tensor) -> Tensor:
        """float32 [C ...]: (values - mean) / std where valid, and 0, the band's mean, elsewhere."""
        mean, std = (part.view(-1, *[1] * (values.ndim - 1)) for part in self)
        return torch.where(valid, (values - mean) / std, 0)


def band_moments(samples: Iterable[tuple[np.ndarray, np.ndarray]], bands: int) -> BandMoments:
    """Those of pictures [C ...] with their valid pixels, bool [C ...]: nothing else counts.

    The deviation of a constant band is 1 here, so that standardising makes it zero and not NaN.
    """
    count, total, squares, shift = (np.zeros(bands) for _ in range(4))
    for values, valid in samples:
        flat, seen = values.reshape(bands, -1).astype(np.float64), valid.reshape(bands, -1)
        first = (count == 0) & seen.any(axis=1)
        # Squares of numbers near their mean lose no digits.
        shift[first] = flat[first, seen[first].argmax(axis=1)]
        near = np.where(seen, flat - shift[:, None], 0)
        count += seen.sum(axis=1)
        total += near.sum(axis=1)
        squares += (near**2).sum(axis=1)
    known = np.maximum(count, 1)
    mean = total / known
    variance = np.maximum(squares / known - mean**2, 0)
    std = np.where(variance > 1e-12 * (shift**2 + mean**2), np.sqrt(variance), 1)
    return BandMoments(*(torch.tensor(part, dtype=torch.float32) for part in (shift + mean, std)))
