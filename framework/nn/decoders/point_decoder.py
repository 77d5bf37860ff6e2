"""A decoder that guesses the points of groups that were hidden, from tokens of those that were seen.

Source: Pang et al., "Point-MAE", 2022, arXiv 2203.06604, section 3.2 and its code.
Shapes: B clouds, S groups seen, A groups asked for, D width.
"""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.init import xavier_uniform_
from lightspan.nn.points.positions import CentrePositions
from lightspan.nn.stochastic_depth import drop_paths
from lightspan.nn.widths import LazyHead


class PointDecoder(LazyHead):
    """Blocks of self-attention over what was seen and mask tokens, before each of which the places are added anew, then
    a norm and a linear layer.

    Args:
        in_features: D, the encoder's and this one's width, a multiple of heads.
        out_features: numbers of a group, three for each point; None leaves it to the method.
        depth, heads: of the blocks.
        drop_path: share of dropped branches in the last block, rising evenly from 0 in the first.
    Raises: UserError for sizes that do not fit.
    """

    head: nn.Linear

    def __init__(
        self,
        in_features: int = 384,
        out_features: int | None = None,
        depth: int = 4,
        heads: int = 6,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        if min(in_features, depth, heads) < 1 or in_features % heads:
            raise UserError(
                f"PointDecoder: in_features={in_features} must be a multiple of heads={heads}, and all and "
                f"depth={depth} above 0"
            )
        self.in_features = in_features
        self.mask_token, self.place = nn.Parameter(torch.randn(in_features) * 0.02), CentrePositions(in_features)
        self.blocks = nn.ModuleList(Block(in_features, heads) for _ in range(depth))
        for block, drop in zip(self.blocks, drop_paths(drop_path, depth, "PointDecoder"), strict=True):
            block.drop_path1 = block.drop_path2 = drop
        self.norm = nn.LayerNorm(in_features)
        xavier_uniform_(self.blocks)
        if out_features is not None:
            self.build(out_features)

    def make_outputs(self, count: int) -> None:
        self.head = nn.Linear(self.in_features, count)

    def forward(self, seen_BSD: Tensor, seen_BS3: Tensor, asked_BA3: Tensor) -> Tensor:
        """The numbers of each group asked for, [B A out_features].

        Args:
            seen_BS3, asked_BA3: centres of the groups.
        """
        self.require_outputs()
        asked = asked_BA3.shape[1]
        mask_BAD = self.mask_token.to(seen_BSD.dtype).expand(len(seen_BSD), asked, -1)
        x_BLD = torch.cat([seen_BSD, mask_BAD], dim=1)
        place_BLD = self.place(torch.cat([seen_BS3, asked_BA3], dim=1)).to(seen_BSD.dtype)
        for block in self.blocks:
            x_BLD = block(x_BLD + place_BLD)
        return self.head(self.norm(x_BLD[:, x_BLD.shape[1] - asked :]))
