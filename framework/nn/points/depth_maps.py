"""Depth maps of clouds, and what a network makes of a map read at its points.

Shapes: N points of all clouds, B clouds, M points of the largest, V views of a cloud, S side of a map, C channels, P
points of each cloud.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.devices import wide
from lightspan.core.ragged import padded, ragged_maxima, row_owners
from lightspan.nn.points.projection import AXIS_ORDERS, MapProjection, projected
from lightspan.nn.sequences.patches import at_places


class CloudMaps(NamedTuple):
    """Clouds as pictures from several sides.

    Attributes:
        grey_BVSS: depth maps, in [0, 1].
        pixel_BVM: int64, the pixel of each point of a cloud in each of its maps, row by row in [0, S S).
    """

    grey_BVSS: Tensor
    pixel_BVM: Tensor

    def read(self, maps_BVChw: Tensor, point_BP: Tensor) -> Tensor:
        """What bicubic interpolation of maps to the side of these has at the pixels of some points, [B P V C].

        Args:
            maps_BVChw: of each picture, of any sides.
            point_BP: int64, places of points in their clouds.
        """
        side = self.grey_BVSS.shape[3]
        pixel_BPV = at_places(self.pixel_BVM.transpose(1, 2), point_BP)
        views = zip(maps_BVChw.unbind(1), pixel_BPV.unbind(2), strict=True)
        return torch.stack([read_at_pixels(maps_BChw, pixel_BP, side) for maps_BChw, pixel_BP in views], dim=2)


@torch.no_grad()
def cloud_maps(xyz_N3: Tensor, offsets: Tensor, side: int, spread: int) -> CloudMaps:
    """Clouds seen along their three axes.

    Args:
        offsets: int64 [B+1], see `lightspan.core.ragged`.
        side, spread: as in `lightspan.nn.points.projection.projected`.
    Raises: UserError as it does.
    """
    greys, pixels = [], []
    for order in AXIS_ORDERS:
        view_N3 = xyz_N3[:, order]
        projection = projected(view_N3, offsets, side, spread)
        greys.append(depth_maps(view_N3, offsets, projection))
        pixels.append(padded(projection.pixel_N % side**2, offsets)[0])
    return CloudMaps(torch.stack(greys, dim=1), torch.stack(pixels, dim=1))


@torch.no_grad()
def depth_maps(view_N3: Tensor, offsets: Tensor, projection: MapProjection) -> Tensor:
    """Pictures of clouds, [B S S]: 0 where there is nothing, else from 0.5 for a cloud's farthest point to 1 for its
    nearest, the mean over the points of a pixel. All is 1 if a cloud's points are equally far.

    Args:
        view_N3: coordinates to the right, down and away, of which the last is read.
        projection: of these.
    """
    away_N1, owner_N = wide(view_N3[:, 2:]), row_owners(offsets, len(view_N3))
    from_near_N1 = away_N1 + ragged_maxima(-away_N1, offsets)[owner_N]
    range_B1 = ragged_maxima(from_near_N1, offsets)
    tiny = torch.finfo(from_near_N1.dtype).tiny
    light_N1 = 1 - from_near_N1 / range_B1.clamp_min(tiny)[owner_N] / 2
    sums_B2SS = projection.scattered(torch.cat([light_N1, torch.ones_like(light_N1)], dim=1))
    # Sums of ones are whole numbers but for rounding.
    return sums_B2SS[:, 0] / sums_B2SS[:, 1].clamp_min(1)


def read_at_pixels(maps_BChw: Tensor, pixel_BP: Tensor, side: int) -> Tensor:
    """What bicubic interpolation of each map to S x S pixels has at some of these, [B P C], without making it.

    Args:
        pixel_BP: int64 in [0, S S), row by row.
        side: S.
    """
    row_BP, column_BP = pixel_BP // side, pixel_BP % side
    # From -1 to 1 between the outer edges of a map.
    at_B1P2 = torch.stack([column_BP, row_BP], dim=2)[:, None].to(maps_BChw.dtype).add(0.5) * (2 / side) - 1
    read_BC1P = F.grid_sample(maps_BChw, at_B1P2, mode="bicubic", padding_mode="border", align_corners=False)
    return read_BC1P[:, :, 0].transpose(1, 2)
