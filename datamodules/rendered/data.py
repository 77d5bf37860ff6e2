"""What data modules of rendered samples share: sets of numbers that never meet, batches drawn at once, moments.

Nothing is kept in memory: a sample is drawn again whenever it is asked for, from (draw_seed, number).
Shapes: B samples.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.sets.small import channel_moments
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SplitSampleSets
from lightspan.datamodules.loading.workers import Dataset

MOST = 2**32  # samples of a set
SEEDS = 2**63
PARTS = {"training": 0, "validation": MOST, "test": 2 * MOST}  # their first numbers
MEASURED = 128  # pictures from which moments are taken


class ChannelMoments(NamedTuple):
    """Mean and standard deviation of each channel in [0, 1], float32 [C, 1, 1]."""

    mean: Tensor
    std: Tensor

    def standardised(self, images: np.ndarray) -> Tensor:
        """float32 of uint8 [..., C, H, W]."""
        return (torch.from_numpy(images).float() / 255 - self.mean) / self.std


class RenderedSamples(ABC):
    """The samples with the numbers from `first` on. `index` in a batch counts from 0."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    @abstractmethod
    def draw(self, numbers: np.ndarray, seeds: np.ndarray) -> dict[str, Any]:
        """Fields of a batch, tensors [B, ...] or lists of them, as a function of each row's number and seed alone.

        Args:
            numbers: int64 [B].
            seeds: int64 [B], of what is random anew in each epoch; most samples have no such thing.
        """

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
        index = np.asarray(indices, dtype=np.int64)
        fields = self.draw(self.first + index, np.asarray(seeds, dtype=np.int64))
        return {**fields, "index": torch.from_numpy(index)}

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        batch = self.batch([index], [seed])
        return {name: [x[0] for x in field] if isinstance(field, list) else field[0] for name, field in batch.items()}


class DrawnSets(SplitSampleSets):
    """Loaders of three sets of drawn samples that share none.

    Args:
        size, val_size, test_size: samples of the sets, at least 1 and at most the limit of numbers. Each set's first
            samples stay the same when it grows, and the others with them.
        batch_size: samples of one optimiser step over all ranks.
        draw_seed: of the samples, in [0, 2**63).
        settings: the others of `SampleSets`.
    """

    def __init__(
        self,
        size: int = 8192,
        val_size: int = 1024,
        test_size: int = 1024,
        batch_size: int = 128,
        draw_seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size, **settings)
        if not all(1 <= count <= MOST for count in (size, val_size, test_size)) or not 0 <= draw_seed < SEEDS:
            raise UserError(
                f"size={size}, val_size={val_size} and test_size={test_size} must be in [1, {MOST}], and "
                f"draw_seed={draw_seed} in [0, 2**63)"
            )
        require_numbers(max(size, val_size, test_size), size=size, val_size=val_size, test_size=test_size)
        self.size, self.val_size, self.test_size, self.draw_seed = size, val_size, test_size, draw_seed

    @abstractmethod
    def sets(self) -> Callable[[int, int], Dataset]:
        """(first number, count) -> the samples of a set."""

    @abstractmethod
    def described(self) -> str:
        """What a sample is, for a line; called after `sets`."""

    def setup(self, stage: str | None = None) -> None:
        """Makes the sets, once."""
        if self.train is not None:
            return
        make = self.sets()
        sizes = dict(zip(PARTS, (self.size, self.val_size, self.test_size), strict=True))
        self.train, self.val, self.test = (make(PARTS[name], sizes[name]) for name in PARTS)
        self.bank = self.train
        say(
            f"rendered: {type(self).__name__}, {self.size} training, {self.val_size} validation and {self.test_size} "
            f"test samples of {self.described()}"
        )


def require_pictures(numbers: int, **settings: object) -> None:
    """Raises: UserError for pictures of so many numbers each that those which are measured are above the limit."""
    require_numbers(MEASURED * numbers, **settings)


class RenderedSets(DrawnSets):
    """Sets of pictures, which are standardised by the channels of the first training pictures."""

    @abstractmethod
    def pictures(self, numbers: np.ndarray) -> np.ndarray:
        """uint8 [B, C, H, W]: the pictures with these numbers, of which the training set's give the moments."""

    def moments(self, numbers: np.ndarray) -> ChannelMoments:
        """Of the training set, measured on the samples with these numbers."""
        return ChannelMoments(*channel_moments(self.pictures(numbers)))

    def image_sides(self) -> tuple[int, ...]:
        """Channels, sides and what else a sample's image has."""
        return self.pictures(np.arange(1)).shape[1:]

    @abstractmethod
    def samples(self, first: int, count: int, moments: ChannelMoments) -> RenderedSamples:
        """The samples of a set."""

    def sets(self) -> Callable[[int, int], RenderedSamples]:
        moments = self.moments(np.arange(min(self.size, MEASURED)))
        return lambda first, count: self.samples(first, count, moments)

    def described(self) -> str:
        return " x ".join(map(str, self.image_sides()))
