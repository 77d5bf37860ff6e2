"""Pictures as sequences of their pixels, row by row: nothing tells a network of rows and columns."""

from typing import Any

import numpy as np

from lightspan.datamodules.image.sets.small import ImageData
from lightspan.datamodules.image.sets.small import Labelled as Pictures
from lightspan.datamodules.sequence.sets import Labelled, SequenceSets, ValueRows


class PixelSequences(SequenceSets):
    """The pictures of `source`, [H * W, C] in [-1, 1], as Long Range Arena's Image task has them of CIFAR-10 in grey.

    Args:
        source: a set of pictures; of its settings those count that say which pictures it has.
        settings: those of `SequenceSets`.
    """

    def __init__(self, source: ImageData, **settings: Any) -> None:
        super().__init__(**settings)
        self.source, self.num_classes = source, source.num_classes

    def load(self) -> tuple[Labelled, Labelled]:
        training, test = self.source.load()
        return _as_sequences(training), _as_sequences(test)


def _as_sequences(pictures: Pictures) -> ValueRows:
    images = pictures.images if pictures.images.ndim == 4 else pictures.images[:, None]
    rows = images.reshape(len(images), images.shape[1], -1).transpose(0, 2, 1)
    return ValueRows(np.ascontiguousarray(rows), pictures.labels)
