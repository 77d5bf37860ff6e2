"""Centres that are spread over a cloud, and the points nearest to each: what stands for patches where there is no grid.

Source: farthest point sampling as in Qi et al., "PointNet++", 2017, arXiv 1706.02413, section 3.2.
Groups of groups, whose points are the centres of finer ones, as in Zhang et al., "Point-M2AE", 2022, arXiv 2205.14401,
section 3.1.
Shapes: B clouds, N points of all, M of the largest, G centres of a cloud, K points of a group.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ragged import padded

MOST_DISTANCES = 2**24
"""Distances between centres and points that are held at once: 64 MB."""


class Groups(NamedTuple):
    """Of each cloud G groups of K points.

    Attributes:
        centre_BG3: points of the cloud.
        near_BGK3: the points nearest to a centre, the nearest first, less the centre.
        real_B: bool; False for a cloud without points, whose centres and groups are 0.
    """

    centre_BG3: Tensor
    near_BGK3: Tensor
    real_B: Tensor


@torch.no_grad()
def farthest_points(xyz_BM3: Tensor, real_BM: Tensor, count: int) -> Tensor:
    """Points of each cloud of which each is the farthest from all before, int64 [B count]: O(M count) distances.

    The first is the farthest from the cloud's mean, so that the order of the points tells nothing; of several equally
    far ones the first is taken. Once all places are taken the points follow one another again from the first, as in a
    cloud of fewer points than `count`, or of equal ones. A cloud without points has its row 0.

    Args:
        real_BM: which rows are points, each cloud's first.
    """
    xyz_BM3 = wide(xyz_BM3)
    here_B, last_B = torch.arange(len(xyz_BM3), device=xyz_BM3.device), real_BM.sum(dim=1)
    sums_B13 = (xyz_BM3 * real_BM[..., None]).sum(dim=1, keepdim=True)
    apart_BM = (xyz_BM3 - sums_B13 / last_B.clamp_min(1).view(-1, 1, 1)).square().sum(dim=2)
    at_B = apart_BM.masked_fill(~real_BM, -1).argmax(dim=1)
    nearest_BM = torch.full_like(apart_BM, torch.inf).masked_fill(~real_BM, -1)
    chosen, new = [at_B], [torch.ones_like(at_B, dtype=torch.bool)]
    for _ in range(count - 1):
        from_BM = (xyz_BM3 - xyz_BM3[here_B, at_B][:, None]).square().sum(dim=2)
        nearest_BM = torch.minimum(nearest_BM, from_BM)
        farthest = nearest_BM.max(dim=1)
        at_B = farthest.indices
        chosen.append(at_B)
        new.append(farthest.values > 0)
    places_BC = torch.stack(chosen, dim=1)
    taken_B1 = torch.stack(new, dim=1).sum(dim=1, keepdim=True)  # distances fall, so the new ones come first
    return places_BC.gather(1, torch.arange(count, device=places_BC.device) % taken_B1)


@torch.no_grad()
def nearest_points(centre_BG3: Tensor, xyz_BM3: Tensor, real_BM: Tensor, count: int) -> Tensor:
    """The points nearest to each centre, the nearest first, int64 [B G count]; in a cloud of fewer points they follow
    one another again from the first. Where distances are no numbers, or too large for one, some points of the cloud.

    Args:
        real_BM: which rows are points, each cloud's first.
    """
    centre_BG3, xyz_BM3 = wide(centre_BG3), wide(xyz_BM3)
    clouds, most = real_BM.shape
    kept = min(count, most)
    step = max(1, MOST_DISTANCES // max(1, clouds * most))
    parts = []
    for some_BG3 in centre_BG3.split(step, dim=1):
        # Differences, not products: far from the origin those lose what is near.
        parts_BGM = (
            (some_BG3[:, :, None, axis] - xyz_BM3[:, None, :, axis]).square() for axis in range(xyz_BM3.shape[2])
        )
        apart_BGM = sum(parts_BGM, torch.zeros((), device=xyz_BM3.device, dtype=xyz_BM3.dtype))
        apart_BGM = apart_BGM.masked_fill(~real_BM[:, None], torch.inf)
        parts.append(apart_BGM.topk(kept, dim=2, largest=False).indices)
    near_BGK = torch.cat(parts, dim=1) if parts else real_BM.new_zeros(clouds, 0, kept, dtype=torch.int64)
    points_B11 = real_BM.sum(dim=1).clamp_min(1).view(-1, 1, 1)
    there_B11 = points_B11.clamp_max(kept)
    places_BGK = (torch.arange(count, device=near_BGK.device) % there_B11).expand(-1, near_BGK.shape[1], -1)
    # A distance that overflows is no less than that of the rows which are no points.
    return near_BGK.gather(2, places_BGK).minimum(points_B11 - 1)


class NestedGroups(NamedTuple):
    """Groups of which it is known where their points come from.

    Attributes:
        centre_BG3, near_BGK3, real_B: as in `Groups`.
        centre_BG: places of the centres among the finer points: those of the cloud, or the centres of the level below.
        near_BGK: places of the groups' points among these.
    """

    centre_BG3: Tensor
    near_BGK3: Tensor
    real_B: Tensor
    centre_BG: Tensor
    near_BGK: Tensor


def grouped(xyz_N3: Tensor, offsets: Tensor, groups: int, size: int) -> Groups:
    """`groups` centres of each cloud by `farthest_points`, and the `size` points nearest to each, the centre among
    them; with gradients to the points.

    Args:
        offsets: int64 [B+1], see `lightspan.core.ragged`.
    Raises: UserError for less than one group or point.
    """
    return Groups(*_groups_of(*padded(xyz_N3, offsets), groups, size)[:3])


def nested_groups(
    xyz_N3: Tensor, offsets: Tensor, groups: Sequence[int], sizes: Sequence[int]
) -> tuple[NestedGroups, ...]:
    """Groups of the points of each cloud, then groups of their centres, and so on, the finest first, each made as by
    `grouped`. A cloud of fewer points than a level has centres has some more than once.

    Args:
        offsets: int64 [B+1], see `lightspan.core.ragged`.
        groups, sizes: of each level.
    Raises: UserError for less than one group or point.
    """
    at_BM3, real_BM = padded(xyz_N3, offsets)
    levels: list[NestedGroups] = []
    for count, size in zip(groups, sizes, strict=True):
        levels.append(_groups_of(at_BM3, real_BM, count, size))
        at_BM3, real_BM = levels[-1].centre_BG3, real_BM[:, :1].expand(-1, count)
    return tuple(levels)


def places_in_cloud(levels: Sequence[NestedGroups], level: int) -> Tensor:
    """Places in their clouds of the points of a level's groups, int64 [B G K]. The first of a group is its centre,
    or a point that is equal to it.

    Args:
        levels: the finest first.
    """
    places_BGK = levels[level].near_BGK
    for finer in levels[:level][::-1]:
        places_BGK = finer.centre_BG.gather(1, places_BGK.flatten(1)).view_as(places_BGK)
    return places_BGK


def points_of_groups(near_BGK: Tensor, chosen_BG: Tensor, real_B: Tensor, offsets: Tensor) -> Tensor:
    """Which points of all clouds are in a chosen group, bool [N].

    Args:
        near_BGK: places in their clouds of the groups' points.
        real_B: False for a cloud without points.
        offsets: int64 [B+1], see `lightspan.core.ragged`.
    """
    points = int(offsets[-1])
    at_BGK = near_BGK + offsets[:-1, None, None]
    at_BGK = at_BGK.masked_fill(~(chosen_BG & real_B[:, None])[..., None], points)  # a place beyond the last
    return offsets.new_zeros(points + 1, dtype=torch.bool).index_fill(0, at_BGK.flatten(), True)[:points]


def _groups_of(xyz_BM3: Tensor, real_BM: Tensor, groups: int, size: int) -> NestedGroups:
    if groups < 1 or size < 1:
        raise UserError(f"groups={groups} and size={size} must be at least 1")
    clouds_B1 = torch.arange(len(xyz_BM3), device=xyz_BM3.device)[:, None]
    centre_BG = farthest_points(xyz_BM3, real_BM, groups)
    centre_BG3 = xyz_BM3[clouds_B1, centre_BG]
    near_BGK = nearest_points(centre_BG3, xyz_BM3, real_BM, size)
    near_BGK3 = xyz_BM3[clouds_B1[..., None], near_BGK]
    return NestedGroups(centre_BG3, near_BGK3 - centre_BG3[:, :, None], real_BM[:, 0], centre_BG, near_BGK)
