"""Some classes of an image set as a separate set: one task of several."""

from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.small import ImageData, Labelled


class ClassSubset(ImageData):
    """The images of `source` whose label is in `classes`. Labels stay as they are, so tasks can share one table.

    Args:
        source: the whole set; only its settings that determine which images it has are used.
        classes: labels to keep, each in [0, source.num_classes).
        settings: those of `ImageData`; the images are standardised with their own moments.
    """

    def __init__(self, source: ImageData, classes: list[int], **settings: Any) -> None:
        super().__init__(**settings)
        if not classes or not set(classes) <= set(range(source.num_classes)):
            raise UserError(
                f"classes={classes} must name labels of {type(source).__name__}, from 0 to {source.num_classes - 1}"
            )
        self.source, self.classes = source, sorted(set(classes))
        self.num_classes, self.image_shape = source.num_classes, source.image_shape  # type: ignore[misc]

    def load(self) -> tuple[Labelled, Labelled]:
        training, test = self.source.load()
        return self._kept(training), self._kept(test)

    def _kept(self, data: Labelled) -> Labelled:
        kept = np.isin(data.labels, self.classes)
        return Labelled(data.images[kept], data.labels[kept])
