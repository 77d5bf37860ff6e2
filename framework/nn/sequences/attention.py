"""Attention in which queries, keys and values may come from three places, and attention with a learned bias.

Shapes: B batch, Q queries, S keys, w width, a heads, c channels of a head.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.errors import UserError


class MultiHeadAttention(nn.Module):
    """softmax(q k^T / sqrt(c)) v by heads, between linear layers (Vaswani et al., 2017, arXiv 1706.03762).

    Args:
        width: a multiple of `heads`.
        key_bias: BEiT and CAE leave the bias of keys out: it shifts all scores of a query alike, and changes nothing.
        dropout: share of the attention weights that training drops, in [0, 1).
    """

    def __init__(self, width: int, heads: int, key_bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or width < 1 or width % heads or not 0 <= dropout < 1:
            raise UserError(f"width={width} must be a multiple of heads={heads}, and dropout={dropout} lie in [0, 1)")
        self.heads, self.dropout = heads, dropout
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=key_bias)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query_BQw: Tensor, key_BSw: Tensor, value_BSw: Tensor, seen: Tensor | None = None) -> Tensor:
        """[B Q w]. Without keys (S = 0) it is the bias of the last layer.

        Args:
            seen: bool, of a shape that expands to [B a Q S], True where a query may look; at least one key of each.
        """
        parts = self.query(query_BQw), self.key(key_BSw), self.value(value_BSw)
        q_BaQc, k_BaSc, v_BaSc = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        dropout = self.dropout if self.training else 0.0
        mixed_BaQc = F.scaled_dot_product_attention(q_BaQc, k_BaSc, v_BaSc, attn_mask=seen, dropout_p=dropout)
        return self.out(mixed_BaQc.transpose(1, 2).flatten(2))


def biased_attention(q_BaQc: Tensor, k_BaSc: Tensor, v_BaSc: Tensor, bias_BaQS: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(c) + bias) v, [B a Q c], for a bias that is learned: its gradient is 0 without any rows.

    Args:
        bias_BaQS: of a shape that expands to [B a Q S]; -inf hides a key.
        dropout: share of the attention weights that is dropped, in [0, 1).
    """
    mixed_BaQc = F.scaled_dot_product_attention(q_BaQc, k_BaSc, v_BaSc, attn_mask=bias_BaQS, dropout_p=dropout)
    if len(q_BaQc):
        return mixed_BaQc
    # Of an empty batch torch gives the bias no gradient, and a rank that has no rows would leave the others waiting.
    return mixed_BaQc + 0 * bias_BaQS.masked_fill(bias_BaQS.isinf(), 0).sum()
