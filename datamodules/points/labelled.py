"""A folder of scans with a class for each point, one .npz file each, as a data module.

Shapes: N points.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch

from lightspan.core.files.arrays import read_arrays
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import PathUse, ReadPath
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.loading.array_files import array_files
from lightspan.datamodules.loading.damage import unreadable
from lightspan.datamodules.loading.found_sets import Archive, ArchiveSamples, FoundSamples, FoundSets, KeptSamples
from lightspan.datamodules.loading.on_device import finish_on_device
from lightspan.datamodules.points.augment import ChangedPoints, PointAugmentation, bits
from lightspan.datamodules.points.batch import PointsBatch
from lightspan.datamodules.points.data import PointField
from lightspan.datamodules.points.shapes import FARTHEST, unit_normals

REQUIRED = ("xyz", "classes")


class Scan(NamedTuple):
    """xyz: float32 [N 3], from the middle of the floor of the box around all. classes: int64 [N], -1 without.
    fields: what else points have, float32 [N 3] each.
    """

    xyz: np.ndarray
    classes: np.ndarray
    fields: Mapping[str, np.ndarray]


def scan_of(arrays: Mapping[str, np.ndarray], fields: Sequence[PointField]) -> Scan:
    """Points without a place, such as of NaN, are left out. Whole numbers are colours of which 255 are 1; normals get
    length 1, and are 0 where they are not finite.

    Raises: ValueError for arrays that are missing or do not fit, and colours out of range.
    """
    if missing := [name for name in (*REQUIRED, *fields) if name not in arrays]:
        raise ValueError(f"it holds {', '.join(sorted(arrays)) or 'nothing'}, and no {missing[0]}")
    xyz, classes = arrays["xyz"], arrays["classes"]
    for name in ("xyz", *fields):
        if arrays[name].shape != (len(classes) if classes.ndim else 0, 3) or arrays[name].dtype.kind not in "uif":
            raise ValueError(
                f"its {name} is {arrays[name].dtype} {[*arrays[name].shape]}, and not three numbers for each of its "
                f"classes {[*classes.shape]}"
            )
    if classes.ndim != 1 or classes.dtype.kind not in "ui":
        raise ValueError(f"its classes are {classes.dtype} {[*classes.shape]}, and not a whole number for each point")
    there = (np.abs(xyz.astype(np.float64)) <= FARTHEST).all(axis=1)
    if not there.any():
        raise ValueError("it has no point with a place")
    xyz = xyz[there].astype(np.float64)
    low, high = xyz.min(axis=0), xyz.max(axis=0)
    return Scan(
        (xyz - [*(low + high)[:2] / 2, low[2]]).astype(np.float32),
        np.maximum(classes[there].astype(np.int64), -1),
        {name: _KEPT[name](arrays[name][there]) for name in fields},
    )


def _colours(given_N3: np.ndarray) -> np.ndarray:
    colour_N3 = (given_N3 / np.float32(255) if given_N3.dtype.kind in "ui" else given_N3).astype(np.float32)
    inside = (colour_N3 >= 0) & (colour_N3 <= 1)
    if not inside.all():
        raise ValueError(f"its colour has {given_N3[~inside][0]}, and is not of bytes or floats in [0, 1]")
    return colour_N3


_KEPT: Mapping[PointField, Callable[[np.ndarray], np.ndarray]] = {"colour": _colours, "normal": unit_normals}


@dataclass(frozen=True)
class ScanFiles:
    """Scans that are read anew for each sample."""

    files: Annotated[Sequence[Path], PathUse.READ]
    fields: tuple[PointField, ...]
    skips: bool

    @property
    def labels(self) -> np.ndarray:
        return np.zeros(len(self.files), np.int64)

    def read(self, number: int) -> Scan:
        """Raises: UserError for a damaged file, or `Damaged` where these are skipped."""
        file = self.files[number]
        try:
            return scan_of(read_arrays(file), self.fields)
        except ValueError as error:
            raise unreadable(file, error, self.skips) from error


@dataclass(frozen=True)
class ScanSamples(ArchiveSamples[Scan]):
    """Samples of `PointsBatch`: a function of number and seed.

    Args:
        points: of a scan, at most: those nearest to one of them, drawn anew in each epoch; None keeps all.
        augment: what is drawn for each scan, and made on the device.
    """

    points: int | None
    augment: PointAugmentation | None = None

    batch_type = PointsBatch

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        scan, generator = self.archive.read(int(self.numbers[index])), np.random.default_rng([seed, 1])
        near = np.arange(len(scan.xyz))
        if self.points is not None and len(near) > self.points:
            apart = np.square(scan.xyz - scan.xyz[generator.integers(len(near))]).sum(axis=1)
            near = np.sort(np.argpartition(apart, self.points - 1)[: self.points])
        rows = {"xyz": scan.xyz, **scan.fields, "classes": scan.classes}
        given: dict[str, Any] = {name: torch.from_numpy(np.ascontiguousarray(row[near])) for name, row in rows.items()}
        if self.augment is not None:
            given |= {"drawn": bits(self.augment.draw(generator)), "seed": torch.tensor(seed)}
        return {**given, "label": 0, "index": index}


class LabelledScans(FoundSets[Scan]):
    """Scans with a class for each point, stored as NAME.npz with arrays `xyz` [N, 3], z up, `classes` [N], whole
    numbers of which those below 0 do not count, and `colour` [N, 3], bytes or floats in [0, 1], and `normal` [N, 3] if
    they are asked for. Batches are `PointsBatch` in the unit of the files, x and y from the middle, z from the floor.

    Args:
        folder: whose files are read, not those of folders in it.
        val_folder: scans for validation, which are served whole; None holds out `val_share` of those of `folder`, by a
            hash of their names.
        fields: what a batch has besides coordinates and classes.
        points: of a training scan, at most: a ball about a point that is drawn anew in each epoch. None keeps all.
        val_share: in (0, 1).
        batch_size: scans of one optimiser step over all ranks.
        augment: of training scans, made on the device; None leaves them as they are.
        seed: of the order, the draws and the augmentation.
        num_workers: processes that fetch batches.
        skip_damaged: True passes over files that cannot be read, when their turn comes; False stops there.
        selection: as in `lightspan.datamodules.loading.sample_sets.SampleSets`.
    Raises: UserError for a folder without such files.
    """

    called = "scans"

    def __init__(
        self,
        folder: ReadPath,
        val_folder: ReadPath | None = None,
        fields: tuple[PointField, ...] = ("colour",),
        points: int | None = 120_000,
        val_share: float = 0.1,
        batch_size: int = 8,
        augment: PointAugmentation | None = None,
        seed: int = 0,
        num_workers: int = 0,
        skip_damaged: bool = False,
        selection: ReadPath | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, selection)
        require_in("[1, inf)", points=points)
        require_in("(0, 1)", val_share=val_share)
        require_numbers(12 * (points or 1), points=points)
        self.folder = expanded(folder, "data.init_args.folder")
        self.val_folder = None if val_folder is None else expanded(val_folder, "data.init_args.val_folder")
        self.fields, self.points, self.val_share = tuple(fields), points, val_share
        self.augment, self.skip_damaged = augment, skip_damaged
        self.train: ScanSamples | None = None
        if augment is not None:
            finish_on_device(self, ChangedPoints(augment))

    def find(self) -> FoundSamples[Scan]:
        sample = "scan, with arrays xyz [N, 3] and classes [N]"
        found = array_files(self.folder, self.val_folder, self.val_share, sample)
        archive = ScanFiles(found.files, self.fields, self.skip_damaged)
        return FoundSamples(archive, found.train, found.val, (), found.content(self.fields))

    def training(self, archive: Archive[Scan], numbers: np.ndarray) -> ScanSamples:
        return ScanSamples(archive, numbers, self.points, self.augment)

    def unchanging(self, archive: Archive[Scan], numbers: np.ndarray) -> ScanSamples:
        return ScanSamples(archive, numbers, None)

    def described(self) -> str:
        return "whole" if self.points is None else f"of up to {self.points:,} points in training"

    def blank(self) -> ScanSamples | None:
        """Two scans of as many points as a crop has, in a cube of two metres, where the folder is not here."""
        if self.folder.exists():
            return None
        xyz = np.random.default_rng(0).random((self.points or 1024, 3), np.float32) * 2
        nothing = Scan(xyz, np.zeros(len(xyz), np.int64), dict.fromkeys(self.fields, np.zeros_like(xyz)))
        return self.training(KeptSamples([nothing, nothing]), np.arange(2))
