"""Pictures of ten shapes, drawn on the fly: known classes without a file.

Shapes: N images, S pixels per side.
"""

from typing import Any, ClassVar

import numpy as np

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import Views
from lightspan.datamodules.image.sets.small import ImageData, Labelled
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


class Shapes(ImageData):
    """Ten shapes (`NAMES`), 28 x 28 grey, equally many of each.

    Args:
        size: training images; a quarter as many are drawn for testing, from another stream.
        noise, variety: as in `draw`; noise >= 0, variety in [0, 1].
        draw_seed: seed of the pictures. `seed` is that of their order.
        batch_size, views, settings: those of `ImageData`.
    """

    num_classes: ClassVar[int] = len(NAMES)
    image_shape = (1, SIDE, SIDE)

    def __init__(
        self,
        batch_size: int = 128,
        views: Views | None = None,
        size: int = 6000,
        noise: float = 0.1,
        draw_seed: int = 0,
        variety: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size, views, **settings)
        if size < 4 * len(NAMES) or noise < 0 or draw_seed < 0 or not 0 <= variety <= 1:
            raise UserError(
                f"size={size} must be at least {4 * len(NAMES)}, noise={noise} and draw_seed={draw_seed} at least 0, "
                f"and variety={variety} in [0, 1]"
            )
        self.size, self.noise, self.draw_seed, self.variety = size, noise, draw_seed, variety

    def load(self) -> tuple[Labelled, Labelled]:
        return self._drawn(self.size, stream=0), self._drawn(self.size // 4, stream=1)

    def _drawn(self, count: int, stream: int) -> Labelled:
        labels = np.arange(count, dtype=np.int64) % len(NAMES)
        generator = np.random.default_rng((self.draw_seed, stream))
        return Labelled(draw(labels, self.noise, generator, self.variety), labels)
