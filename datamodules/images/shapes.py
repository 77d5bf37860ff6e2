"""Pictures of ten shapes, drawn on the fly: known classes without a file.

Shapes: N images, S pixels per side.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from lightspan.datamodules.images.small import ImageData, Labelled
from lightspan.datamodules.images.views import Views
from lightspan.errors import UserError

SIDE = 28

# A shape's function is above 0 inside it, and falls with slope about 1 across the outline; u, v in units of its radius.
_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: 0.9 - np.hypot(u, v),
    "ring": lambda u, v: 0.2 - np.abs(np.hypot(u, v) - 0.75),
    "half disc": lambda u, v: np.minimum(1 - np.hypot(u, v), v + 0.1),
    "square": lambda u, v: 0.75 - np.maximum(np.abs(u), np.abs(v)),
    "frame": lambda u, v: 0.17 - np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.62),
    "triangle": lambda u, v: 0.5 - np.maximum(np.maximum(0.866 * u - 0.5 * v, -0.866 * u - 0.5 * v), v),
    "cross": lambda u, v: np.maximum(_box(u, v, 0.95, 0.25), _box(u, v, 0.25, 0.95)),
    "bar": lambda u, v: _box(u, v, 1.0, 0.3),
    "two bars": lambda u, v: _box(u, np.abs(v) - 0.5, 0.9, 0.22),
    "flower": lambda u, v: 0.65 + 0.3 * np.cos(5 * np.arctan2(v, u)) - np.hypot(u, v),
}
NAMES = tuple(_OUTLINES)


def _box(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.minimum(half_width - np.abs(u), half_height - np.abs(v))


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
    inside = cover([NAMES[label] for label in labels], centre, radius, angle)
    grain = noise * generator.standard_normal(inside.shape)
    grey = dark[:, None, None] + (light - dark)[:, None, None] * inside + grain
    return np.rint(255 * np.clip(grey, 0, 1)).astype(np.uint8)


def cover(names: Sequence[str], centre: np.ndarray, radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """The share of each pixel that lies inside a shape, so that outlines are smooth: float64 [N, S, S] in [0, 1].

    Args:
        names: the N shapes, see `NAMES`.
        centre: x and y in pixels, [N, 2].
        radius, angle: in pixels and radians, [N].
    """
    y, x = np.mgrid[:SIDE, :SIDE]
    inside, named = np.empty((len(names), SIDE, SIDE)), np.array(names)
    for name in set(names):
        of = named == name
        r, cos, sin = radius[of, None, None], np.cos(angle[of, None, None]), np.sin(angle[of, None, None])
        dx, dy = (x - centre[of, :1, None]) / r, (y - centre[of, 1:, None]) / r
        inside[of] = np.clip(0.5 + r * _OUTLINES[name](cos * dx + sin * dy, cos * dy - sin * dx), 0, 1)
    return inside


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
