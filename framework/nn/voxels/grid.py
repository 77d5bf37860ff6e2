"""The voxels of several clouds that have points, each known by one whole number, in ascending order.

The number packs cloud, x, y and z, so that a neighbour is an addition and a search away, whatever the cloud's size.
Places are whole numbers from the origin of the coordinates, which may be negative: the grid is independent of the
clouds, so that moving one by whole voxels moves its voxels alone.
Shapes: N points of all clouds, B clouds, V voxels of all, C coarser ones, K steps.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.devices import has_values, wide, widest_float
from lightspan.core.errors import UserError
from lightspan.core.ragged import ragged_means, row_owners

BITS = 17  # of an axis; twelve are left for the cloud
MIDDLE = 2 ** (BITS - 1)
REACH = MIDDLE - 16
"""Places lie in [-REACH, REACH], so that a step of up to 15 voxels stays on its axis."""
CLOUDS = 2 ** (63 - 3 * BITS)
"""Clouds of a batch, at most."""


class Voxels(NamedTuple):
    """Each voxel once, those of a cloud together.

    Attributes:
        key_V: int64, ascending, of cloud and place.
        offsets: int64 [B+1], as of points: cloud i has the voxels from offsets[i] up to offsets[i + 1].
    """

    key_V: Tensor
    offsets: Tensor

    @property
    def place_V3(self) -> Tensor:
        """int64, along x, y and z."""
        axes = (self.key_V >> (BITS * axis) & (2**BITS - 1) for axis in (2, 1, 0))
        return torch.stack([*axes], dim=1) - MIDDLE

    @property
    def cloud_V(self) -> Tensor:
        """int64, in [0, B)."""
        return self.key_V >> (3 * BITS)


def voxels_at(place_N3: Tensor, offsets: Tensor, spread: int = 1) -> tuple[Voxels, Tensor]:
    """The voxels at places, each once, and which of them each place has become, int64 [N]. The host waits for the
    device, which alone knows how many there are.

    Args:
        place_N3: int64, of packed rows that `offsets` cut into clouds.
        spread: what a plan, which has shapes alone, takes for the places of a voxel.
    Raises: UserError for a place beyond `REACH`, or more clouds than a number holds.
    """
    clouds = len(offsets) - 1
    if clouds > CLOUDS:
        raise UserError(f"a batch of {clouds} clouds is above the {CLOUDS} that have voxels at once; lower batch_size")
    if has_values(place_N3) and len(place_N3):
        low, high = torch.aminmax(place_N3)
        if low < -REACH or high > REACH:
            raise UserError(
                f"points lie more than {REACH:,} voxels from the origin, or at no place at all; raise the side of a "
                "voxel, or let the data move clouds to the origin"
            )
    key_N = row_owners(offsets, len(place_N3)) << (3 * BITS) | packed_steps(place_N3 + MIDDLE)
    if has_values(key_N):
        key_V, voxel_N = torch.unique(key_N, return_inverse=True)
    else:
        key_V = key_N[: -(-len(key_N) // spread)]
        voxel_N = torch.arange(len(key_N), device=key_N.device) % max(len(key_V), 1)
    # The number at which a cloud after the last one began would be beyond int64.
    first_B = torch.arange(clouds, device=key_N.device) << (3 * BITS)
    return Voxels(key_V, F.pad(torch.searchsorted(key_V, first_B), (0, 1), value=len(key_V))), voxel_N


def packed_steps(step_K3: Tensor) -> Tensor:
    """What moving by these whole numbers along x, y and z adds to a key, int64 [K]."""
    return (step_K3[:, 0] << 2 * BITS) + (step_K3[:, 1] << BITS) + step_K3[:, 2]


def voxelised(xyz_N3: Tensor, offsets: Tensor, size: float) -> tuple[Voxels, Tensor]:
    """The voxels with sides of `size` that have points, and that of each point, int64 [N].

    Raises: UserError as `voxels_at`, also for coordinates that are not finite.
    """
    scaled_N3 = wide(xyz_N3) / size
    # What is not finite or fits no whole number becomes a place that `voxels_at` refuses.
    far_N3 = ~(scaled_N3.abs() <= REACH)
    return voxels_at(scaled_N3.floor().masked_fill(far_N3, 2 * MIDDLE).long(), offsets)


def coarser(voxels: Voxels, stride: int) -> tuple[Voxels, Tensor]:
    """The voxels with sides `stride` times as long, and in which of them each voxel lies, int64 [V]."""
    place_V3 = voxels.place_V3.div(stride, rounding_mode="floor")
    return voxels_at(place_V3, voxels.offsets, spread=stride**2)  # of a surface


def neighbours(voxels: Voxels, step_K3: Tensor) -> Tensor:
    """The voxels that lie whole steps away, int64 [K V]; -1 where there is none.

    Args:
        step_K3: int64, at most 15 along each axis.
    """
    key_KV = voxels.key_V + packed_steps(step_K3)[:, None]
    at_KV = torch.searchsorted(voxels.key_V, key_KV).clamp_max(len(voxels.key_V) - 1)
    return at_KV.where(voxels.key_V[at_KV] == key_KV, -1)


def nearest_to_mean(xyz_N3: Tensor, group_N: Tensor, groups: int) -> Tensor:
    """Of each group the row that is nearest to the mean of its rows, int64 [groups]; of equally near ones, as two
    always are, that with the least x, then y, then z, so that the order of rows tells nothing; of equal ones the first.

    Args:
        group_N: int64, in [0, groups), in which each has a row.
    """
    if not has_values(group_N):
        return torch.arange(groups, device=group_N.device)
    xyz_N3 = xyz_N3.to(widest_float(xyz_N3.device))
    counts = group_N.bincount(minlength=groups)
    order_N = group_N.argsort(stable=True)
    means_G3 = ragged_means(xyz_N3[order_N], F.pad(counts.cumsum(0), (1, 0)))
    apart_N = (xyz_N3 - means_G3[group_N]).square().sum(dim=1)
    best_N = apart_N <= (1 + 1e-6) * _least(apart_N, group_N, groups)[group_N]  # what rounding alone tells apart
    for axis_N in xyz_N3.unbind(1):
        axis_N = axis_N.where(best_N, torch.inf)
        best_N = best_N & (axis_N == _least(axis_N, group_N, groups)[group_N])
    return _least(torch.arange(len(group_N), device=group_N.device).where(best_N, len(group_N)), group_N, groups)


def _least(x_N: Tensor, group_N: Tensor, groups: int) -> Tensor:
    return x_N.new_zeros(groups).scatter_reduce(0, group_N, x_N, "amin", include_self=False)
