"""What data modules share that find samples of one kind in an archive: a folder, an installed data set, a list.

Shapes: N samples.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SampleSets, require_split
from lightspan.datamodules.loading.workers import Dataset

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Archive(Protocol[T_co]):
    """Samples by number."""

    @property
    def labels(self) -> np.ndarray:
        """int64 [N]."""
        ...

    def read(self, number: int) -> T_co: ...


@dataclass(frozen=True)
class KeptSamples(Generic[T]):
    """Samples in memory. given: their labels, int64 [N]; None is 0 for all."""

    samples: Sequence[T]
    given: np.ndarray | None = None

    @cached_property
    def labels(self) -> np.ndarray:
        return np.zeros(len(self.samples), np.int64) if self.given is None else self.given

    def read(self, number: int) -> T:
        return self.samples[number]


@dataclass(frozen=True)
class ArchiveSamples(Generic[T]):
    """Some samples of an archive, as a loader draws them. A subclass says what becomes of one.

    Args:
        numbers: of the archive's samples, int64 [N].
    """

    archive: Archive[T]
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def labels(self) -> np.ndarray:
        """int64 [N]."""
        return self.archive.labels[self.numbers]


class FoundSamples(NamedTuple, Generic[T]):
    """What a data module found: all samples; the numbers of those that train and validate, int64, ascending; names of
    the classes, none without labels; what identifies the training samples, with which alone a run resumes; and what
    the samples are called, if they have names.
    """

    archive: Archive[T]
    train: np.ndarray
    val: np.ndarray
    classes: Sequence[str]
    content: str
    names: Sequence[str] = ()


class FoundSets(SampleSets, Generic[T]):
    """A subclass finds the samples, and says how they are served in training and elsewhere.

    Args:
        settings: those of `SampleSets`.

    Attributes:
        labelled: whether samples have labels, None before `setup`; without, all labels are 0.
        classes: their names.
    """

    called: ClassVar[str]
    """What the samples are, such as "clouds"."""

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.labelled: bool | None = None
        self.classes = tuple[str, ...]()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes as words, with spaces for underscores."""
        return tuple(name.replace("_", " ") for name in self.classes)

    @abstractmethod
    def find(self) -> FoundSamples[T]:
        """Finds and splits the samples; says what is unusual about them."""

    @abstractmethod
    def training(self, archive: Archive[T], numbers: np.ndarray) -> Dataset:
        """Training samples of these numbers."""

    @abstractmethod
    def unchanging(self, archive: Archive[T], numbers: np.ndarray) -> Dataset:
        """Samples of these numbers without anything random."""

    @abstractmethod
    def described(self) -> str:
        """What a sample is made of, such as "crops of 8 x 8 x 8 voxels"."""

    def setup(self, stage: str | None = None) -> None:
        """Once. Raises: UserError where nothing is left to train or to validate on, and what `find` raises."""
        if self.train is not None:
            return
        found = self.find()
        require_split(f"readable {self.called}", train=found.train, val=found.val)
        self.train = self.training(found.archive, found.train)
        self.bank, self.val = (self.unchanging(found.archive, numbers) for numbers in (found.train, found.val))
        self.labelled, self.classes, self._content = bool(found.classes), tuple(found.classes), found.content
        self.sample_names = [found.names[number] for number in found.train] if found.names else []
        say(
            f"{self.called}: {len(found.train):,} for training and {len(found.val):,} for validation, "
            f"{self.described()}, " + (f"{len(self.classes):,} classes" if self.classes else "without labels")
        )

    def test_dataloader(self) -> EvaluationLoader:
        """The validation samples: no others are held out."""
        return self.val_dataloader()

    def training_content(self) -> str:
        return self._content
