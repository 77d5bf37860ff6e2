"""Volumes on grids of another spacing. Without torch.

The middle of a volume stays where it is. Shapes: D H W voxels.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse

from lightspan.core.files.foreign import NUMBERS
from lightspan.datamodules.volume.reading import VoxelGrid


def respaced(grid: VoxelGrid, spacing: tuple[float, float, float]) -> VoxelGrid:
    """The grid of this spacing, in mm along D, H and W, that has about the same extent: at least one voxel a side.

    Raises: ValueError for more voxels than the limit of `NUMBERS`.
    """
    ratio = np.maximum(np.array(spacing) / grid.spacing, 2.0**-62)  # finer ones are above any limit
    ratio = np.where(np.abs(ratio - 1) < 1e-3, 1.0, ratio)
    sides = np.maximum(1, np.rint(grid.shape / ratio))
    return _recut(grid, tuple(map(int, sides)), ratio)


def reshaped(grid: VoxelGrid, shape: tuple[int, int, int]) -> VoxelGrid:
    """The grid of so many voxels that has the same extent. Raises: as `respaced`."""
    return _recut(grid, shape, np.array(grid.shape) / shape)


def trimmed(grid: VoxelGrid, box: Sequence[slice]) -> VoxelGrid:
    """The part of a grid that is inside of a box."""
    ends = [along.indices(side)[:2] for along, side in zip(box, grid.shape, strict=True)]
    affine = grid.affine.copy()
    affine[:3, 3] = (grid.affine @ [*(first for first, _ in ends), 1.0])[:3]
    return VoxelGrid(tuple(end - first for first, end in ends), affine)


def _recut(grid: VoxelGrid, shape: tuple[int, ...], ratio: np.ndarray) -> VoxelGrid:
    NUMBERS.require(math.prod(shape))
    first = _places(0, np.array(shape), np.array(grid.shape), ratio)
    affine = grid.affine @ np.diag([*ratio, 1.0])
    affine[:3, 3] = (grid.affine @ [*first, 1.0])[:3]
    return VoxelGrid(shape, affine)


def resampled(values: np.ndarray, grid: VoxelGrid, new: VoxelGrid) -> np.ndarray:
    """float32 [D H W] on a `respaced` or `reshaped` grid: linear along each axis, over as many voxels as a new one is
    wide.
    """
    for axis, side, ratio in _shrinking_first(grid, new):
        if (old := values.shape[axis]) == side and abs(ratio - 1) < 1e-6:
            continue
        moved = np.moveaxis(values, axis, 0)
        mean = _weights(side, old, ratio) @ moved.reshape(old, -1)
        values = np.moveaxis(mean.reshape(side, *moved.shape[1:]), 0, axis)
    return np.ascontiguousarray(values)


def _weights(new: int, old: int, ratio: float) -> sparse.csr_array:
    """Of old voxels in new ones, float32 [new old], whose rows sum to 1: only those within reach are stored."""
    places = np.clip(
        _places(np.arange(new), new, old, ratio), 0, old - 1
    )  # what rounding puts outside repeats the edge
    width = max(ratio, 1)
    reach = min(math.ceil(width), old)
    taps = np.floor(places).astype(int)[:, None] + np.arange(1 - reach, reach + 1)
    weights = np.maximum(0, 1 - np.abs(places[:, None] - taps) / width) * ((taps >= 0) & (taps < old))
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    row, tap = np.nonzero(weights)
    return sparse.csr_array((weights[row, tap], (row, taps[row, tap])), shape=(new, old))


def nearest(labels: np.ndarray, grid: VoxelGrid, new: VoxelGrid) -> np.ndarray:
    """Labels [D H W] on a `respaced` or `reshaped` grid: of the voxel in which the middle of a new one lies."""
    for axis, side, ratio in _shrinking_first(grid, new):
        old = labels.shape[axis]
        places = np.floor(_places(np.arange(side), side, old, ratio) + 0.5).astype(int).clip(0, old - 1)
        labels = labels.take(places, axis=axis)
    return labels


def _shrinking_first(grid: VoxelGrid, new: VoxelGrid) -> list[tuple[int, int, float]]:
    """(axis, new side, ratio of spacings) in an order in which nothing between is larger than the larger of both."""
    axes = zip(range(3), new.shape, (new.spacing / grid.spacing).tolist(), strict=True)
    return sorted(axes, key=lambda one: one[1] / grid.shape[one[0]])


def _places(at: Any, new: Any, old: Any, ratio: Any) -> Any:
    """Where the middle of voxel `at` of `new`, each as wide as `ratio` old ones, lies among the `old`: float64."""
    return (at - (new - 1) / 2) * ratio + (old - 1) / 2
