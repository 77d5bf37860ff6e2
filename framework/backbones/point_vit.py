"""Transformers on point clouds: groups of neighbouring points are the patches.

Source: Pang et al., "Masked Autoencoders for Point Cloud Self-supervised Learning", 2022, arXiv 2203.06604, sections
3.1 and 3.2; the network that embeds groups is that of Point-BERT (Yu et al., 2021, arXiv 2111.14819) after PointNet (Qi
et al., 2016, arXiv 1612.00593).
Shapes: B clouds, N points of all, G groups of K points, S of them that are seen, D width.
"""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.points.groups import Groups, grouped
from lightspan.nn.points.positions import CentrePositions
from lightspan.nn.sequences.patches import at_places
from lightspan.nn.stochastic_depth import drop_paths

# A recipe may name the classes listed here.
__all__ = ["PointViT"]


class MiniPointNet(nn.Module):
    """Groups of points, whatever their order [S K 3] -> [S D]: two perceptrons for each point, of which the second also
    gets the maximum of the first over the group, and a maximum over the group after each. Norms take statistics of all
    points of a batch.

    Args:
        widths: of the first's hidden layer and output, and of the second's hidden layer.
        inputs: numbers of a point, in place of its three coordinates.
    """

    def __init__(self, width: int, widths: tuple[int, int, int] = (128, 256, 512), inputs: int = 3) -> None:
        super().__init__()
        hidden, each, joined = widths
        self.first = nn.Sequential(
            nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, each)
        )
        self.second = nn.Sequential(
            nn.Linear(2 * each, joined), nn.BatchNorm1d(joined), nn.ReLU(), nn.Linear(joined, width)
        )

    def forward(self, near_SK3: Tensor) -> Tensor:
        groups, size, _ = near_SK3.shape
        each_SKc = self.first(near_SK3.flatten(0, 1).to(next(self.parameters()).dtype)).unflatten(0, (groups, size))
        whole_SKc = each_SKc.amax(dim=1, keepdim=True).expand_as(each_SKc)
        both_SKc = torch.cat([whole_SKc, each_SKc], dim=2)
        return self.second(both_SKc.flatten(0, 1)).unflatten(0, (groups, size)).amax(dim=1)


class PointViT(nn.Module):
    """Packed points [N 3] and the offsets [B+1] that cut them into clouds -> [B 2D]: the maximum and then the mean over
    the tokens of all groups, 0 of a cloud without points.

    Groups are the points nearest to centres that are spread over the cloud (`lightspan.nn.points.groups`). A token
    knows its points from its centre, and where that is by a perceptron whose output is added before every block.

    Args:
        groups: G; a cloud of fewer points has some more than once.
        size: K, at least 2.
        width, depth, heads: D of the blocks, a multiple of heads.
        mlp_ratio: hidden width of the blocks' MLPs over `width`.
        drop_path: share of dropped branches in the last block, rising evenly from 0 in the first.
        point_widths: of the layers that embed single points, see `MiniPointNet`.
    Raises: UserError for sizes that do not fit.
    """

    def __init__(
        self,
        groups: int = 64,
        size: int = 32,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        point_widths: tuple[int, int, int] = (128, 256, 512),
    ) -> None:
        super().__init__()
        require_in("[1, inf)", groups=groups, point_widths=point_widths)
        require_in("[2, inf)", size=size)
        require_in("(0, inf)", mlp_ratio=mlp_ratio)
        if min(width, depth, heads) < 1 or width % heads:
            raise UserError(
                f"PointViT: width={width} must be a multiple of heads={heads}, and all and depth={depth} above 0"
            )
        self.groups, self.size, self.width, self.num_features = groups, size, width, 2 * width
        self.embed, self.place = MiniPointNet(width, point_widths), CentrePositions(width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        for block, drop in zip(self.blocks, drop_paths(drop_path, depth, "PointViT"), strict=True):
            block.drop_path1 = block.drop_path2 = drop
        self.norm = nn.LayerNorm(width)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias) if layer.bias is not None else None

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The blocks: one layer of features each, see `lightspan.nn.tokens`."""
        return [*self.blocks]

    def grouped(self, xyz_N3: Tensor, offsets: Tensor) -> Groups:
        return grouped(xyz_N3, offsets, self.groups, self.size)

    def tokens(self, groups: Groups, keep_BS: Tensor | None = None) -> Tensor:
        """Tokens after the norm, [B G D], or [B S D] of the kept groups, in their order: of the others nothing is seen.

        Args:
            keep_BS: int64, numbers of groups.
        """
        centre_BS3, near_BSK3 = groups.centre_BG3, groups.near_BGK3
        if keep_BS is not None:
            centre_BS3 = at_places(centre_BS3, keep_BS)
            near_BSK3 = at_places(near_BSK3.flatten(2), keep_BS).unflatten(2, (self.size, 3))
        x_BSD = self.embed(near_BSK3.flatten(0, 1)).unflatten(0, near_BSK3.shape[:2])
        place_BSD = self.place(centre_BS3).to(x_BSD.dtype)
        for block in self.blocks:
            x_BSD = block(x_BSD + place_BSD)
        return self.norm(x_BSD)

    def forward(self, xyz_N3: Tensor, offsets: Tensor) -> Tensor:
        groups = self.grouped(xyz_N3, offsets)
        tokens_BGD = self.tokens(groups)
        both_BD = torch.cat([tokens_BGD.amax(dim=1), tokens_BGD.mean(dim=1)], dim=1)
        return both_BD.masked_fill(~groups.real_B[:, None], 0)
