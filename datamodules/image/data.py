"""What data modules of the user's own pictures share: the split, the standardisation, the loaders.

Shapes: N pictures, S side in pixels.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.augment.fields import Place
from lightspan.datamodules.image.augment.views import Views, numbers_of_views
from lightspan.datamodules.image.sets.small import (
    ImageSamples,
    channel_moments,
    labelled_order,
    per_channel,
    require_moments,
    require_one_order,
)
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.loading.order import GroupSizes, Order
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SampleSets, require_split


class Album(Protocol):
    """Pictures of one size by number: uint8 [3, S, S] and a label each."""

    def read(self, number: int) -> tuple[np.ndarray, int]: ...


@dataclass(frozen=True)
class Chosen:
    """Some pictures of an album, as `ImageSamples` reads them. numbers: int64 [N]."""

    album: Album
    numbers: np.ndarray

    def total(self) -> int:
        return len(self.numbers)

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [N], where the album knows them without reading a picture."""
        labels: np.ndarray | None = getattr(self.album, "labels", None)
        return None if labels is None else labels[self.numbers]

    def read(self, number: int) -> tuple[np.ndarray, int]:
        return self.album.read(int(self.numbers[number]))


@dataclass(frozen=True)
class Found:
    """What a data module found.

    Attributes:
        album: all pictures.
        train, val: their numbers, int64, each in ascending order.
        labelled: whether labels mean anything; all are 0 otherwise.
        classes: their names, as far as they are known.
        content: what identifies the pixels and labels of `train`; a run resumes only with the same.
    """

    album: Album
    train: np.ndarray
    val: np.ndarray
    labelled: bool
    classes: Sequence[str]
    content: str


def held_out(names: Sequence[str], labels: np.ndarray, share: float) -> np.ndarray:
    """Which pictures validate: bool [N], about `share` of each class, at least one if the class has two.

    Pictures are taken in the order of a hash of their names, so that the choice depends on no seed, and adding pictures
    moves few of the others from one side to the other.
    """
    ranks = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
    chosen = np.zeros(len(names), dtype=bool)
    for label in np.unique(labels):
        members = sorted(np.flatnonzero(labels == label).tolist(), key=ranks.__getitem__)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        chosen[members[:count]] = True
    return chosen


class PictureData(SampleSets):
    """Pictures of the user's own. A subclass finds them.

    Training batches are `ViewsBatch` if `views` is given, else `ImageBatch`; all other batches are `ImageBatch`, always
    of 3 channels and of one size. Pictures are standardised with `mean` and `std`, or with the mean and deviation of up
    to `moment_pictures` training pictures, spread evenly. Order, ranks and resume are those of `ExactLoader`.

    Args:
        size: height and width of a picture in pixels.
        batch_size: pictures of one optimiser step over all ranks.
        views: makes the views of a training picture; None trains on the pictures themselves.
        val_share: share of each class held out for validation, in (0, 1); see `held_out`.
        views_on: "workers" makes views one picture at a time where batches are fetched; "device" makes those of a whole
            batch where the model is, from the same numbers.
        per_class: pictures of each class in a batch, see `lightspan.datamodules.loading.order.ClassBalanced`; None
            mixes all pictures.
        groups: pictures of one class that stand side by side, by epoch, see
            `lightspan.datamodules.loading.order.ClassGroups`; not with `per_class`.
        mean, std: of each channel of pixels in [0, 1]: those that a pretrained network was trained with. None takes
            those of the training pictures.
        settings: the others of `SampleSets`.

    Attributes:
        labelled: whether pictures have labels, None before `setup`; without, all labels are 0.
        classes: names of the classes, as far as they are known.
    """

    moment_pictures = 2_000

    def __init__(
        self,
        size: int = 64,
        batch_size: int = 128,
        views: Views | None = None,
        val_share: float = 0.1,
        views_on: Place = "workers",
        per_class: int | None = None,
        groups: GroupSizes | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size, **settings)
        require_one_order(per_class, groups)
        require_moments(mean, std)
        if size < 1:
            raise UserError(f"size={size} pixels is too small; it must be at least 1")
        require_numbers(numbers_of_views(views, size), size=size)
        if not 0 < val_share < 1:
            raise UserError(f"val_share={val_share} must be above 0 and below 1")
        self.size, self.views, self.val_share, self.views_on = size, views, val_share, views_on
        self.per_class, self.groups, self.mean, self.std = per_class, groups, mean, std
        self.labelled: bool | None = None
        self.classes = tuple[str, ...]()
        self.train: ImageSamples | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes as words, with spaces for underscores."""
        return tuple(name.replace("_", " ") for name in self.classes)

    @abstractmethod
    def find(self) -> Found:
        """Finds and splits the pictures; says what is unusual about them."""

    def setup(self, stage: str | None = None) -> None:
        """Once. Raises: UserError for less than a picture to train and one to validate with, and what `find` raises."""
        if self.train is not None:
            return
        found = self.find()
        require_split("readable pictures", train=found.train, val=found.val)
        mean, std = self._moments(found)
        train, val = (Chosen(found.album, numbers) for numbers in (found.train, found.val))
        self.train = ImageSamples(train, mean, std, self.views, self.views_on)
        self.train.fields.attach(self)
        self.bank, self.val = ImageSamples(train, mean, std), ImageSamples(val, mean, std)
        self.labelled, self.classes, self._content = found.labelled, tuple(found.classes), found.content
        say(
            f"pictures: {len(found.train):,} for training and {len(found.val):,} for validation, "
            f"{self.size} x {self.size}, "
            + (f"{len(self.classes):,} classes" if self.classes else "labelled" if self.labelled else "without labels")
        )

    def _moments(self, found: Found) -> tuple[torch.Tensor, torch.Tensor]:
        """What pictures are standardised with, each [3, 1, 1]."""
        if self.mean is not None and self.std is not None:
            return per_channel(self.mean), per_channel(self.std)
        taken = np.linspace(0, len(found.train) - 1, min(len(found.train), self.moment_pictures)).astype(int)
        return channel_moments(np.stack([found.album.read(int(number))[0] for number in found.train[taken]]))

    @property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Black and white after standardising: the least and greatest value of a picture, each [3, 1, 1]."""
        assert self.train is not None
        return -self.train.mean / self.train.std, (1 - self.train.mean) / self.train.std

    def test_dataloader(self) -> EvaluationLoader:
        """The validation pictures: no others are held out."""
        return self.val_dataloader()

    def training_content(self) -> str:
        return self._content

    def training_order(self) -> Order | None:
        assert self.train is not None
        return labelled_order(self.train, self, self.per_class, self.groups, self._content) or super().training_order()
