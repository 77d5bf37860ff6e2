"""The head of self-distillation, features to scores of prototypes; and prototypes as directions, which score vectors.

Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO), 2021, arXiv 2104.14294,
section 3.1 and appendix C; Caron et al., "SwAV", 2020, arXiv 2006.09882, for prototypes of unit length.
Shapes: F features, R bottleneck, K prototypes.
"""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.ranges import require_in
from lightspan.core.unit_length import unit_length


def dot_products(x: Tensor, direction_KD: Tensor) -> Tensor:
    """[..., D] -> [..., K], in float32 or wider, also under autocast.

    Cosines near 1 are 2^-8 apart in bfloat16, of which a temperature of 0.04 makes 0.1 nats.
    """
    with torch.autocast(x.device.type, enabled=False):
        return wide(x) @ wide(direction_KD).T


def zero_grads(parts: Iterable[nn.Module]) -> None:
    """The next step of the optimiser leaves the weights of these parts alone, as DINO and SwAV treat prototypes in
    their first epoch: they have no gradient, which is not a gradient of zero, so they do not decay either.
    """
    for part in parts:
        for parameter in part.parameters():
            parameter.grad = None


class Prototypes(nn.Module):
    """Cosines of vectors with K directions: [..., R] -> [..., K], each in [-1, 1], float32 or wider.

    The weight is used at unit length, as DINO's weight-normed last layer with its gains frozen at 1; a zero vector has
    the cosine 0 with all. Directions are rows of one table, which is not projected, nor decayed unless a rule of
    `groups` says so, as those of recipes at the scale of papers do. Decay does not move a direction, but it keeps its
    row short, and a step of a given length turns a short row further. Rows start as those of a linear layer, as in
    DINO's and iBOT's code, with a length near 0.58 at any width.
    """

    parameter_kinds = {"weight": "embeddings"}  # noqa: RUF012 - read by lightspan.optim.groups

    def __init__(self, in_features: int, count: int) -> None:
        super().__init__()
        require_in("[1, inf)", in_features=in_features, count=count)
        self.weight = nn.Linear(in_features, count, bias=False).weight

    def forward(self, x: Tensor) -> Tensor:
        return dot_products(unit_length(wide(x)), unit_length(wide(self.weight)))


class DINOHead(nn.Module):
    """Linear - GELU, as often as there are hidden widths, a Linear to the bottleneck, then prototypes: [..., F] ->
    [..., K].

    Args:
        in_features: the backbone's `num_features`.
        prototypes: K.
        hidden: widths of the hidden layers; none gives one linear layer.
        bottleneck: R.
    """

    def __init__(
        self, in_features: int, prototypes: int, hidden: tuple[int, ...] = (2048, 2048), bottleneck: int = 256
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden, bottleneck]
        require_in("[1, inf)", in_features=in_features, hidden=hidden, bottleneck=bottleneck)
        self.in_features = in_features
        linear = [nn.Linear(*pair) for pair in pairwise(widths)]
        for layer in linear:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(*[part for layer in linear for part in (layer, nn.GELU())][:-1])
        self.prototypes = Prototypes(bottleneck, prototypes)

    def forward(self, x: Tensor) -> Tensor:
        return self.prototypes(self.mlp(x))
