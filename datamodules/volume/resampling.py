"""Volumes on grids of another spacing. Without torch.

The middle of a volume stays where it is. Shapes: D H W voxels.
"""

import numpy as np

from lightspan.datamodules.volume.reading import VoxelGrid


def respaced(grid: VoxelGrid, spacing: tuple[float, float, float]) -> VoxelGrid:
    """The grid of this spacing, in mm along D, H and W, that has about the same extent: at least one voxel a side."""
    ratio = np.array(spacing) / grid.spacing
    ratio = np.where(np.abs(ratio - 1) < 1e-3, 1.0, ratio)
    shape = tuple(max(1, round(side / each)) for side, each in zip(grid.shape, ratio, strict=True))
    first = [_places(new, old, each)[0] for new, old, each in zip(shape, grid.shape, ratio, strict=True)]
    affine = grid.affine @ np.diag([*ratio, 1.0])
    affine[:3, 3] = (grid.affine @ [*first, 1.0])[:3]
    return VoxelGrid(shape, affine)


def resampled(values: np.ndarray, grid: VoxelGrid, new: VoxelGrid) -> np.ndarray:
    """float32 [D H W] on a `respaced` grid: linear along each axis, over as many voxels as a new one is wide."""
    for axis, (side, ratio) in enumerate(zip(new.shape, new.spacing / grid.spacing, strict=True)):
        if (old := values.shape[axis]) == side and abs(ratio - 1) < 1e-6:
            continue
        places = np.clip(_places(side, old, ratio), 0, old - 1)  # what rounding puts outside repeats the edge
        weights = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(old)) / max(ratio, 1))
        weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
        values = np.moveaxis(np.tensordot(weights, values, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(values)


def nearest(labels: np.ndarray, grid: VoxelGrid, new: VoxelGrid) -> np.ndarray:
    """Labels [D H W] on a `respaced` grid: of the voxel in which the middle of a new one lies."""
    for axis, (side, ratio) in enumerate(zip(new.shape, new.spacing / grid.spacing, strict=True)):
        old = labels.shape[axis]
        places = np.floor(_places(side, old, ratio) + 0.5).astype(int).clip(0, old - 1)
        labels = labels.take(places, axis=axis)
    return labels


def _places(new: int, old: int, ratio: float) -> np.ndarray:
    """Where the middles of `new` voxels, each as wide as `ratio` old ones, lie among the `old`: float64 [new]."""
    return (np.arange(new) - (new - 1) / 2) * ratio + (old - 1) / 2
