"""A linear layer whose weights another vector decides.

Shapes: B rows, K numbers of the condition, I inputs, O outputs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.ranges import require_in


class HyperLinear(nn.Module):
    """out_b = W(z_b) x_b with W(z) = sum_k z_k H_k: a linear hypernetwork, and a linear layer, both without bias.

    The output is linear in the condition as in the input, and zero where either is: nothing can be predicted without
    the condition. It costs K layers of weights, and no W(z) is ever stored.

    Source: the predictor of Garrido, Najman, LeCun, "Self-supervised learning of Split Invariant Equivariant
    representations", 2023, arXiv 2302.10283, section 4. Assumed: weights start so that a condition of length 1 keeps
    the size of its input on average; how the authors start theirs was not checked.

    Args:
        condition_features, in_features, out_features: K, I and O, at least 1.
    """

    def __init__(self, condition_features: int, in_features: int, out_features: int) -> None:
        super().__init__()
        require_in(
            "[1, inf)", condition_features=condition_features, in_features=in_features, out_features=out_features
        )
        self.condition_features, self.in_features, self.out_features = condition_features, in_features, out_features
        self.weight = nn.Parameter(torch.randn(condition_features, out_features, in_features) * in_features**-0.5)

    def forward(self, x_BI: Tensor, z_BK: Tensor) -> Tensor:
        """[B O]."""
        of_each_BKO = F.linear(x_BI, self.weight.flatten(0, 1)).unflatten(1, self.weight.shape[:2])
        return (z_BK.to(of_each_BKO.dtype).unsqueeze(1) @ of_each_BKO).squeeze(1)
