"""What data modules of volumes share: crops, their augmentation, the loaders.

Shapes: N volumes, C channels, D H W voxels, V crops, of which K are base crops and M at random places.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.augment.views import numbers_of_views
from lightspan.datamodules.loading.found_sets import Archive, ArchiveSamples, FoundSets
from lightspan.datamodules.loading.on_device import finish_on_device
from lightspan.datamodules.volume.augment import NO_LABEL, AlteredVolumes, VolumeAugmentation, bits
from lightspan.datamodules.volume.batch import VolumeBatch, VolumeViewsBatch
from lightspan.datamodules.volume.slices import SliceViews

T = TypeVar("T", int, float)


class Volume(NamedTuple):
    """A volume as it is kept.

    values: floats [C D H W], often mapped from a file.
    present: bool [C]; a channel that is missing is 0.
    segmentation: whole numbers [D H W], -1 where a voxel has no label; None where the data have none.
    affine: of (d, h, w, 1) to millimetres (right, anterior, superior, 1), float64 [4, 4].
    label: 0 without labels.
    """

    values: np.ndarray
    present: np.ndarray
    segmentation: np.ndarray | None
    affine: np.ndarray
    label: int


def cropped(values: np.ndarray, corner: Sequence[int], size: Sequence[int], fill: float | bool) -> np.ndarray:
    """A copy of the crop [... *size] whose first voxel is `corner`, which may be negative; `fill` is what lies outside.

    Args:
        values: [... D H W].
    """
    crop = np.full((*values.shape[:-3], *size), fill, values.dtype)
    inside: list[Any] = [...]
    there: list[Any] = [...]
    for first, side, length in zip(corner, size, values.shape[-3:], strict=True):
        start, stop = (min(max(at, 0), length) for at in (first, first + side))  # equal where the crop lies outside
        inside.append(slice(start, stop))
        there.append(slice(start - first, stop - first))
    crop[tuple(there)] = values[tuple(inside)]
    return crop


def overlaps(corners_M3: np.ndarray, bases_K3: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The share of the voxels of each crop that lie in each base crop, float64 [M K]; all are of one size.

    Args:
        corners_M3, bases_K3: first voxels, whole numbers.
        size: (D, H, W).
    """
    apart_MK3 = np.abs(corners_M3[:, None] - bases_K3[None]) / np.array(size)
    return np.maximum(1 - apart_MK3, 0).prod(axis=2)


def along_axes(one_or_three: T | tuple[T, T, T] | list[T], name: str = "size") -> tuple[T, T, T]:
    """The setting `name` for each of D, H and W. Raises: UserError for any number of values but 1 and 3."""
    if not isinstance(one_or_three, (tuple, list)):
        return one_or_three, one_or_three, one_or_three
    if len(one_or_three) != 3:
        raise UserError(f"{name}={one_or_three} must be one number, or three for D, H and W")
    first, second, third = one_or_three
    return first, second, third


