"""Pictures with three known factors, drawn on the spot: 4 shapes in 4 colours with 4 textures, 64 classes.

Shapes: N images, S pixels a side, A x B factors.
"""

from typing import Any, ClassVar

import numpy as np

from lightspan.datamodules.image.sets.drawn import DrawnPictures
from lightspan.datamodules.image.sets.shapes import SIDE
from lightspan.datamodules.image.sets.small import Labelled
from lightspan.datamodules.rendered.outlines import cover, frames
from lightspan.datamodules.rendered.textures import TEXTURES, woven

SHAPES = ("disc", "square", "triangle", "cross")
COLOURS = {"red": (1.0, 0.2, 0.2), "green": (0.2, 0.9, 0.2), "blue": (0.25, 0.35, 1.0), "yellow": (0.95, 0.85, 0.15)}
CLASSES = len(SHAPES) * len(COLOURS) * len(TEXTURES)
PERIOD = 5.0  # of a texture, in pixels


def factors(labels: np.ndarray) -> np.ndarray:
    """Shape, colour and texture of each class, int64 [N, 3], each in [0, 4)."""
    return np.stack(np.unravel_index(labels, (len(SHAPES), len(COLOURS), len(TEXTURES))), axis=1)


def draw(labels: np.ndarray, noise: float, generator: np.random.Generator) -> np.ndarray:
    """One picture a class, uint8 [N, 3, S, S]: place, size, angle, shade, ground and the texture's phase are random.

    Args:
        labels: int64 [N], each in [0, 64).
        noise: standard deviation of each channel's grain, where white is 1.
    """
    return draw_with_masks(labels, noise, generator)[0]


def draw_with_masks(labels: np.ndarray, noise: float, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of `draw`, and the share of each pixel that lies inside the shape, float64 [N, S, S] in [0, 1]."""
    shape, colour, texture = factors(labels).T
    count = len(labels)
    radius, angle = generator.uniform(6, 10, count), generator.uniform(0, 2 * np.pi, count)
    centre = SIDE / 2 - 0.5 + generator.uniform(-1, 1, (count, 2)) * (SIDE / 2 - radius)[:, None]
    inside = cover(shape, SHAPES, *frames(centre, radius, angle, SIDE, SIDE), radius[:, None, None])
    inside_N1SS = inside[:, None]
    paint = np.array([*COLOURS.values()])[colour] + generator.uniform(-0.12, 0.12, (count, 3))
    light = generator.uniform(0.6, 1.0, (count, 1, 1)) * (0.25 + 0.75 * _textured(texture, generator))
    ground = generator.uniform(0, 0.35, (count, 3, 1, 1))
    image = ground + inside_N1SS * (paint[:, :, None, None] * light[:, None] - ground)
    image += noise * generator.standard_normal(image.shape)
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8), inside


def _textured(texture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """How bright each pixel is by its texture alone, [N, S, S] in [0, 1]."""
    y, x = np.mgrid[:SIDE, :SIDE] * (2 * np.pi / PERIOD)
    angle, first, second = generator.uniform(0, 2 * np.pi, (3, len(texture), 1, 1))
    a, b = (np.sin(x * np.cos(t) + y * np.sin(t) + phase) for t, phase in ((angle, first), (angle + np.pi / 2, second)))
    return woven(texture, a, b)


class ColouredShapes(DrawnPictures):
    """64 classes of coloured, textured shapes, 28 x 28 in colour, as many of each; `factors` tells a class's factors.

    Args:
        size, noise, draw_seed, settings: those of `DrawnPictures`.
    """

    num_classes: ClassVar[int] = CLASSES
    image_shape = (3, SIDE, SIDE)
    least_size = 4 * CLASSES

    def __init__(self, size: int = 6400, noise: float = 0.05, draw_seed: int = 0, **settings: Any) -> None:
        super().__init__(size, noise, draw_seed, **settings)

    def drawn(self, count: int, generator: np.random.Generator) -> Labelled:
        labels = np.arange(count, dtype=np.int64) % CLASSES
        return Labelled(draw(labels, self.noise, generator), labels)
