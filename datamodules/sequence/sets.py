"""What sets of labelled sequences share: values or symbols in memory, and how they are divided.

Shapes: N sequences of a set, L steps, C numbers of a step.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightspan.datamodules.image.sets.small import evenly
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SplitSampleSets, require_enough, require_sizes
from lightspan.datamodules.sequence.batch import SequenceBatch
from lightspan.datamodules.text.batch import LabelledTextBatch


class ValueRows(NamedTuple):
    """rows: float32 [N, L, C], or uint8, of which 0 becomes -1 and 255 becomes 1; labels: int64 [N]."""

    rows: np.ndarray
    labels: np.ndarray

    def fields(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        scaled = row / np.float32(127.5) - 1 if row.dtype == np.uint8 else row
        return {"sequence": torch.from_numpy(np.ascontiguousarray(scaled, dtype=np.float32))}


class SymbolRows(NamedTuple):
    """rows: whole numbers [N, L], padded at the end; labels: int64 [N]; lengths: int64 [N], symbols that are not
    padding.
    """

    rows: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray

    def fields(self, index: int) -> dict[str, Tensor]:
        tokens = torch.from_numpy(self.rows[index].astype(np.int64))
        return {"tokens": tokens, "mask": (torch.arange(len(tokens)) < int(self.lengths[index])).long()}


Labelled = ValueRows | SymbolRows


def taken(data: Labelled, indices: np.ndarray) -> Labelled:
    """Some of the sequences."""
    return type(data)(*(column[indices] for column in data))


class SequenceSamples:
    """Samples of `SequenceBatch` or `LabelledTextBatch`. The seed is not used: a sequence has nothing random."""

    def __init__(self, data: Labelled) -> None:
        self.data = data

    @property
    def batch_type(self) -> type:
        return SequenceBatch if isinstance(self.data, ValueRows) else LabelledTextBatch

    def __len__(self) -> int:
        return len(self.data.labels)

    def labels(self) -> np.ndarray:
        return self.data.labels

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        label = torch.tensor(int(self.data.labels[index]))
        return {**self.data.fields(index), "label": label, "index": torch.tensor(index)}


class SequenceSets(SplitSampleSets):
    """A subclass names its classes and loads. Values give batches of `SequenceBatch`, symbols of `LabelledTextBatch`.

    Which sequences are trained on depends on `train_size` and `val_size` alone. Two recipes with equal ones, as for
    both stages of SPT, train on the same; none that is validated or tested on is among them, nor one that is equal to
    such.

    Args:
        train_size: train on this many, with the classes in turn; None uses all.
        val_size: validate on this many training sequences, held out, so that settings can be chosen without the test
            sequences. 0 trains on all and validates on the test sequences.
        settings: those of `SampleSets`.
    """

    num_classes: int
    train: SequenceSamples | None
    bank: SequenceSamples
    val: SequenceSamples

    def __init__(self, train_size: int | None = None, val_size: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        require_sizes(train_size, val_size)
        self.train_size, self.val_size = train_size, val_size
        self.train = None

    @abstractmethod
    def load(self) -> tuple[Labelled, Labelled]:
        """(training sequences, test sequences)."""

    def normalised(self, training: Labelled, *others: Labelled) -> list[Labelled]:
        """All sets, in whatever way follows from the sequences that are trained on; here as they are."""
        return [training, *others]

    def setup(self, stage: str | None = None) -> None:
        """Load and split, once. Raises: UserError if there are too few sequences for the requested sizes."""
        if self.train is not None:
            return
        training, test = self.load()
        named = f"training sequences of {type(self).__name__}"
        require_enough(self.train_size, self.val_size, len(training.labels), named)
        held = evenly(training.labels, self.val_size)
        validation = taken(training, held) if self.val_size else test
        training = taken(training, _apart(training, held, test))
        require_enough(self.train_size, 0, len(training.labels), f"{named} that are apart from those held out")
        training = taken(training, evenly(training.labels, self.train_size or len(training.labels)))
        sets = [SequenceSamples(data) for data in self.normalised(training, validation, test)]
        self.train, self.val, self.test = sets
        self.bank = self.train
        say(
            f"sequences: {type(self).__name__}, {len(self.train)} training, {len(self.val)} validation and "
            f"{len(self.test)} test sequences of {' x '.join(map(str, training.rows.shape[1:]))}"
        )


def _apart(training: Labelled, held: np.ndarray, test: Labelled) -> np.ndarray:
    """Indices of the training sequences that are neither held out nor equal to one that is."""
    left = np.ones(len(training.labels), dtype=bool)
    left[held] = False
    kept_out = {row.tobytes() for rows in (training.rows[held], test.rows) for row in rows}
    left &= np.array([row.tobytes() not in kept_out for row in training.rows], dtype=bool)
    return np.flatnonzero(left)


def stratified(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of (training sequences, test sequences): the last fifth of each class is for testing, one at least."""
    test: Sequence[np.ndarray] = [
        members[-max(1, len(members) // 5) :] for members in (np.flatnonzero(labels == k) for k in np.unique(labels))
    ]
    tested = np.sort(np.concatenate(test)) if len(test) else np.zeros(0, dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), tested), tested
