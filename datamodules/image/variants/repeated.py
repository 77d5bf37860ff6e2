"""An image set in which some images stand many times, each under a caption of its own: what a network memorises."""

import math
from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.sets.small import ImageData, Labelled


class RepeatedImages(ImageData):
    """The images of `source`, `count` of whose training images stand `times` times.

    Those have the labels source.num_classes, source.num_classes + 1, ... in the order of their draw, as captions; the
    rest keep their class, and stand once. The test images stay as they are.

    Args:
        source: the whole set; of its settings those count that say which images it has.
        count: images that are repeated, at least 1.
        times: each of them, at least 1.
        chosen_by: seed of the draw of the images.
        settings: those of `ImageData`.
    """

    def __init__(
        self, source: ImageData, count: int = 20, times: int = 200, chosen_by: int = 0, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if count < 1 or times < 1:
            raise UserError(f"RepeatedImages: count={count} and times={times} must each be at least 1")
        require_numbers(count * times * math.prod(source.image_shape), count=count, times=times)
        self.source, self.count, self.times, self.chosen_by = source, count, times, chosen_by
        self.num_classes, self.image_shape = source.num_classes + count, source.image_shape  # type: ignore[misc]

    def load(self) -> tuple[Labelled, Labelled]:
        """Raises: UserError where `source` has fewer images than are to be repeated."""
        training, test = self.source.load()
        if self.count > len(training.labels):
            raise UserError(
                f"RepeatedImages: count={self.count} is more than the {len(training.labels)} training images of "
                f"{type(self.source).__name__}"
            )
        chosen = np.random.default_rng(self.chosen_by).permutation(len(training.labels))[: self.count]
        rest = Labelled(*(np.delete(array, chosen, axis=0) for array in training))
        captions = self.source.num_classes + np.arange(self.count)
        images = np.concatenate([rest.images, np.repeat(training.images[chosen], self.times, axis=0)])
        labels = np.concatenate([rest.labels, np.repeat(captions, self.times)])
        return Labelled(images, labels.astype(np.int64)), test
