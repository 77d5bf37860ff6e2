"""What data modules of pictures with many bands share: samples, moments of the training rows, loaders.

Shapes: N pictures, C bands, T dates, H W pixels.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SplitSampleSets, require_split
from lightspan.datamodules.multispectral.bands import Bands
from lightspan.datamodules.multispectral.batch import MultispectralBatch, MultispectralSeriesBatch
from lightspan.datamodules.multispectral.moments import BandMoments, band_moments
from lightspan.datamodules.multispectral.resampling import SpectralCrops

MEASURED = 2_000  # training pictures of which moments are taken, spread evenly


class Picture(Protocol):
    """Pictures by number: reflectance float32 [C H W], 0 where valid, bool [C H W], is False; and a label."""

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray, int]: ...


@dataclass(frozen=True)
class SpectralSamples:
    """Samples of `MultispectralBatch`: those of an album with these numbers, int64 [N]."""

    album: Picture
    numbers: np.ndarray
    moments: BandMoments
    crops: SpectralCrops | None = None

    @property
    def batch_type(self) -> type:
        # An album of series has dates.
        series = getattr(self.album, "dates", None) is not None
        return MultispectralSeriesBatch if series else MultispectralBatch

    def __len__(self) -> int:
        return len(self.numbers)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        values, valid, label = self.album.read(int(self.numbers[index]))
        image, seen = torch.from_numpy(values), torch.from_numpy(valid)
        if self.crops is not None:
            image, seen = self.crops(image, seen, seed)
        return {
            "image": self.moments.standardised(image, seen),
            "valid": seen.long(),
            "label": torch.tensor(label),
            "index": torch.tensor(index),
        }


@dataclass(frozen=True)
class FoundScenes:
    """What a data module found: all pictures; the numbers of those that train, validate and test, int64; names of the
    classes, none without labels; and what identifies the training pictures, with which alone a run resumes.
    """

    album: Picture
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    classes: Sequence[str]
    content: str


class SpectralSets(SplitSampleSets):
    """Pictures of many bands: batches of `MultispectralBatch`. A subclass finds them.

    Bands are standardised with mean and deviation of up to 2,000 training pictures, spread evenly, over their valid
    pixels alone.

    Args:
        bands: see `lightspan.datamodules.multispectral.bands.Bands`.
        batch_size: pictures of one optimiser step over all ranks.
        crops: random crops of a training picture; None trains on them as they are.
        settings: the others of `SampleSets`.

    Attributes:
        labelled: whether pictures have labels, None before `setup`; without, all labels are 0.
        classes: names of the classes.
        shown_bands: places of the bands that pictures of a batch show as red, green and blue.
    """

    def __init__(
        self,
        bands: Bands,
        batch_size: int = 128,
        crops: SpectralCrops | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size, **settings)
        self.bands, self.crops = bands, crops
        self.labelled: bool | None = None
        self.classes = tuple[str, ...]()
        self.train: SpectralSamples | None = None

    @property
    def shown_bands(self) -> tuple[int, int, int]:
        return self.bands.shown()

    @abstractmethod
    def find(self) -> FoundScenes:
        """Finds and splits the pictures."""

    def setup(self, stage: str | None = None) -> None:
        """Once. Raises: UserError where nothing is left to train or to validate on, and what `find` raises."""
        if self.train is not None:
            return
        found = self.find()
        require_split("readable pictures", train=found.train, val=found.val)
        taken = np.linspace(0, len(found.train) - 1, min(len(found.train), MEASURED)).astype(int)
        moments = band_moments((found.album.read(int(number))[:2] for number in found.train[taken]), len(self.bands))
        self.train = SpectralSamples(found.album, found.train, moments, self.crops)
        self.bank, self.val, self.test = (
            SpectralSamples(found.album, numbers, moments) for numbers in (found.train, found.val, found.test)
        )
        self.labelled, self.classes, self._content = bool(found.classes), tuple(found.classes), found.content
        shape = " x ".join(map(str, self.bank.sample(0, 0)["image"].shape))
        say(
            f"scenes: {len(found.train):,} pictures for training, {len(found.val):,} for validation and "
            f"{len(found.test):,} for testing, {shape}, "
            + (f"{len(self.classes):,} classes" if self.classes else "without labels")
        )

    def training_content(self) -> str:
        return self._content
