"""What stands for the points of a voxel, and for the voxels of a coarser one: a single one of them, with all it has.

Source: Yang et al., "Swin3D", 2023, arXiv 2304.06906, section 3: what describes a voxel is never an average, which
would lie beside the surface, but the point nearest to the mean of those that it holds.
Shapes: N points of all clouds, V voxels, C coarser ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.nn.voxels.grid import Voxels, coarser, nearest_to_mean, voxelised


class Level(NamedTuple):
    """The voxels of one size and a point of each.

    Attributes:
        xyz_V3: the point, float32 or wider, in sides of a voxel, from the origin of the grid.
        signals: what else is known of the point, [V 3] each, in [-1, 1].
    """

    voxels: Voxels
    xyz_V3: Tensor
    signals: tuple[Tensor, ...] = ()

    @property
    def inputs(self) -> Tensor:
        """[V 3 + 3 for each signal]: where in its voxel the point is, in [-1, 1], and the signals."""
        inside_V3 = 2 * (self.xyz_V3 - self.voxels.place_V3) - 1
        return torch.cat([inside_V3.clamp(-1, 1), *(wide(signal) for signal in self.signals)], dim=1)


def level_of(xyz_N3: Tensor, offsets: Tensor, size: float, signals: Sequence[Tensor] = ()) -> tuple[Level, Tensor]:
    """The voxels of points, and that of each point, int64 [N]. A voxel has the point nearest to the mean of its own.

    Args:
        offsets: int64 [B+1], see `lightspan.core.ragged`.
        size: side of a voxel, in the unit of the coordinates.
        signals: [N 3] each, in [-1, 1].
    Raises: UserError as `lightspan.nn.voxels.grid.voxelised`.
    """
    voxels, voxel_N = voxelised(xyz_N3, offsets, size)
    at_V = nearest_to_mean(xyz_N3, voxel_N, len(voxels.key_V))
    return Level(voxels, wide(xyz_N3)[at_V] / size, tuple(signal[at_V] for signal in signals)), voxel_N


def coarser_level(level: Level, stride: int) -> tuple[Level, Tensor]:
    """The voxels with sides `stride` times as long, and in which of them each lies, int64 [V]. Each has the point that
    is nearest to the mean of the points of its voxels.
    """
    voxels, parent_V = coarser(level.voxels, stride)
    at_C = nearest_to_mean(level.xyz_V3, parent_V, len(voxels.key_V))
    return Level(voxels, level.xyz_V3[at_C] / stride, tuple(signal[at_C] for signal in level.signals)), parent_V
