"""Pictures of a folder as an image set in memory, for data modules that divide or change such sets."""

from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.datamodules.image.data import PictureData
from lightspan.datamodules.image.sets.small import ImageData, Labelled


class PicturesInMemory(ImageData):
    """All pictures of `source`, decoded: 3 size^2 bytes each, 150 kB at 224 pixels. Its validation pictures test.

    Args:
        source: labelled pictures, such as `lightspan.datamodules.image.folder.ImageFolder`; of its settings those
            count that say which pictures it has and at which size.
        num_classes: of its labels.
        settings: those of `ImageData`.
    """

    def __init__(self, source: PictureData, num_classes: int, **settings: object) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        if num_classes < 1:
            raise UserError(f"PicturesInMemory num_classes={num_classes} must be at least 1")
        self.source = source
        self.num_classes, self.image_shape = num_classes, (3, source.size, source.size)  # type: ignore[misc]

    def load(self) -> tuple[Labelled, Labelled]:
        """Raises: UserError for pictures without labels, or of more classes."""
        self.source.setup()
        if not self.source.labelled:
            raise UserError(
                f"PicturesInMemory needs labelled pictures, and {type(self.source).__name__} found none; put the "
                "pictures of each class into a folder of its name"
            )
        parts: list[Any] = [self.source.bank, self.source.val]
        found = [_decoded(part.data) for part in parts]
        if (most := 1 + max(int(part.labels.max()) for part in found)) > self.num_classes:
            raise UserError(f"PicturesInMemory num_classes={self.num_classes}, but the pictures have {most} classes")
        return found[0], found[1]


def _decoded(pictures: object) -> Labelled:
    read = [pictures.read(number) for number in range(pictures.total())]  # type: ignore[attr-defined]
    images, labels = zip(*read, strict=True)
    return Labelled(np.stack(images), np.array(labels, dtype=np.int64))
