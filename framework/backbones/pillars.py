"""PointPillars: clouds of points as fields over the ground, pillar by pillar, and convolutions of those.

Source: Lang et al., "PointPillars", CVPR 2019, arXiv 1812.05784, sections 2.1 and 2.2, and its code. Of each point a
linear layer with BatchNorm and ReLU sees where it lies, and a pillar has the largest of its points' numbers. Blocks of
convolutions follow, each coarser than the one before, whose outputs are brought to the cells of the first and stacked.
Differences: of x and y a point has its offsets from the middle of its pillar and from the mean of the pillar's points
alone, and z; where it lies in the field is not told, so that a cloud moved by whole cells has a moved field, up to the
zeros around it. There is no reflectance, and no limit on the points and pillars.
Shapes: B clouds, N points of all, M points over the field, D features, H W cells.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightspan.core.devices import has_values, wide
from lightspan.core.errors import UserError
from lightspan.core.ragged import ragged_means, row_owners
from lightspan.core.ranges import require_in
from lightspan.nn.points.ground import field_at, inside
from lightspan.nn.row_norm import RowNorm


class PillarBlock(nn.Sequential):
    """A convolution of 3 x 3 cells by a stride, and `depth` more, each with BatchNorm and ReLU."""

    def __init__(self, in_chans: int, width: int, depth: int, stride: int) -> None:
        layers: list[nn.Module] = []
        for number in range(depth + 1):
            by = 1 if number else stride
            conv = nn.Conv2d(width if number else in_chans, width, 3, stride=by, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class Pillars(nn.Module):
    """Points [N 3] and offsets [B+1] -> fields [B num_features H W] over [-reach, reach]^2. Points elsewhere, or with
    coordinates that are not finite, are not seen.

    Args:
        reach: in the unit of points, above 0.
        cell: side of a pillar. 2 reach / cell is a whole multiple of all strides together.
        stem: numbers of a pillar.
        widths, depths, strides: of blocks, equally many; a block has one convolution more than its depth.
        up: channels of each block's output; num_features is as many for each block.
    Raises: UserError for sizes that do not fit.
    """

    def __init__(
        self,
        reach: float,
        cell: float,
        stem: int = 64,
        widths: Sequence[int] = (64, 128, 256),
        depths: Sequence[int] = (3, 5, 5),
        strides: Sequence[int] = (2, 2, 2),
        up: int = 128,
    ) -> None:
        super().__init__()
        require_in("(0, inf)", reach=reach, cell=cell)
        require_in("[1, inf)", stem=stem, widths=widths, strides=strides, up=up)
        require_in("[0, inf)", depths=depths)
        if not len(widths) == len(depths) == len(strides) > 0:
            raise UserError(
                f"Pillars: widths={[*widths]}, depths={[*depths]} and strides={[*strides]} must have a number for each "
                "block, of which there is one at least"
            )
        side, whole = round(2 * reach / cell), math.prod(strides)
        if not math.isclose(side * cell, 2 * reach, rel_tol=1e-6) or side < 1 or side % whole:
            raise UserError(
                f"Pillars: reach={reach:g} and cell={cell:g} make {2 * reach / cell:g} pillars a side, which must be a "
                f"multiple of {whole}, the product of strides={[*strides]}"
            )
        self.reach, self.cell, self.side, self.num_features = float(reach), float(cell), side, up * len(widths)
        self.point = nn.Sequential(nn.Linear(6, stem, bias=False), RowNorm(stem), nn.ReLU())
        self.blocks, self.ups = nn.ModuleList(), nn.ModuleList()
        for number, (width, depth, stride) in enumerate(zip(widths, depths, strides, strict=True)):
            self.blocks.append(PillarBlock(widths[number - 1] if number else stem, width, depth, stride))
            by = math.prod(strides[1 : number + 1])
            larger = nn.ConvTranspose2d(width, up, by, stride=by, bias=False)
            self.ups.append(nn.Sequential(larger, nn.BatchNorm2d(up), nn.ReLU()))

    def pillars(self, xyz_N3: Tensor, offsets: Tensor) -> Tensor:
        """[B stem side side]; 0 where there is no point."""
        cloud_N = row_owners(offsets, len(xyz_N3))
        seen_N = inside(xyz_N3, self.reach)
        # A plan, which knows no places, sees all.
        at_M = seen_N.nonzero()[:, 0] if has_values(seen_N) else torch.arange(len(seen_N), device=seen_N.device)
        xyz_M3, cloud_M, cells = wide(xyz_N3[at_M]), cloud_N[at_M], (len(offsets) - 1) * self.side**2
        place_M2 = ((xyz_M3[:, :2] + self.reach) / self.cell).floor().clamp(0, self.side - 1)
        x_M, y_M = place_M2.long().unbind(1)
        cell_M = (cloud_M * self.side + y_M) * self.side + x_M
        sums_V3 = xyz_M3.new_zeros(cells, 3).index_add(0, cell_M, xyz_M3)
        count_V = xyz_M3.new_zeros(cells).index_add(0, cell_M, torch.ones_like(xyz_M3[:, 0]))
        means_M3 = sums_V3[cell_M] / count_V[cell_M, None]
        middle_M2 = (place_M2 + 0.5) * self.cell - self.reach
        told_M6 = torch.cat([xyz_M3[:, :2] - middle_M2, xyz_M3[:, 2:], xyz_M3 - means_M3], dim=1)
        given_MC = self.point(told_M6.to(xyz_N3.dtype))
        at_MC = cell_M[:, None].expand_as(given_MC)
        found_VC = given_MC.new_zeros(cells, given_MC.shape[1]).scatter_reduce(
            0, at_MC, given_MC, "amax", include_self=False
        )
        return found_VC.unflatten(0, (len(offsets) - 1, self.side, self.side)).movedim(-1, 1)

    def forward(self, xyz_N3: Tensor, offsets: Tensor) -> Tensor:
        x_BCHW, found = self.pillars(xyz_N3, offsets), []
        for block, up in zip(self.blocks, self.ups, strict=True):
            x_BCHW = block(x_BCHW)
            found.append(up(x_BCHW))
        return torch.cat(found, dim=1)

    def pooled(self, field_BDHW: Tensor, xyz_N3: Tensor, offsets: Tensor) -> Tensor:
        """The mean of a cloud's field over its points, [B D]; 0 of a cloud without any."""
        at_ND = field_at(field_BDHW, xyz_N3[:, :2], row_owners(offsets, len(xyz_N3)), self.reach)
        return ragged_means(at_ND, offsets)
