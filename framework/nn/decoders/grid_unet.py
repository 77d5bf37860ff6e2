"""A small U-Net of dense grids, which spreads what a few voxels hold to those around them.

Source: Zhu et al., "PonderV2", 2023, arXiv 2310.08586, section 3.2: a shallow network between the pooled features of
points and the field that is rendered; what layers it has is told in its code alone.
Shapes: B grids, C channels, D H W voxels.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in


class GridBlock(nn.Sequential):
    """Two convolutions of 3^3 voxels with GroupNorm and ReLU."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        groups = next(count for count in (8, 4, 2, 1) if out_chans % count == 0)
        super().__init__(
            nn.Conv3d(in_chans, out_chans, 3, padding=1, bias=False),
            nn.GroupNorm(groups, out_chans),
            nn.ReLU(),
            nn.Conv3d(out_chans, out_chans, 3, padding=1, bias=False),
            nn.GroupNorm(groups, out_chans),
            nn.ReLU(),
        )


class GridUNet(nn.Module):
    """[B in_chans D H W] -> [B out_chans D H W].

    Args:
        in_chans, out_chans: at least 1.
        widths: of the levels, from the finest down, each of half the sides of the one before, rounded up.
    Raises: UserError for sizes that do not fit.
    """

    def __init__(self, in_chans: int, out_chans: int, widths: Sequence[int] = (64, 128)) -> None:
        super().__init__()
        require_in("[1, inf)", in_chans=in_chans, out_chans=out_chans, widths=widths)
        if not widths:
            raise UserError("GridUNet: widths=[] must have a width at least")
        self.in_chans, self.out_chans = in_chans, out_chans
        self.down = nn.ModuleList(GridBlock(a, b) for a, b in pairwise([in_chans, *widths]))
        self.up = nn.ModuleList(GridBlock(a + b, b) for b, a in pairwise(widths))
        self.last = nn.Conv3d(widths[0], out_chans, 1)

    def forward(self, grid_BC: Tensor) -> Tensor:
        kept = list[Tensor]()
        for number, block in enumerate(self.down):
            grid_BC = block(F.avg_pool3d(grid_BC, 2, ceil_mode=True) if number else grid_BC)
            kept.append(grid_BC)
        grid_BC = kept.pop()
        for block in reversed(self.up):
            beside = kept.pop()
            larger = F.interpolate(grid_BC, beside.shape[2:], mode="trilinear", align_corners=False)
            grid_BC = block(torch.cat([larger, beside], dim=1))
        return self.last(grid_BC)
