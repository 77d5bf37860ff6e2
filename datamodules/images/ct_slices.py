"""Pictures like slices of a chest CT, drawn on the spot: a body with lungs, organs and vessels, and perhaps a nodule.

Everything is an ellipse with soft edges, and classes differ in one nodule of a few pixels: what tells them apart is
small beside what all slices share, as in real ones.
Shapes: N images, S pixels a side.
"""

from typing import ClassVar

import numpy as np

from lightspan.datamodules.images.small import ImageData, Labelled
from lightspan.datamodules.images.views import Views
from lightspan.errors import UserError

CLASSES = ("none", "solid", "ring")
"""Of nodules: none, one that is dense throughout, one that is dense at its edge alone."""
VESSELS = 14


def draw(count: int, side: int, noise: float, generator: np.random.Generator) -> Labelled:
    """uint8 [N, 1, S, S], and int64 [N] in `CLASSES`, drawn evenly.

    Args:
        noise: standard deviation of the grain, where white is 1.
    """
    at_y, at_x = (axis.astype(np.float32) / side for axis in np.mgrid[:side, :side])

    def ellipse(y: np.ndarray, x: np.ndarray, high: np.ndarray, wide: np.ndarray, edge: float = 0.06) -> np.ndarray:
        """1 inside, 0 outside, with an edge that is soft by this share of the radius: [N S S]."""
        dy, dx = (at_y - y[:, None, None]) / high[:, None, None], (at_x - x[:, None, None]) / wide[:, None, None]
        return 1 / (1 + np.exp(np.clip((np.hypot(dy, dx) - 1) / edge, -50, 50)))

    def between(least: float, most: float) -> np.ndarray:
        return generator.uniform(least, most, count).astype(np.float32)

    y, x = between(0.47, 0.53), between(0.47, 0.53)
    image = 0.55 * ellipse(y, x, between(0.33, 0.4), between(0.42, 0.47))
    lungs = [
        (y + between(-0.04, 0.02), x + way * between(0.2, 0.23), between(0.2, 0.26), between(0.13, 0.16))
        for way in (-1, 1)
    ]
    for lung in lungs:
        image -= 0.42 * ellipse(*lung)
    image += 0.15 * ellipse(y + between(0.0, 0.06), x + between(-0.02, 0.05), between(0.09, 0.13), between(0.07, 0.1))
    image += 0.4 * ellipse(y + between(0.24, 0.27), x, between(0.04, 0.06), between(0.04, 0.06))

    def place(reach: float) -> tuple[np.ndarray, np.ndarray]:
        """Somewhere in one of the lungs, within this share of its radii."""
        angle, radius, right = between(0, 2 * np.pi), reach * np.sqrt(between(0, 1)), generator.random(count) < 0.5
        middle_y, middle_x, high, wide = (np.where(right, b, a) for a, b in zip(*lungs, strict=True))
        return middle_y + radius * high * np.sin(angle), middle_x + radius * wide * np.cos(angle)

    for _ in range(VESSELS):
        size = between(0.008, 0.02)
        image += between(0.15, 0.45)[:, None, None] * ellipse(*place(0.9), size, size * between(1, 2.5), 0.3)
    label, (nodule_y, nodule_x), size = generator.integers(0, len(CLASSES), count), place(0.7), between(0.045, 0.07)
    solid, hole = (ellipse(nodule_y, nodule_x, share * size, share * size, 0.15) for share in (1.0, 0.55))
    strength = between(0.3, 0.45)[:, None, None]
    image += strength * np.where((label > 0)[:, None, None], solid - np.where((label == 2)[:, None, None], hole, 0), 0)
    image += noise * generator.standard_normal(image.shape, dtype=np.float32)
    return Labelled(np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)[:, None], label.astype(np.int64))


class CTSlices(ImageData):
    """Drawn slices of a chest, whose class says which nodule they show; see `draw`.

    Args:
        size: training images, at least 4; a quarter as many are drawn for testing, from another stream.
        side: in pixels, at least 16.
        noise: as in `draw`, >= 0.
        draw_seed: of the pictures. `seed` is that of their order.
        batch_size, views, train_size, val_size, seed, num_workers: as in `ImageData`.
    """

    num_classes: ClassVar[int] = len(CLASSES)

    def __init__(
        self,
        batch_size: int = 64,
        views: Views | None = None,
        size: int = 2000,
        side: int = 64,
        noise: float = 0.04,
        draw_seed: int = 0,
        train_size: int | None = None,
        val_size: int = 0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, views, train_size, val_size, seed, num_workers)
        if size < 4 or side < 16 or noise < 0 or draw_seed < 0:
            raise UserError(
                f"CTSlices: size={size} must be at least 4, side={side} at least 16, and noise={noise} and draw_seed="
                f"{draw_seed} at least 0"
            )
        self.size, self.noise, self.draw_seed = size, noise, draw_seed
        self.image_shape = (1, side, side)  # type: ignore[misc]

    def load(self) -> tuple[Labelled, Labelled]:
        return self._drawn(self.size, stream=0), self._drawn(self.size // 4, stream=1)

    def _drawn(self, count: int, stream: int) -> Labelled:
        return draw(count, self.image_shape[1], self.noise, np.random.default_rng((self.draw_seed, stream)))
