"""Pictures of ten shapes, drawn on the fly: known classes without a file.

Shapes: N images, S pixels per side.
"""

from typing import Any, ClassVar

import numpy as np

from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.drawn import DrawnPictures
from lightspan.datamodules.image.sets.small import Labelled
from lightspan.datamodules.rendered.outlines import NAMES, cover, frames

SIDE = 28


def draw(labels: np.ndarray, noise: float, generator: np.random.Generator, variety: float = 1.0) -> np.ndarray:
    """One picture per label, uint8 [N, S, S]: place, size, angle, brightness of shape and ground, and grain are random.

    Args:
        labels: int64 [N], each in [0, 10), see `NAMES`.
        noise: standard deviation of each pixel's grain, where white is 1.
        variety: how much of their ranges place, size and angle use: at 0 shapes are central, of one size, and upright.
    """
    radius, angle, light, dark = (
        generator.uniform(least, most, len(labels))
        for least, most in (
            (7.5 - 2.5 * variety, 7.5 + 2.5 * variety),
            (0.0, 2 * np.pi * variety),
            (0.6, 1.0),
            (0.0, 0.35),
        )
    )
    centre = SIDE / 2 - 0.5 + variety * generator.uniform(-1, 1, (len(labels), 2)) * (SIDE / 2 - radius)[:, None]
    inside = cover(labels, NAMES, *frames(centre, radius, angle, SIDE, SIDE), radius[:, None, None])
    grain = noise * generator.standard_normal(inside.shape)
    grey = dark[:, None, None] + (light - dark)[:, None, None] * inside + grain
    return np.rint(255 * np.clip(grey, 0, 1)).astype(np.uint8)


class Shapes(DrawnPictures):
    """Ten shapes (`NAMES`), 28 x 28 grey, equally many of each.

    Args:
        variety: as in `draw`, in [0, 1].
        size, noise, draw_seed, settings: those of `DrawnPictures`.
    """

    num_classes: ClassVar[int] = len(NAMES)
    image_shape = (1, SIDE, SIDE)
    least_size = 4 * len(NAMES)

    def __init__(
        self, size: int = 6000, noise: float = 0.1, draw_seed: int = 0, variety: float = 1.0, **settings: Any
    ) -> None:
        super().__init__(size, noise, draw_seed, **settings)
        if not 0 <= variety <= 1:
            raise UserError(f"Shapes variety={variety} must be in [0, 1]")
        self.variety = variety

    def drawn(self, count: int, generator: np.random.Generator) -> Labelled:
        labels = np.arange(count, dtype=np.int64) % len(NAMES)
        return Labelled(draw(labels, self.noise, generator, self.variety), labels)
