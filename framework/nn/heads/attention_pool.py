"""One vector from tokens by attention: a learned query asks all of them.

Source: Chen et al., "Context Autoencoder for Self-Supervised Representation Learning" (2202.03026), whose attentive
probing this follows: cross-attention of a learned query, then a linear layer. The norm is a choice of this project: a
LayerNorm of the tokens, which keeps no statistics of batches.
Shapes: B samples, T tokens, D width, C outputs.
"""

import math

import torch
from torch import Tensor, nn


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
        query = self.query.expand(len(x_BTD), -1, -1)
        return self.attention(query, x_BTD, x_BTD, need_weights=False)[0].squeeze(1)
