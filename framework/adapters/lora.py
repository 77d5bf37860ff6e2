"""LoRA: a change of rank r, from two trained matrices.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685, equation 3:
y = W x + (alpha / r) B A x, with A random and B zero. For convolutions as in Hugging Face PEFT: A a kernel to r
channels, B a 1x1 kernel; this is the same on the weight read as a matrix [O I].
Shapes: O output features, I inputs of one of them (see `lightspan.adapters.layers`), R rank.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.adapters.adapter import Adapter, AdapterSpec
from lightspan.adapters.layers import fitting_rank, like
from lightspan.core.ranges import require_in


@dataclass(frozen=True)
class LoRA(AdapterSpec):
    """Args:
    rank: r, from 1 to the rank of the layer's weight.
    alpha: the change is scaled by alpha / r, > 0; None is r, a scale of 1.
    dropout: share of its inputs that are dropped while training, in [0, 1).
    cap: whether a layer whose weight has a smaller rank uses that as its r; otherwise it is refused.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    cap: bool = False

    def __post_init__(self) -> None:
        require_in("[1, inf)", rank=self.rank)
        require_in("(0, inf)", alpha=self.alpha)
        require_in("[0, 1)", dropout=self.dropout)

    def build(self, layer: nn.Module, name: str) -> "LoRAUpdate":
        rank = fitting_rank(self.rank, layer, name, self.cap)
        scale = 1.0 if self.alpha is None else self.alpha / rank
        return LoRAUpdate(layer, rank, scale, self.dropout)


class LoRAUpdate(Adapter):
    """scale * up down, `down` drawn as nn.Linear draws its weights, `up` zero."""

    def __init__(self, layer: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(layer)
        options = like(layer)
        self.down_RI = nn.Parameter(torch.empty(rank, self.layer.fan_in, **options))
        self.up_OR = nn.Parameter(torch.zeros(self.layer.out_features, rank, **options))
        nn.init.kaiming_uniform_(self.down_RI, a=math.sqrt(5))
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.to(self.down_RI.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return self.layer.up(self.layer.down(x, self.down_RI), self.up_OR * self.scale)

    def delta(self) -> Tensor:
        return self.layer.shaped(self.up_OR * self.scale @ self.down_RI)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.up_OR * self.scale, self.down_RI
