"""Constant sequences: what a run is planned or timed with where its data are not at hand."""

from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.sequence.sets import Labelled, SequenceSets, ValueRows


class BlankSequences(SequenceSets):
    """Sequences of one value each, which tells all of them apart, and labels in turn, which follow from nothing.

    Args:
        length, channels: L and C.
        classes: number of labels.
        size: sequences for training; a quarter as many for testing.
        settings: those of `SequenceSets`.
    """

    def __init__(
        self, length: int = 1024, channels: int = 1, classes: int = 10, size: int = 256, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if min(length, channels, classes, size) < 1:
            raise UserError(
                f"BlankSequences length={length}, channels={channels}, classes={classes} and size={size} must be at "
                "least 1"
            )
        require_numbers(size * length * channels, size=size, length=length, channels=channels)
        self.shape, self.num_classes, self.size = (length, channels), classes, size

    def load(self) -> tuple[Labelled, Labelled]:
        count = self.size + max(1, self.size // 4)
        values_N11 = np.linspace(-1, 1, count, dtype=np.float32)[:, None, None]
        rows, labels = np.tile(values_N11, (1, *self.shape)), np.arange(count) % self.num_classes
        training, test = slice(self.size), slice(self.size, None)
        return ValueRows(rows[training], labels[training]), ValueRows(rows[test], labels[test])
