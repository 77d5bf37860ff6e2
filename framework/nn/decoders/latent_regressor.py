"""What stands between an encoder and the targets of CAE: a regressor that predicts features of hidden patches, and a
decoder that reads these predictions alone.

Source: Chen et al., "Context Autoencoder for Self-Supervised Representation Learning", 2022, arXiv 2202.03026, section
3, and the authors' code.
Shapes: B batch, K visible and M hidden patches, w width, o outputs.
"""

from collections.abc import Sequence

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block, LayerScale
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.decoders.masked_sequence import positions
from lightspan.nn.init import xavier_uniform_
from lightspan.nn.sequences.attention import MultiHeadAttention
from lightspan.nn.sequences.patches import at_places
from lightspan.nn.stochastic_depth import Rates, drop_paths
from lightspan.nn.widths import LazyHead


class RegressorBlock(nn.Module):
    """q' = q + g1 attention(norm(q + p_m); keys norm([v; q] + [p_v; p_m]), values norm([v; q])); y = norm(q');
    q'' = y + g2 MLP(y). Both branches go through `drop_path`.

    Keys hold the queries too, so that hidden patches see one another; what was visible is not changed. As in the
    authors' code the second residual starts from the normalised tensor, and keys have no bias.
    """

    def __init__(self, width: int, heads: int, layer_scale: float, drop_path: nn.Module) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm_query, self.norm_key, self.norm_value, self.norm_mlp = (
            nn.LayerNorm(width, eps=1e-6) for _ in range(4)
        )
        self.attention = MultiHeadAttention(width, heads, key_bias=False)
        self.mlp = Mlp(width, 4 * width)
        self.scale_attention, self.scale_mlp = LayerScale(width, layer_scale), LayerScale(width, layer_scale)

    def forward(self, query_BMw: Tensor, visible_BKw: Tensor, at_BMw: Tensor, at_BKw: Tensor) -> Tensor:
        """[B M w].

        Args:
            at_BMw, at_BKw: positions of hidden and of visible patches.
        """
        all_BTw, at_BTw = torch.cat([visible_BKw, query_BMw], dim=1), torch.cat([at_BKw, at_BMw], dim=1)
        attended_BMw = self.attention(
            self.norm_query(query_BMw + at_BMw), self.norm_key(all_BTw + at_BTw), self.norm_value(all_BTw)
        )
        y_BMw = self.norm_mlp(query_BMw + self.drop_path(self.scale_attention(attended_BMw)))
        return y_BMw + self.drop_path(self.scale_mlp(self.mlp(y_BMw)))


class LatentRegressor(nn.Module):
    """Predicts features of hidden patches from those of visible ones, by cross-attention: [B K w] -> [B M w].

    Args:
        width: of the encoder, a multiple of `heads` and of 4.
        depth: blocks; the paper has 4.
        layer_scale: where LayerScale starts.
        drop_path: as in `lightspan.backbones.vit.vit`; 0.1 in the authors' code, as in their encoder and decoder.
    """

    def __init__(
        self, width: int, depth: int = 4, heads: int = 12, layer_scale: float = 0.1, drop_path: Rates = 0.1
    ) -> None:
        super().__init__()
        if min(width, depth, heads) < 1 or width % heads:
            raise UserError(
                f"LatentRegressor: width={width} must be a multiple of heads={heads}, and depth={depth} above 0"
            )
        self.in_features = self.out_features = width
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        drops = drop_paths(drop_path, depth, "LatentRegressor")
        self.blocks = nn.ModuleList(RegressorBlock(width, heads, layer_scale, drop) for drop in drops)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        xavier_uniform_(self)

    def forward(self, visible_BKw: Tensor, see_BK: Tensor, hide_BM: Tensor, grid: Sequence[int]) -> Tensor:
        """[B M w], in the order of `hide_BM`; places are counted row by row."""
        positions_BTw = positions(visible_BKw, grid)
        at_BKw, at_BMw = at_places(positions_BTw, see_BK), at_places(positions_BTw, hide_BM)
        query_BMw = self.mask_token.to(visible_BKw.dtype).expand_as(at_BMw)
        for block in self.blocks:
            query_BMw = block(query_BMw, visible_BKw, at_BMw, at_BKw)
        return self.norm(query_BMw)


class LatentDecoder(LazyHead):
    """Self-attention among predicted features of hidden patches and their positions, and a linear layer: [B M w] ->
    [B M o]. It never sees the visible ones.

    Args:
        width, depth, heads, layer_scale, drop_path: as in `LatentRegressor`.
        out_features: o; None leaves it to the method: codes of a tokenizer, or the numbers of a patch.
    """

    head: nn.Linear

    def __init__(
        self,
        width: int,
        out_features: int | None = None,
        depth: int = 4,
        heads: int = 12,
        layer_scale: float = 0.1,
        drop_path: Rates = 0.1,
    ) -> None:
        super().__init__()
        if min(width, depth, heads) < 1 or width % heads:
            raise UserError(
                f"LatentDecoder: width={width} must be a multiple of heads={heads}, and depth={depth} above 0"
            )
        self.in_features = width
        drops = drop_paths(drop_path, depth, "LatentDecoder")
        self.blocks = nn.Sequential(
            *(Block(width, heads, qkv_bias=True, init_values=layer_scale) for _ in range(depth))
        )
        for block, drop in zip(self.blocks, drops, strict=True):
            block.drop_path1 = block.drop_path2 = drop
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if out_features is not None:
            self.build(out_features)

    def make_outputs(self, count: int) -> None:
        self.head = nn.Linear(self.in_features, count)
        xavier_uniform_(self)

    def forward(self, features_BMw: Tensor, hide_BM: Tensor, grid: Sequence[int]) -> Tensor:
        """[B M o], in the order of `hide_BM`."""
        self.require_outputs()
        at_BMw = at_places(positions(features_BMw, grid), hide_BM)
        return self.head(self.norm(self.blocks(features_BMw + at_BMw)))
