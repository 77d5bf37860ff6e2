"""A decoder of tokens by levels, from the coarsest to a finer one, for `lightspan.backbones.point_pyramid`.

Source: Zhang et al., "Point-M2AE", 2022, arXiv 2205.14401, section 3.3, and its code; features go to finer levels as in
Qi et al., "PointNet++", 2017, arXiv 1706.02413, section 3.4.
Shapes: B clouds, G groups of a level, S of the coarser one, D width.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.init import xavier_uniform_
from lightspan.nn.points.interpolation import interpolated
from lightspan.nn.points.positions import CentrePositions
from lightspan.nn.stochastic_depth import drop_paths


class PointNorm(nn.Module):
    """BatchNorm over all tokens of a batch: [B G D] -> [B G D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x_BGD: Tensor) -> Tensor:
        return self.norm(x_BGD.flatten(0, 1)).view_as(x_BGD)


class ResidualPoints(nn.Module):
    """Two linear layers with norms around each point's features, added to them before a GELU: [B G D] -> [B G D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first = nn.Linear(width, width), PointNorm(width), nn.GELU()
        self.change, self.act = nn.Sequential(*first, nn.Linear(width, width), PointNorm(width)), nn.GELU()

    def forward(self, x_BGD: Tensor) -> Tensor:
        return self.act(x_BGD + self.change(x_BGD))


class Propagation(nn.Module):
    """Coarse features at finer places, put together with the finer tokens that were seen there, after a norm: [B G D].

    Args:
        coarse: width of the coarser level. width: D, that of the finer one.
        blocks: of `ResidualPoints`.
    """

    def __init__(self, coarse: int, width: int, blocks: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        residual = (ResidualPoints(width) for _ in range(blocks))
        self.fuse = nn.Sequential(nn.Linear(coarse + width, width), PointNorm(width), nn.GELU(), *residual)

    def forward(
        self, coarse_BSd: Tensor, from_BS3: Tensor, seen_BGD: Tensor, to_BG3: Tensor, hidden_BG: Tensor
    ) -> Tensor:
        """[B G D].

        Args:
            seen_BGD: the encoder's tokens of the finer level.
            hidden_BG: bool, where it saw nothing, in whose place is 0.
        """
        skip_BGD = self.norm(seen_BGD).masked_fill(hidden_BG[..., None], 0)
        above_BGd = interpolated(coarse_BSd, from_BS3, to_BG3)
        return self.fuse(torch.cat([skip_BGD, above_BGd.to(skip_BGD.dtype)], dim=2))


class PyramidDecoder(nn.Module):
    """Mask tokens join those of the coarsest level; blocks of self-attention there, then at each finer level blocks
    over what comes from the coarser one and what the encoder saw. Places are added before every block, and a norm comes
    last.

    Args:
        widths: of the levels, the coarsest first, those of the encoder there; multiples of heads. The last is that of
            what is returned.
        depths: blocks of each level.
        up_blocks: residual blocks on the way to each finer level.
        drop_path: share of dropped branches in the last block, rising evenly from 0 in the first.
    Raises: UserError for sizes that do not fit.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (384, 192),
        depths: tuple[int, ...] = (1, 1),
        heads: int = 6,
        up_blocks: int = 1,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        require_in("[1, inf)", widths=widths, depths=depths, heads=heads)
        require_in("[0, inf)", up_blocks=up_blocks)
        if not widths or len(widths) != len(depths) or any(width % heads for width in widths):
            raise UserError(
                f"PyramidDecoder: widths={[*widths]} must be multiples of heads={heads}, and depths={[*depths]} as many"
            )
        self.widths, self.out_features = tuple(widths), widths[-1]
        self.mask_token = nn.Parameter(torch.randn(widths[0]) * 0.02)
        self.places = nn.ModuleList(CentrePositions(width, width) for width in widths)
        self.ways = nn.ModuleList(Propagation(coarse, width, up_blocks) for coarse, width in pairwise(widths))
        self.levels = nn.ModuleList(
            nn.ModuleList(Block(width, heads) for _ in range(depth))
            for width, depth in zip(widths, depths, strict=True)
        )
        drops = iter(drop_paths(drop_path, sum(depths), "PyramidDecoder"))
        for blocks in self.levels:
            for block in blocks.children():
                block.drop_path1 = block.drop_path2 = next(drops)
        self.norm = nn.LayerNorm(widths[-1])
        xavier_uniform_(self.levels)

    def forward(self, tokens: Sequence[Tensor], centres: Sequence[Tensor], hidden: Sequence[Tensor]) -> Tensor:
        """Tokens of the finest of its levels, [B G D].

        Args:
            tokens: of the encoder's levels, the finest first, those of the coarsest after its norm; the coarsest levels
                are read.
            centres: of the groups of each level, [B G 3].
            hidden: bool [B G] of each level, of which no token is read.
        """
        coarsest = [*zip(tokens, centres, hidden, strict=True)][::-1]
        seen_BSD, from_BS3, hidden_BS = coarsest[0]
        x_BGD = torch.where(hidden_BS[..., None], self.mask_token.to(seen_BSD.dtype), seen_BSD)
        for level, (blocks, place) in enumerate(zip(self.levels, self.places, strict=True)):
            seen_BGD, to_BG3, hidden_BG = coarsest[level]
            if level:
                x_BGD = self.ways[level - 1](x_BGD, from_BS3, seen_BGD, to_BG3, hidden_BG)
            place_BGD = place(to_BG3).to(x_BGD.dtype)
            for block in blocks.children():
                x_BGD = block(x_BGD + place_BGD)
            from_BS3 = to_BG3
        return self.norm(x_BGD)
