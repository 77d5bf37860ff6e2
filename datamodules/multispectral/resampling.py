"""Pictures of many bands at other sizes: the mean over what was seen there, and whether enough was.

Pixels are areas, of which the middles of the corner pixels move when the size changes: nothing is shifted by half a
pixel. Shapes: C bands, h w and H W sides, T dates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.augment.views import seeded

LEAST_SEEN = 0.5
"""Share of a new pixel's weight that must have been seen for it to count as valid."""


def resampled(values: Tensor, valid: Tensor, sides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[... h w] -> [... H W]: bilinear, antialiased, over valid pixels alone; and where half of it or more was seen.

    Args:
        valid: bool, of the shape of `values`, which are 0 where it is False.
    """
    if tuple(values.shape[-2:]) == tuple(sides):
        return values, valid
    flat = torch.stack([values * valid, valid.to(values.dtype)]).flatten(1, -3)
    seen = F.interpolate(flat, tuple(sides), mode="bilinear", antialias=True).unflatten(1, values.shape[:-2])
    enough = seen[1] >= LEAST_SEEN
    return torch.where(enough, seen[0] / seen[1].clamp_min(LEAST_SEEN), 0), enough


def square(values: Tensor, valid: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The square in the middle, at size x size."""
    height, width = values.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = (..., slice(top, top + side), slice(left, left + side))
    return resampled(values[middle], valid[middle], (size, size))


class SpectralCrops:
    """Random crops of all bands and dates alike, then mirroring: SatMAE++'s augmentation.

    Args:
        size: height and width of the crop in pixels, after resampling.
        scale: least and greatest share of the area, in (0, 1]; the sides' ratio lies between 3/4 and 4/3.
        flip: probability of mirroring left to right.
    """

    def __init__(self, size: int, scale: tuple[float, float] = (0.6, 1.0), flip: float = 0.5) -> None:
        if size < 1 or not 0 < scale[0] <= scale[1] <= 1 or not 0 <= flip <= 1:
            raise UserError(
                f"SpectralCrops size={size} must be at least 1, scale={list(scale)} in (0, 1] with the smaller first, "
                f"and flip={flip} in [0, 1]"
            )
        require_numbers(size**2, size=size)
        self.size, self.scale, self.flip = size, scale, flip

    def __call__(self, values: Tensor, valid: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """[... h w] -> [... size size], a function of the seed."""
        from torchvision.transforms.v2 import RandomResizedCrop

        with seeded(seed):
            box = RandomResizedCrop(self.size, scale=self.scale, antialias=True).make_params([values])
            mirrored = bool(torch.rand(()) < self.flip)
        window = (..., slice(box["top"], box["top"] + box["height"]), slice(box["left"], box["left"] + box["width"]))
        values, valid = resampled(values[window], valid[window], (self.size, self.size))
        return (values.flip(-1), valid.flip(-1)) if mirrored else (values, valid)
