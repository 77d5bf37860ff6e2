"""Features of texts without any training: how often short sequences of tokens occur.

Shapes: B texts, T tokens, D features.
"""

import torch
from torch import Tensor, nn

from lightspan.core.ranges import require_in, require_numbers

_FACTOR, _MODULUS = 1_000_003, 2**31 - 1


class NgramCounts(nn.Module):
    """Square roots of the shares of n-grams, in D buckets by a hash: tokens [B T] -> [B D], rows of length 1.

    The product of two rows is then the Bhattacharyya coefficient of both texts. Tokens of number 0 are padding, and
    n-grams with one do not count; a text without an n-gram has a row of zeros.

    Args:
        longest: n of the longest n-grams; all from 1 up are counted.
        width: D.
    Attributes:
        num_features: D.
    """

    def __init__(self, longest: int = 3, width: int = 1024) -> None:
        super().__init__()
        require_in("[1, 8]", longest=longest)
        require_in("[1, inf)", width=width)
        require_numbers(width, width=width)
        self.longest, self.num_features = longest, width

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """float32 [B D] of token numbers, at least 0."""
        count_BD = torch.zeros(tokens_BT.shape[0], self.num_features, device=tokens_BT.device)
        key_BT, whole_BT = torch.zeros_like(tokens_BT), torch.ones_like(tokens_BT, dtype=torch.bool)
        for n in range(1, self.longest + 1):
            ends_BT = tokens_BT[:, n - 1 :]
            size = ends_BT.shape[1]
            key_BT = (key_BT[:, :size] * _FACTOR + ends_BT + n) % _MODULUS
            whole_BT = whole_BT[:, :size] & (ends_BT > 0)
            count_BD.scatter_add_(1, key_BT * 48_271 % _MODULUS % self.num_features, whole_BT.float())
        return (count_BD / count_BD.sum(dim=1, keepdim=True).clamp(min=1)).sqrt()
