"""Pictures of two or three textured objects on a textured ground, drawn on the spot, with the object of each pixel.

Shapes: N images, S pixels a side.
"""

from typing import ClassVar, NamedTuple

import numpy as np

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import Views
from lightspan.datamodules.image.sets.small import ImageData, Labelled

SIDE = 32
MOST = 3  # objects in a picture


class Segmented(NamedTuple):
    """images: uint8 [N, 3, S, S]; objects: int64 [N, S, S], 0 for the ground, else from 1 to the number of objects."""

    images: np.ndarray
    objects: np.ndarray


def draw(count: int, noise: float, generator: np.random.Generator) -> Segmented:
    """Ellipses and rectangles at random places, sizes and angles, each with stripes of its own two colours, as the
    ground has; later objects hide earlier ones, in part or, seldom, whole.

    Args:
        noise: standard deviation of each channel's grain, where white is 1.
    """
    y, x = np.mgrid[:SIDE, :SIDE]
    images, objects = _texture(x, y, count, generator), np.zeros((count, SIDE, SIDE), dtype=np.int64)
    for number in range(1, MOST + 1):
        centre, angle = generator.uniform(6, SIDE - 6, (count, 2)), generator.uniform(0, np.pi, count)
        radii, squares = generator.uniform(4.5, 9, (count, 2)), generator.random(count) < 0.5
        present = (number < MOST) | (generator.random(count) < 0.5)
        dx, dy = (axis - centre[:, i, None, None] for i, axis in enumerate((x, y)))
        cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
        u, v = (cos * dx + sin * dy) / radii[:, 0, None, None], (cos * dy - sin * dx) / radii[:, 1, None, None]
        inside = np.where(squares[:, None, None], np.maximum(abs(u), abs(v)) < 0.85, np.hypot(u, v) < 1)
        inside &= present[:, None, None]
        images = np.where(inside[:, None], _texture(x, y, count, generator), images)
        objects[inside] = number
    images = images + noise * generator.standard_normal(images.shape)
    return Segmented(np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8), objects)


def _texture(x: np.ndarray, y: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Stripes between two colours, float64 [N, 3, S, S] in [0, 1]."""
    first, second = generator.uniform(0, 1, (2, count, 3, 1, 1))
    angle, phase = generator.uniform(0, 2 * np.pi, (2, count, 1, 1))
    period = generator.uniform(2.5, 8, (count, 1, 1))
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + phase)
    return first + wave[:, None] * (second - first)


class TexturedScenes(ImageData):
    """Scenes of 32 x 32 pixels in colour, whose class says whether two or three objects can be seen (or fewer, where
    one hides another).

    Args:
        size: training images; a quarter as many are drawn for testing, from another stream.
        noise: as in `draw`, >= 0.
        draw_seed: of the pictures. `seed` is that of their order.
        batch_size, views, train_size, val_size, seed, num_workers: as in `ImageData`.
    """

    num_classes: ClassVar[int] = 2
    image_shape = (3, SIDE, SIDE)

    def __init__(
        self,
        batch_size: int = 128,
        views: Views | None = None,
        size: int = 4000,
        noise: float = 0.05,
        draw_seed: int = 0,
        train_size: int | None = None,
        val_size: int = 0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, views, train_size, val_size, seed, num_workers)
        if size < 4 or noise < 0 or draw_seed < 0:
            raise UserError(f"size={size} must be at least 4, and noise={noise} and draw_seed={draw_seed} at least 0")
        self.size, self.noise, self.draw_seed = size, noise, draw_seed

    def load(self) -> tuple[Labelled, Labelled]:
        return self._drawn(self.size, stream=0), self._drawn(self.size // 4, stream=1)

    def _drawn(self, count: int, stream: int) -> Labelled:
        scenes = draw(count, self.noise, np.random.default_rng((self.draw_seed, stream)))
        return Labelled(scenes.images, (scenes.objects.max(axis=(1, 2)) == MOST).astype(np.int64))
