"""Transformers on point clouds by levels: groups of points, groups of groups, and so on, each with tokens of its own.

Source: Zhang et al., "Point-M2AE: Multi-scale Masked Autoencoders for Hierarchical Point Cloud Pre-training", 2022,
arXiv 2205.14401, section 3, and its code.
Shapes: B clouds, N points of all, G groups of a level, K points of a group, S groups that are seen, at most, D width.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from lightspan.backbones.point_vit import MiniPointNet
from lightspan.core.devices import has_values
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.masking.guided_masks import seen_first
from lightspan.nn.points.groups import NestedGroups, nested_groups
from lightspan.nn.points.positions import CentrePositions
from lightspan.nn.sequences.patches import at_places
from lightspan.nn.stochastic_depth import drop_paths

# A recipe may name the classes listed here.
__all__ = ["PointPyramid"]


class PointPyramid(nn.Module):
    """Packed points [N 3] and the offsets [B+1] that cut them into clouds -> [B D]: the maximum over the tokens of the
    coarsest level, 0 of a cloud without points.

    A token of the finest level knows the points of its group from their centre; one of any other level is merged of the
    finer tokens of its group. Where a group is, a perceptron tells before every block.

    Args:
        groups: of each level, the finest first; a cloud of fewer points has some more than once.
        sizes: of a group of each level, at least 2.
        widths: of each level's tokens, multiples of heads.
        depths: blocks of each level.
        mlp_ratio: hidden width of the blocks' MLPs over their width.
        drop_path: share of dropped branches in the last block, rising evenly from 0 in the first.
        point_widths: of the layers that embed single points, see `MiniPointNet`.
    Raises: UserError for sizes that do not fit.
    """

    def __init__(
        self,
        groups: tuple[int, ...] = (512, 256, 64),
        sizes: tuple[int, ...] = (16, 8, 8),
        widths: tuple[int, ...] = (96, 192, 384),
        depths: tuple[int, ...] = (5, 5, 5),
        heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        point_widths: tuple[int, int, int] = (128, 256, 512),
    ) -> None:
        super().__init__()
        require_in("[1, inf)", groups=groups, widths=widths, depths=depths, heads=heads, point_widths=point_widths)
        require_in("[2, inf)", sizes=sizes)
        require_in("(0, inf)", mlp_ratio=mlp_ratio)
        if not groups or len({len(groups), len(sizes), len(widths), len(depths)}) > 1:
            raise UserError(
                f"PointPyramid: groups={[*groups]}, sizes={[*sizes]}, widths={[*widths]} and depths={[*depths]} must "
                "have a number for each level, and one level at least"
            )
        if any(width % heads for width in widths):
            raise UserError(f"PointPyramid: widths={[*widths]} must be multiples of heads={heads}")
        self.groups, self.sizes, self.widths, self.num_features = tuple(groups), tuple(sizes), tuple(widths), widths[-1]
        merging = (MiniPointNet(to, (below, below, to), below) for below, to in pairwise(widths))
        self.embeds = nn.ModuleList([MiniPointNet(widths[0], point_widths), *merging])
        self.places = nn.ModuleList(CentrePositions(width, width) for width in widths)
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
            for width, depth in zip(widths, depths, strict=True)
        )
        for block, drop in zip(self.feature_modules, drop_paths(drop_path, sum(depths), "PointPyramid"), strict=True):
            block.drop_path1 = block.drop_path2 = drop
        self.norm = nn.LayerNorm(widths[-1])
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias) if layer.bias is not None else None

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The blocks of all levels: one layer of features each, see `lightspan.nn.tokens`."""
        return [block for blocks in self.blocks for block in blocks.children()]

    def grouped(self, xyz_N3: Tensor, offsets: Tensor) -> tuple[NestedGroups, ...]:
        return nested_groups(xyz_N3, offsets, self.groups, self.sizes)

    def tokens(self, levels: Sequence[NestedGroups], hidden: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Tokens of each level, the finest first, [B G D], those of the coarsest after the norm.

        Args:
            hidden: bool [B G] of each level; of hidden groups nothing is seen, and their tokens are 0. A group that is
                seen must have none that is hidden among its finer ones (`lightspan.nn.masking.guided_masks`).
        """
        found: list[Tensor] = []
        for level, groups in enumerate(levels):
            hidden_BG = torch.zeros_like(groups.centre_BG, dtype=torch.bool) if hidden is None else hidden[level]
            at_BS, seen_BS = seen_first(hidden_BG)
            x_BSD = self._embedded(level, groups, found[-1] if found else None, at_BS, seen_BS)
            place_BSD = self.places[level](at_places(groups.centre_BG3, at_BS)).to(x_BSD.dtype)
            seen_B11S = None if hidden is None else seen_BS[:, None, None]
            for block in self.blocks[level].children():
                x_BSD = block(x_BSD + place_BSD, attn_mask=seen_B11S)
            x_BSD = self.norm(x_BSD) if level == len(self.widths) - 1 else x_BSD
            found.append(_put_back(x_BSD, at_BS, seen_BS, hidden_BG.shape[1]))
        return found

    def _embedded(
        self, level: int, groups: NestedGroups, below_BFd: Tensor | None, at_BS: Tensor, seen_BS: Tensor
    ) -> Tensor:
        """[B S D], 0 of those that are not seen, of which norms take no statistics."""
        if below_BFd is None:
            near_BSKc = at_places(groups.near_BGK3.flatten(2), at_BS).unflatten(2, groups.near_BGK3.shape[2:])
        else:
            near_BSK = at_places(groups.near_BGK, at_BS)
            near_BSKc = at_places(below_BFd, near_BSK.flatten(1)).unflatten(1, near_BSK.shape[1:])
        near_RKc, places = near_BSKc.flatten(0, 1), _true_places(seen_BS.flatten())
        x_VD = self.embeds[level](near_RKc if places is None else near_RKc[places])
        x_RD = x_VD if places is None else x_VD.new_zeros(len(near_RKc), x_VD.shape[1]).index_put((places,), x_VD)
        return x_RD.unflatten(0, seen_BS.shape)

    def forward(self, xyz_N3: Tensor, offsets: Tensor) -> Tensor:
        levels = self.grouped(xyz_N3, offsets)
        return self.tokens(levels)[-1].amax(dim=1).masked_fill(~levels[-1].real_B[:, None], 0)


def _true_places(which_R: Tensor) -> Tensor | None:
    """Where it is True, int64; None where it is everywhere, as it is taken to be in a plan."""
    if not has_values(which_R) or bool(which_R.all()):
        return None
    return which_R.nonzero()[:, 0]


def _put_back(x_BSD: Tensor, at_BS: Tensor, seen_BS: Tensor, groups: int) -> Tensor:
    """[B G D], 0 of groups that are not seen."""
    x_BGD = x_BSD.new_zeros(len(x_BSD), groups, x_BSD.shape[2])
    return x_BGD.scatter(1, at_BS[..., None].expand_as(x_BSD), x_BSD.masked_fill(~seen_BS[..., None], 0))
