"""One vector from tokens by attention, or a few: learned queries ask all of them, or a learned token joins them in
blocks.

Source: Chen et al., "Context Autoencoder for Self-Supervised Representation Learning" (2202.03026), whose attentive
probing this follows: cross-attention of a learned query, then a linear layer. The norm is a choice of this project: a
LayerNorm of the tokens, which keeps no statistics of batches. Trinh et al., "Selfie", 2019, arXiv 1906.02940, section
2.3: blocks that end in a norm, over the tokens and a learned start. Zhao et al., "DPTR", 2024, arXiv 2408.05706,
section 3.3: several queries and an MLP, the feature merge unit.
Shapes: B samples, T tokens, Q queries, D width, C outputs.
"""

import math

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.sequences.attention import MultiHeadAttention


class AttentionPool(nn.Module):
    """[B T D] -> [B D], the same for any order of the tokens.

    Args:
        width: D.
        heads: of the attention; the greatest number that divides both this and the width is used.
    """

    def __init__(self, width: int, heads: int = 8) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, math.gcd(heads, width), batch_first=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = self.norm(x_BTD)
        query = self.query.expand(x_BTD.shape[0], -1, -1)
        return self.attention(query, x_BTD, x_BTD, need_weights=False)[0].squeeze(1)


class SummaryTransformer(nn.Module):
    """[B T D] -> [B D], the same for any order of the tokens: what becomes of a learned token among them.

    Blocks are torch's, each with a norm after attention and one after its MLP, as in Vaswani et al., 2017.

    Args:
        width: D, a multiple of `heads`.
        depth, heads: of the blocks, each at least 1.
        mlp_width: of their hidden layers.
        dropout: in the blocks, in [0, 1).
    """

    def __init__(self, width: int, depth: int = 3, heads: int = 32, mlp_width: int = 640, dropout: float = 0.1) -> None:
        super().__init__()
        if min(width, depth, heads, mlp_width) < 1 or width % heads or not 0 <= dropout < 1:
            raise UserError(
                f"SummaryTransformer: width={width} must be a multiple of heads={heads}, all and depth={depth} and "
                f"mlp_width={mlp_width} at least 1, and dropout={dropout} in [0, 1)"
            )
        self.in_features = self.out_features = width
        self.start_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, mlp_width, dropout, "gelu", batch_first=True) for _ in range(depth)
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        start = self.start_token.to(x_BTD.dtype).expand(x_BTD.shape[0], -1, -1)
        x_BTD = torch.cat([start, x_BTD], dim=1)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return x_BTD[:, 0]


class FeatureMerge(nn.Module):
    """[B T D] -> [B Q D], the same for any order of the tokens: x = q + drop(attention(q, tokens)); x + drop(MLP(norm
    x)), with dropout of attention weights and behind the MLP's activation too.

    Neither queries nor tokens are normalised before the attention, as in the authors' code. Queries start at
    N(0, 0.02^2), where that code leaves them at what was in memory.

    Args:
        width: D, a multiple of `heads`.
        queries: Q, at least 1; of a decoder of words one more than its longest word has letters.
        mlp_ratio: width of the MLP by D.
        dropout: in these four places, in [0, 1).
    """

    def __init__(
        self, width: int, queries: int = 26, heads: int = 8, mlp_ratio: float = 4.0, dropout: float = 0.1
    ) -> None:
        super().__init__()
        require_in("[1, inf)", queries=queries)
        self.in_features = self.out_features = width
        self.query_tokens = nn.Parameter(0.02 * torch.randn(queries, width))
        self.attention, self.norm = MultiHeadAttention(width, heads, dropout=dropout), nn.LayerNorm(width)
        self.mlp, self.drop = Mlp(width, int(mlp_ratio * width), drop=dropout), nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        query_BQD = self.query_tokens.to(x_BTD.dtype).expand(x_BTD.shape[0], -1, -1)
        merged_BQD = query_BQD + self.drop(self.attention(query_BQD, x_BTD, x_BTD))
        return merged_BQD + self.mlp(self.norm(merged_BQD))
