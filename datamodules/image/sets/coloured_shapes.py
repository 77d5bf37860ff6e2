"""Pictures with three known factors, drawn on the spot: 4 shapes in 4 colours with 4 textures, 64 classes.

Shapes: N images, S pixels a side, A x B factors.
"""

from typing import Any, ClassVar

import numpy as np

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import Views
from lightspan.datamodules.image.sets.shapes import SIDE
from lightspan.datamodules.image.sets.small import ImageData, Labelled
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


class ColouredShapes(ImageData):
    """64 classes of coloured, textured shapes, 28 x 28 in colour, as many of each; `factors` tells a class's factors.

    Args:
        size: training images; a quarter as many are drawn for testing, from another stream.
        noise: as in `draw`, >= 0.
        draw_seed: of the pictures. `seed` is that of their order.
        batch_size, views, settings: those of `ImageData`.
    """

    num_classes: ClassVar[int] = CLASSES
    image_shape = (3, SIDE, SIDE)

    def __init__(
        self,
        batch_size: int = 128,
        views: Views | None = None,
        size: int = 6400,
        noise: float = 0.05,
        draw_seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size, views, **settings)
        if size < 4 * CLASSES or noise < 0 or draw_seed < 0:
            raise UserError(
                f"size={size} must be at least {4 * CLASSES}, and noise={noise} and draw_seed={draw_seed} at least 0"
            )
        self.size, self.noise, self.draw_seed = size, noise, draw_seed

    def load(self) -> tuple[Labelled, Labelled]:
        return self._drawn(self.size, stream=0), self._drawn(self.size // 4, stream=1)

    def _drawn(self, count: int, stream: int) -> Labelled:
        labels = np.arange(count, dtype=np.int64) % CLASSES
        return Labelled(draw(labels, self.noise, np.random.default_rng((self.draw_seed, stream))), labels)
