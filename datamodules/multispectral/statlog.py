"""Real pixels of Landsat MSS with what grows there: the Statlog data, from the R package mlbench."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightspan.core.files.places import ReadPath
from lightspan.datamodules.loading.sample_sets import require_enough, require_sizes
from lightspan.datamodules.multispectral.bands import Bands
from lightspan.datamodules.multispectral.data import FoundScenes, SpectralSets
from lightspan.datamodules.r_data import read_r_data

TEST = 2_000
CLASSES = (
    "red soil",
    "cotton crop",
    "grey soil",
    "damp grey soil",
    "vegetation stubble",
    "very damp grey soil",
)


@dataclass(frozen=True)
class StatlogWindows:
    """Pictures in memory: float32 [N C 3 3], bool [N C 3 3] and int64 [N]."""

    values: np.ndarray
    valid: np.ndarray
    labels: np.ndarray

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        return self.values[number], self.valid[number], int(self.labels[number])


class StatlogLandsat(SpectralSets):
    """6,435 windows of 3 x 3 pixels of 80 m in four bands, each with the class of its middle pixel, of six.

    Source: Srinivasan, "Statlog (Landsat Satellite)", UCI Machine Learning Repository, 1993. The last 2,000 test, as
    there. Windows overlap: nothing is said of where they lie, so one that tests may share pixels with one that trains.

    Args:
        library: folder of R packages that contains mlbench; None searches the usual places.
        bands: None takes all four, as numbers from 0 to 1.
        val_size: windows held out from training for validation, at least 1.
        split_seed: of which these are.
        settings: those of `SpectralSets`.
    """

    num_classes = len(CLASSES)

    def __init__(
        self,
        library: ReadPath | None = None,
        bands: Bands | None = None,
        val_size: int = 500,
        split_seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(bands or Bands("landsat-mss", scale=1 / 255), **settings)
        require_sizes(None, val_size)
        self.library, self.val_size, self.split_seed = library, val_size, split_seed

    def find(self) -> FoundScenes:
        (table,) = read_r_data("mlbench", ("Satellite",), self.library)
        names = table.pop("classes").astype(str)
        labels = names.map({name: number for number, name in enumerate(CLASSES)}).to_numpy(dtype=np.int64)
        # Rows list the pixels row by row, each with its four bands.
        stored = table.to_numpy(dtype=np.float32).reshape(-1, 3, 3, 4).transpose(3, 0, 1, 2)
        values, valid = self.bands.reflectance(stored)
        values, valid = (np.ascontiguousarray(part.transpose(1, 0, 2, 3)) for part in (values, valid))
        album = StatlogWindows(values, valid, labels)
        rest = len(labels) - TEST
        require_enough(None, self.val_size, rest, "training windows of StatlogLandsat")
        order = np.random.default_rng(self.split_seed).permutation(rest)
        train, val = np.sort(order[self.val_size :]), np.sort(order[: self.val_size])
        digest = hashlib.sha256(album.values[train].tobytes() + labels[train].tobytes()).hexdigest()[:32]
        return FoundScenes(album, train, val, np.arange(rest, len(labels)), CLASSES, digest)
