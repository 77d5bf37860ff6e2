"""What sets of pictures share that are drawn when a run starts."""

import math
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.sets.small import ImageData, Labelled


class DrawnPictures(ImageData):
    """Pictures that need no file. A subclass draws them.

    Args:
        size: training images, at least `least_size`; a quarter as many are drawn for testing, from another stream.
        noise: standard deviation of each channel's grain, where white is 1; >= 0.
        draw_seed: of the pictures, >= 0. `seed` is that of their order.
        settings: those of `ImageData`.
    """

    least_size: ClassVar[int] = 4

    def __init__(self, size: int, noise: float, draw_seed: int, **settings: Any) -> None:
        super().__init__(**settings)
        if size < self.least_size or noise < 0 or draw_seed < 0:
            raise UserError(
                f"{type(self).__name__} size={size} must be at least {self.least_size}, and noise={noise} and "
                f"draw_seed={draw_seed} at least 0"
            )
        require_numbers(size * math.prod(self.image_shape), size=size)
        self.size, self.noise, self.draw_seed = size, noise, draw_seed

    @abstractmethod
    def drawn(self, count: int, generator: np.random.Generator) -> Labelled:
        """So many pictures with their labels."""

    def load(self) -> tuple[Labelled, Labelled]:
        training, test = (np.random.default_rng((self.draw_seed, stream)) for stream in range(2))
        return self.drawn(self.size, training), self.drawn(self.size // 4, test)
