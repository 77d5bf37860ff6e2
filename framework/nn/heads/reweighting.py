"""A head that weights features ever less and has nothing to learn, and an encoder that is read behind its head.

Source: Xue, Gan, Ni, Joshi, Mirzasoleiman, "Investigating the Benefits of Projection Head for Representation Learning",
ICLR 2024, arXiv 2403.11391: trained networks weight features more unequally behind their head than before it, which is
why features are read before; a fixed diagonal that does so recovers most of what a learned head gains.
Shapes: B rows, D features, P embedding width.
"""

import torch
from torch import Tensor, nn

from lightspan.core.distributed import register_replicated
from lightspan.core.ranges import require_in
from lightspan.nn.widths import given_features, require_width


class ReweightingHead(nn.Module):
    """g(h)_i = h_i kappa^-i, i from 0: [B D] -> [B D], without a trained weight.

    It puts an order on the coordinates, and few of them count: of those whose weight is above 1 % there are about
    4.6 / (kappa - 1), 92 for the authors' 1.05. With 2048 coordinates their last weights are below 1e-43; what float32
    rounds to zero has no gradient.

    Args:
        in_features: D, at least 1.
        kappa: at least 1 and finite; at 1 it is the identity.
    """

    weight_D: Tensor

    def __init__(self, in_features: int, kappa: float = 1.05) -> None:
        super().__init__()
        require_in("[1, inf)", in_features=in_features, kappa=kappa)
        self.in_features = self.out_features = in_features
        exponent_D = torch.arange(in_features, dtype=torch.float64)
        register_replicated(self, "weight_D", (kappa**-exponent_D).float(), persistent=False)

    def forward(self, h_BD: Tensor) -> Tensor:
        return h_BD * self.weight_D.to(h_BD.dtype)


class BehindHead(nn.Module):
    """An encoder whose features are what its head gives: [B ...] -> [B P], to compare with those before it.

    Raises: UserError for a head of another width.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        require_width(backbone, "head.in_features", getattr(head, "in_features", None))
        self.backbone, self.head = backbone, head
        self.num_features = given_features(head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))
