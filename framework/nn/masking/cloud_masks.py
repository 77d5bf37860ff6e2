"""Masks in the shape of clouds over one date of a series: what a network that fills gaps is trained with.

Source: Jakubik et al., "Prithvi", 2023, arXiv 2310.18660, section 4.1: in place of random patches, those that a
cloud mask covers are removed from one date.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.files.arrays import mapped_array
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import ReadPath
from lightspan.core.noise import interpolation
from lightspan.nn.masking.mask_samplers import MaskSampler

COARSE = 4
"""Sides of the noise of which drawn clouds are made."""


@dataclass(frozen=True)
class CloudMasks(MaskSampler):
    """Hides patches of one date of each series, the date drawn at random, as clouds would.

    All series of a step lose equally many patches, a share of a date that is drawn for each step: those where the cloud
    is thickest.

    Args:
        least, most: of that share, 0 < least <= most <= 1.
        clouds: a .npy file with real cloud masks, bool or numbers [N h w], of which one is drawn for each series and
            brought to the grid by means; None draws smooth clouds.
        seed: >= 0.
    """

    least: float = 0.2
    most: float = 0.8
    clouds: ReadPath | None = None
    seed: int = 0
    _real: np.ndarray | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if not (0 < self.least <= self.most <= 1 and self.seed >= 0):
            raise UserError(
                f"CloudMasks: least={self.least} and most={self.most} must lie in (0, 1], the smaller first, and "
                f"seed={self.seed} be at least 0"
            )
        if self.clouds is not None:
            object.__setattr__(self, "_real", _read(self.clouds))

    def draw(self, grid: tuple[int, ...], step: int, indices: Sequence[int], view: int = 0) -> np.ndarray:
        """bool [B grid...], see `MaskSampler`. Raises: UserError for a grid other than time, rows and columns."""
        if len(grid) != 3:
            raise UserError(f"CloudMasks need a grid of time, rows and columns, and this is {list(grid)}")
        dates, height, width = grid
        share = np.random.default_rng((self.seed, step)).uniform(self.least, self.most)
        count = min(max(1, round(share * height * width)), dates * height * width - 1)
        hidden = np.zeros((len(indices), *grid), dtype=bool)
        for row, index in zip(hidden, indices, strict=True):
            generator = np.random.default_rng((self.seed, step, index, view))
            date = generator.integers(dates)
            thick = self._cloud(generator, height, width) + 1e-6 * generator.random((height, width))
            row[date].flat[np.argsort(thick, axis=None)[::-1][:count]] = True
        return hidden

    def _cloud(self, generator: np.random.Generator, height: int, width: int) -> np.ndarray:
        """How thick it is in each patch."""
        if self._real is None:
            noise = generator.standard_normal((COARSE, COARSE))
            return interpolation(height, COARSE) @ noise @ interpolation(width, COARSE).T
        real = self._real[generator.integers(len(self._real))]
        return _means(height, len(real)) @ real @ _means(width, real.shape[1]).T


def _read(path: str) -> np.ndarray:
    try:
        clouds = mapped_array(expanded(path, "the path of the clouds"))
    except ValueError as error:
        raise UserError(f"CloudMasks: clouds={path} cannot be read: {error}; give a .npy file of masks") from error
    if clouds.ndim != 3 or not clouds.size or clouds.dtype.kind not in "buif":
        raise UserError(f"CloudMasks: clouds={path} is {clouds.dtype} {[*clouds.shape]}, and masks are numbers [N h w]")
    return clouds


def _means(side: int, pixels: int) -> np.ndarray:
    """[side pixels]: means over what each of `side` equal parts covers of a line of pixels."""
    low, high = (np.arange(side) + end for end in (0, 1))
    left, right = low[:, None] * pixels / side, high[:, None] * pixels / side
    covered = np.minimum(right, np.arange(1, pixels + 1)) - np.maximum(left, np.arange(pixels))
    return np.maximum(covered, 0) * side / pixels
