"""Pictures of two or three textured objects on a textured ground, drawn on the spot, with the object of each pixel.

Shapes: N images, S pixels a side.
"""

from typing import Any, ClassVar, NamedTuple

import numpy as np

from lightspan.datamodules.image.sets.drawn import DrawnPictures
from lightspan.datamodules.image.sets.small import Labelled

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


class TexturedScenes(DrawnPictures):
    """Scenes of 32 x 32 pixels in colour, whose class says whether two or three objects can be seen (or fewer, where
    one hides another).

    Args:
        size, noise, draw_seed, settings: those of `DrawnPictures`.
    """

    num_classes: ClassVar[int] = 2
    image_shape = (3, SIDE, SIDE)

    def __init__(self, size: int = 4000, noise: float = 0.05, draw_seed: int = 0, **settings: Any) -> None:
        super().__init__(size, noise, draw_seed, **settings)

    def drawn(self, count: int, generator: np.random.Generator) -> Labelled:
        scenes = draw(count, self.noise, generator)
        return Labelled(scenes.images, (scenes.objects.max(axis=(1, 2)) == MOST).astype(np.int64))
