"""Features of some points from those of others that are nearest to them.

Source: Qi et al., "PointNet++", 2017, arXiv 1706.02413, section 3.4, for the weights by distance.
Shapes: Q points of all clouds that ask, N that are known, K nearest, D width.
"""

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.ragged import padded, row_owners
from lightspan.nn.points.groups import nearest_points


@torch.no_grad()
def nearest_rows(
    asking_Q3: Tensor, asking_offsets: Tensor, xyz_N3: Tensor, offsets: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The `count` points of the same cloud that are nearest to each, rows of `xyz`, the nearest first, int64 [Q K]; and
    which of them are there, bool [Q K]: in a cloud of fewer points they follow one another again from the first.

    Args:
        asking_offsets, offsets: int64 [B+1] each, see `lightspan.core.ragged`; every cloud with points that ask has
            some that are known.
    """
    asking_BM3, _ = padded(asking_Q3, asking_offsets)
    near_BMK = nearest_points(asking_BM3, *padded(xyz_N3, offsets), count)
    cloud_Q = row_owners(asking_offsets, len(asking_Q3))
    place_Q = torch.arange(len(asking_Q3), device=asking_Q3.device) - asking_offsets[cloud_Q]
    there_QK = torch.arange(count, device=asking_Q3.device) < offsets.diff()[cloud_Q][:, None]
    return near_BMK[cloud_Q, place_Q] + offsets[cloud_Q][:, None], there_QK


def largest_near(x_ND: Tensor, near_QK: Tensor) -> Tensor:
    """The largest of each column over the nearest, [Q D]."""
    return x_ND[near_QK].amax(dim=1)


def interpolated(x_ND: Tensor, xyz_N3: Tensor, asking_Q3: Tensor, near_QK: Tensor, there_QK: Tensor) -> Tensor:
    """The mean of the nearest by the inverse of their distance, [Q D] in the type of x: at a known point what is known.

    Args:
        near_QK, there_QK: see `nearest_rows`.
    """
    apart_QK = (wide(xyz_N3)[near_QK] - wide(asking_Q3)[:, None]).norm(dim=2)
    weight_QK = (1 / (apart_QK + 1e-8)).where(there_QK, 0)
    share_QK = weight_QK / weight_QK.sum(dim=1, keepdim=True)
    return (share_QK[..., None] * x_ND[near_QK]).sum(dim=1).to(x_ND.dtype)
