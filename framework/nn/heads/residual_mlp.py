"""A small network beside frozen features, which it changes a little: what may be tuned where the rest is a black box.

Shapes: B rows, D features.
"""

import torch
from torch import Tensor, nn

from lightspan.nn.heads.projector import Projector
from lightspan.nn.widths import given_features


class ResidualMLP(nn.Module):
    """z = f + s * MLP(f), [B D] -> [B D], with a learned scale s of each feature; at s = 0 it is the identity.

    Source: NMTune, arXiv 2309.17002, and its code: Linear(D, 4 D) - BatchNorm - ReLU - Linear(4 D, D). There s begins
    at 1, so that z is not f in the first step.

    Args:
        in_features: D, at least 1.
        widen: hidden width over D, at least 1.
        batch_norm: whether the hidden layer has a BatchNorm.
        scale: the value of s to begin with.
    """

    def __init__(self, in_features: int, widen: int = 4, batch_norm: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        self.in_features = self.out_features = in_features
        self.mlp = Projector(in_features, [widen * in_features], in_features, hidden_norm=batch_norm)
        self.scale_D = nn.Parameter(torch.full((in_features,), scale))

    def forward(self, f_BD: Tensor) -> Tensor:
        return f_BD + self.scale_D * self.mlp(f_BD)


class Tuned(nn.Module):
    """An encoder whose features go through a small network, as one encoder.

    Args:
        encoder: [B ...] -> [B D].
        mlp: [B D] -> [B P].
    """

    def __init__(self, encoder: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.encoder, self.mlp = encoder, mlp
        self.num_features = given_features(mlp)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.encoder(x))