@dataclass(frozen=True)
class VolumeSamples(ArchiveSamples[Volume]):
    """Samples of `VolumeBatch`, or with `crops` of `VolumeViewsBatch`: a function of number and seed.

    Args:
        size: of a crop, (D, H, W).
        random: whether crops are anywhere, or in the middle.
        crops: V; None is one, as `volume`, with its segmentation.
        augment: what is drawn for each crop, and made on the device.
        bases: cells along D, H and W of a grid in the middle of the volume, each a crop and a view before the V at
            random places, which then lie anywhere within the grid; None is no grid.
        tells_inside: whether single crops say which of their voxels do not pad the volume.
        slices: which slices of the first crop are images too, with views.
    """

    size: tuple[int, int, int]
    random: bool = False
    crops: int | None = None
    augment: VolumeAugmentation | None = None
    bases: tuple[int, int, int] | None = None
    tells_inside: bool = False
    slices: SliceViews | None = None

    @property
    def batch_type(self) -> type:
        return VolumeBatch if self.crops is None else VolumeViewsBatch

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        volume, generator = self.archive.read(int(self.numbers[index])), np.random.default_rng(seed)
        sides = volume.values.shape[1:]
        bases_K3, random_V3 = self._corners(sides, generator)
        corners_V3 = bases_K3 + random_V3
        views = [
            torch.from_numpy(cropped(volume.values, corner, self.size, 0).astype(np.float32)) for corner in corners_V3
        ]
        spacing = np.linalg.norm(volume.affine[:3, :3], axis=0).astype(np.float32)
        fields: dict[str, Any] = {"spacing": torch.from_numpy(spacing), "present": torch.tensor(volume.present)}
        if self.augment is not None:
            drawn = bits([self.augment.draw(generator) for _ in views])
            fields |= {"drawn": drawn, "seed": torch.tensor(seed)}
        if self.crops is None:
            fields |= {"volume": views[0], "corner": torch.tensor(corners_V3[0])}
            if volume.segmentation is not None:
                labels = cropped(volume.segmentation, corners_V3[0], self.size, NO_LABEL)
                fields["segmentation"] = torch.from_numpy(labels.astype(np.int64))
            if self.tells_inside:
                inside = cropped(np.broadcast_to(np.True_, sides), corners_V3[0], self.size, False)
                fields["inside"] = torch.from_numpy(inside)
        else:
            fields["corner"] = torch.tensor(corners_V3)
            if bases_K3:
                shares_MK = overlaps(np.array(random_V3), np.array(bases_K3), self.size)
                fields["overlap"] = torch.from_numpy(shares_MK.astype(np.float32))
        if self.slices is not None:
            fields["slices"] = self.slices(views[0], seed)
        views_too = {} if self.crops is None else {"views": views}
        return {**views_too, **fields, "label": torch.tensor(volume.label), "index": torch.tensor(index)}

    def _corners(self, sides: Sequence[int], generator: np.random.Generator) -> tuple[list[list[int]], list[list[int]]]:
        """Of the base crops, none without a grid, and of those at random places."""
        bases_K3, first = list[list[int]](), [0, 0, 0]
        if self.bases is not None:
            whole = [count * side for count, side in zip(self.bases, self.size, strict=True)]
            first = [(length - extent) // 2 for length, extent in zip(sides, whole, strict=True)]
            cells = (np.array(list(np.ndindex(self.bases))) * self.size + first).tolist()
            bases_K3, sides = cells, whole
        own = (self._corner(sides, generator) for _ in range(self.crops or 1))
        return bases_K3, [[at + more for at, more in zip(corner, first, strict=True)] for corner in own]

    def _corner(self, sides: Sequence[int], generator: np.random.Generator) -> list[int]:
        """In the middle along an axis on which the crop is at least as long as the volume."""
        room = [length - side for length, side in zip(sides, self.size, strict=True)]
        return [int(generator.integers(free + 1)) if self.random and free > 0 else free // 2 for free in room]


class VolumeSets(FoundSets[Volume]):
    """Volumes: training batches of random crops, `VolumeBatch`, or with `crops` of several of each volume,
    `VolumeViewsBatch`; all other batches are a `VolumeBatch` of the crop in the middle. A subclass finds the volumes.

    Crops and augmentation are functions of (seed, epoch, sample), so that any number of ranks and workers and a run
    that resumes see the same. The parts of a crop that lie outside of its volume are 0, and have the label -1.

    Args:
        size: of a crop in voxels, (D, H, W), or one number for all three.
        batch_size: volumes of one optimiser step over all ranks.
        crops: of a volume, for methods that compare them, at least 1; None is one, with its segmentation.
        augment: of training crops, made on the device; None leaves them as they are.
        bases: cells along D, H and W of a grid of base crops, for methods that tell where crops are: each cell is a
            view before the `crops`, which lie within the grid, and `overlap` says how much of a crop lies in a cell.
            The grid is in the middle of the volume.
        slices: which slices of each first crop are images too, with views, for methods that learn from both; needs
            `crops`.
        seed: of the order, the crops and the augmentation.
        num_workers: processes that fetch batches.
        selection: as in `lightspan.datamodules.loading.sample_sets.SampleSets`.

    Attributes:
        tells_inside: whether batches say which voxels do not pad their volume.
    """

    called = "volumes"
    tells_inside = False

    def __init__(
        self,
        size: int | tuple[int, int, int] = 64,
        batch_size: int = 8,
        crops: int | None = None,
        augment: VolumeAugmentation | None = None,
        bases: tuple[int, int, int] | None = None,
        slices: SliceViews | None = None,
        seed: int = 0,
        num_workers: int = 0,
        selection: ReadPath | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, selection)
        self.size = along_axes(size)
        if min(self.size) < 1 or (crops is not None and crops < 1):
            raise UserError(f"size={size} must be at least 1 voxel along each axis, and crops={crops} at least 1")
        if augment is not None:
            augment.require_size(self.size)
        if bases is not None and (min(bases) < 1 or crops is None):
            raise UserError(
                f"bases={list(bases)} must be at least 1 along each axis, and needs crops to compare with them, not "
                f"crops={crops}; set data.init_args.crops"
            )
        views = (crops or 1) + (0 if bases is None else math.prod(bases))
        require_numbers(views * math.prod(self.size), size=size, crops=crops, bases=bases)
        if slices is not None and (crops is None or slices.count > self.size[0]):
            raise UserError(
                f"slices.count={slices.count} must be at most the {self.size[0]} slices of a crop (the first of size), "
                f"and needs crops to take them from, not crops={crops}; set data.init_args.crops"
            )
        if slices is not None:
            numbers = slices.count * numbers_of_views(slices.views, max(self.size[1:]))
            require_numbers(numbers, size=size, **{"slices.count": slices.count})
        self.crops, self.augment, self.bases, self.slices = crops, augment, bases, slices
        self.train: VolumeSamples | None = None
        if augment is not None:
            finish_on_device(self, AlteredVolumes(augment))

    def training(self, archive: Archive[Volume], numbers: np.ndarray) -> VolumeSamples:
        return VolumeSamples(
            archive, numbers, self.size, True, self.crops, self.augment, self.bases, self.tells_inside, self.slices
        )

    def unchanging(self, archive: Archive[Volume], numbers: np.ndarray) -> VolumeSamples:
        return VolumeSamples(archive, numbers, self.size, tells_inside=self.tells_inside)

    def described(self) -> str:
        return f"crops of {' x '.join(map(str, self.size))} voxels"
