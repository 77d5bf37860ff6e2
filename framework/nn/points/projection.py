"""Point clouds as maps: which pixel each point has, kept so that features of points go onto maps and back.

Source: the geometry-preserving projection of Wang et al., "P2P: Tuning Pre-trained Image Models for Point Cloud
Analysis with Point-to-Pixel Prompting", 2022, arXiv 2208.02812, section 3.2, which is also that of Zhang et al.,
I2P-MAE, 2022, arXiv 2212.06785, section 3.2. Cells have the side g = max(range of x, range of y) / (S - K), a point has
the pixel floor((x, y - min) / g), a block of K x K pixels about it gets its features, and the cloud is in the middle of
the map. With K = 3 this is the paper's g; with K = 5 the code of I2P-MAE keeps the g of K = 3, and moves pixels that
then lie outside of the map.
Shapes: N points of all clouds, B clouds, C channels, S side of a map.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ragged import ragged_maxima, row_owners

AXIS_ORDERS = ((0, 1, 2), (2, 0, 1), (1, 2, 0))
"""Three views along the axes: `xyz_N3[:, order]` has the coordinates to the right, down and away, of which the last is
dropped. Each is a rotation, so that no view is a mirror image.
"""


class MapProjection(NamedTuple):
    """Where the points of clouds lie in their maps.

    Attributes:
        pixel_N: int64, the middle of each point's block in the maps of all clouds, row by row: in [0, B S S).
        maps: B.
        side: S.
        spread: K, side of the block of a point.
    """

    pixel_N: Tensor
    maps: int
    side: int
    spread: int

    def scattered(self, x_NC: Tensor) -> Tensor:
        """Sums over the points whose blocks have a pixel, [B C S S] in the type of x; 0 where there is none. There is
        no test of depth: front and back add up, and denser parts have larger sums.
        """
        wide_NC = wide(x_NC)
        flat_PC = wide_NC.new_zeros(self.maps * self.side**2, x_NC.shape[1]).index_add(0, self.pixel_N, wide_NC)
        maps_BCSS = flat_PC.unflatten(0, (self.maps, self.side, self.side)).permute(0, 3, 1, 2)
        # The blocks of all points at once: no block leaves its map, so that each is a box about its middle.
        sums_BCSS = F.avg_pool2d(maps_BCSS, self.spread, stride=1, padding=self.spread // 2, divisor_override=1)
        return sums_BCSS.to(x_NC.dtype)

    def gathered(self, maps_BCSS: Tensor) -> Tensor:
        """What maps have at the middle of each point's block, [N C]."""
        return maps_BCSS.permute(0, 2, 3, 1).flatten(0, 2)[self.pixel_N]


def seen_along(xyz_N3: Tensor, offsets: Tensor, turn_B33: Tensor) -> Tensor:
    """Coordinates to the right, down and away of clouds that are each seen in a direction of its own, [N 3]. These axes
    are the rows of a cloud's rotation.

    Args:
        offsets: int64 [B+1], see `lightspan.core.ragged`.
    """
    # Products and sums, not a product of matrices, whose precision a device may lower.
    return (turn_B33.to(xyz_N3.dtype)[row_owners(offsets, len(xyz_N3))] * xyz_N3[:, None]).sum(dim=2)


@torch.no_grad()
def projected(view_N3: Tensor, offsets: Tensor, side: int, spread: int = 3) -> MapProjection:
    """The pixels of clouds from their first two coordinates, which point to the right and down. Where a cloud is, and a
    factor of its coordinates, make no difference. Equal points share the pixel in the middle of the map; coordinates
    that are not finite get some pixel. Nothing is differentiated.

    Args:
        view_N3: as `seen_along` gives it, or `xyz_N3[:, order]` with one of `AXIS_ORDERS`; the third is not read.
        offsets: int64 [B+1], see `lightspan.core.ragged`.
        side: S, above spread.
        spread: K, odd.
    Raises: UserError for sizes that do not fit.
    """
    if spread < 1 or spread % 2 == 0 or side <= spread:
        raise UserError(f"spread={spread} must be odd and above 0, and side={side} above it; 3 of 224 is usual")
    cells = side - spread
    corner_N2 = wide(view_N3[:, :2])
    owner_N = row_owners(offsets, len(corner_N2))
    corner_N2 = corner_N2 + ragged_maxima(-corner_N2, offsets)[owner_N]
    range_B1 = ragged_maxima(corner_N2, offsets).amax(dim=1, keepdim=True)
    # By the range first: the quotient is at most 1, while a cell may round to one that leaves a point outside.
    share_N2 = corner_N2 / range_B1.clamp_min(torch.finfo(corner_N2.dtype).tiny)[owner_N]
    cell_N2 = (share_N2.nan_to_num(0) * cells).floor().clamp(0, cells)
    free_B2 = cells - ragged_maxima(cell_N2, offsets)
    column_N, row_N = (cell_N2 + (free_B2 / 2).floor()[owner_N]).long().add(spread // 2).unbind(1)
    return MapProjection((owner_N * side + row_N) * side + column_N, len(offsets) - 1, side, spread)
