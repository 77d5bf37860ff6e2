"""U-Nets of sparse convolutions on the voxels of point clouds.

Source: Graham et al., "3D Semantic Segmentation with Submanifold Sparse Convolutional Networks", 2018, arXiv
1711.10275; Choy et al., "4D Spatio-Temporal ConvNets", 2019, arXiv 1904.08755, whose MinkUNet has these blocks. The
defaults are those of SpUNet34 as in PonderV2 (Zhu et al., 2023, arXiv 2310.08586).
Shapes: V voxels, C coarser ones, I O channels.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.row_norm import RowNorm
from lightspan.nn.voxels.convolution import VoxelConv, VoxelPairs, around, inside
from lightspan.nn.voxels.levels import Level, coarser_level

# A recipe may name the class listed here.
__all__ = ["SparseUNet"]

EPSILON = 1e-3  # of the norms, as published


class ConvNorm(nn.Module):
    """A convolution and a norm: [V I] and pairs -> [rows O]."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = VoxelConv(in_channels, out_channels, kernel)
        self.norm = RowNorm(out_channels, EPSILON)

    def forward(self, x_VI: Tensor, pairs: VoxelPairs) -> Tensor:
        return self.norm(self.conv(x_VI, pairs))


class ResidualBlock(nn.Module):
    """Two convolutions beside the identity, or a linear map where the width changes: [V I] -> [V O]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first, self.second = ConvNorm(in_channels, out_channels, 3), ConvNorm(out_channels, out_channels, 3)
        linear = nn.Linear(in_channels, out_channels, bias=False)
        self.beside = (
            nn.Identity() if in_channels == out_channels else nn.Sequential(linear, RowNorm(out_channels, EPSILON))
        )

    def forward(self, x_VI: Tensor, pairs: VoxelPairs) -> Tensor:
        y_VO = self.second(F.relu(self.first(x_VI, pairs)), pairs)
        return F.relu(y_VO + self.beside(x_VI))


class SparseStage(nn.Module):
    """Blocks, of which the first takes another width: [V I] -> [V O]."""

    def __init__(self, in_channels: int, out_channels: int, depth: int) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * depth]
        self.blocks = nn.ModuleList(ResidualBlock(*pair) for pair in pairwise(widths))

    def forward(self, x_VI: Tensor, pairs: VoxelPairs) -> Tensor:
        for block in self.blocks:
            x_VI = block(x_VI, pairs)
        return x_VI


class SparseUNet(nn.Module):
    """A level of voxels -> features of each, [V num_features].

    Each stage down joins the voxels in a cube of two a side, and each stage up divides them again, beside what the way
    down had of them. Norms take statistics of all voxels of this rank's batch.

    Args:
        in_chans: of a level's `inputs`: three for the place in the voxel, and three for each signal.
        stem: width of the first convolution, whose kernel has five voxels a side.
        widths, depths: of the stages down and then up, each a width and a number of blocks; as many up as down.
        momentum: share of a batch in the norms' running statistics, in (0, 1]. The published one needs some hundred
            steps to forget where these began; shorter runs take 0.1.
    Raises: UserError for stages that do not fit.
    """

    def __init__(
        self,
        in_chans: int = 9,
        stem: int = 32,
        widths: Sequence[int] = (32, 64, 128, 256, 256, 128, 96, 96),
        depths: Sequence[int] = (2, 3, 4, 6, 2, 2, 2, 2),
        momentum: float = 0.01,
    ) -> None:
        super().__init__()
        if not widths or len(widths) % 2 or len(widths) != len(depths):
            raise UserError(
                f"SparseUNet: widths={[*widths]} and depths={[*depths]} must have a number for each stage, as many "
                "stages up as down"
            )
        require_in("[1, inf)", in_chans=in_chans, stem=stem, widths=widths)
        require_in("[0, inf)", depths=depths)
        require_in("(0, 1]", momentum=momentum)
        stages = len(widths) // 2
        if not all(depths[stages:]):
            raise UserError(f"SparseUNet: depths={[*depths]} must be at least 1 on the way up")
        given = [stem, *widths[:stages]]  # by the way down at each level
        self.in_chans, self.num_features = in_chans, widths[-1]
        self.stem = ConvNorm(in_chans, stem, 5)
        self.down = nn.ModuleList(ConvNorm(a, b, 2) for a, b in pairwise(given))
        self.down_stages = nn.ModuleList(
            SparseStage(width, width, depth) for width, depth in zip(given[1:], depths, strict=False)
        )
        below, skips = [given[-1], *widths[stages:-1]], given[-2::-1]
        self.up = nn.ModuleList(ConvNorm(a, b, 2) for a, b in zip(below, widths[stages:], strict=True))
        self.up_stages = nn.ModuleList(
            SparseStage(width + skip, width, depth)
            for width, skip, depth in zip(widths[stages:], skips, depths[stages:], strict=True)
        )
        for layer in self.modules():
            if isinstance(layer, RowNorm):
                layer.momentum = momentum

    def forward(self, level: Level) -> Tensor:
        inputs_VI = level.inputs
        if inputs_VI.shape[1] != self.in_chans:
            raise UserError(
                f"SparseUNet: in_chans={self.in_chans}, and a voxel has {inputs_VI.shape[1]} inputs, three for its "
                "place and three for each field; set it to that"
            )
        x_VD = F.relu(self.stem(inputs_VI.to(self.stem.conv.weight.dtype), around(level.voxels, 5)))
        kept, pairs = [x_VD], [around(level.voxels, 3)]
        links = []
        for down, stage in zip(self.down, self.down_stages, strict=True):
            coarse, parent_V = coarser_level(level, 2)
            links.append(inside(level.voxels, parent_V, len(coarse.xyz_V3), 2))
            level = coarse
            pairs.append(around(level.voxels, 3))
            x_VD = stage(F.relu(down(x_VD, links[-1])), pairs[-1])
            kept.append(x_VD)
        for above, (up, stage) in enumerate(zip(self.up, self.up_stages, strict=True), start=2):
            divided_VD = F.relu(up(x_VD, links[1 - above].turned()))
            x_VD = stage(torch.cat([divided_VD, kept[-above]], dim=1), pairs[-above])
        return x_VD
