"""Blank pictures: what a run is planned or timed with where its data are not at hand."""

import math
from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.sets.small import ImageData, Labelled


class Blank(ImageData):
    """Black images whose labels take turns. Nothing can be learned from them.

    Args:
        classes: number of labels.
        shape: C, H, W.
        size: images for training; a quarter as many for testing.
        settings: those of `ImageData`.
    """

    def __init__(
        self, classes: int = 10, shape: tuple[int, int, int] = (3, 224, 224), size: int = 256, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if min(classes, size, *shape) < 1:
            raise UserError(f"Blank: classes={classes}, size={size} and shape={list(shape)} must each be at least 1")
        require_numbers(size * math.prod(shape), size=size, shape=shape)
        channels, height, width = shape
        self.num_classes, self.image_shape = classes, (channels, height, width)  # type: ignore[misc]
        self.size = size

    def load(self) -> tuple[Labelled, Labelled]:
        return self._of(self.size), self._of(max(1, self.size // 4))

    def _of(self, count: int) -> Labelled:
        return Labelled(np.zeros((count, *self.image_shape), np.uint8), np.arange(count) % self.num_classes)
