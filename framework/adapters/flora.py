"""FLoRA: the change of an N-dimensional weight in Tucker form, so that a convolution's kernel keeps its axes.

Source: "FLoRA: Low-Rank Core Space for N-dimension", 2024, arXiv 2405.14739: Delta W = s G x_1 U_1 ... x_N U_N with a
core G that starts at zero and factors that start random. There is another, unrelated method of this name.
A Tucker kernel is applied as three small convolutions, 1x1 to r_in channels, the core's kernel to r_out, 1x1 to O; the
authors' code forms Delta W and runs a second full convolution. The input mode of a grouped convolution has the size
(channels / groups), like the weight's axis, and all groups share its factor.
Shapes: O output features, C input channels of one group, then one axis for each kernel dimension.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.adapters.adapter import Adapter, AdapterSpec
from lightspan.adapters.layers import LayerShape, like
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.subspaces.tucker import TuckerFrame, compose


@dataclass(frozen=True)
class FLoRA(AdapterSpec):
    """Args:
    rank: of the output and the input mode, from 1 to the layer's output features; at most C for the input mode.
    kernel_rank: of each kernel mode, >= 1, and at most that mode's size.
    scale: s, > 0; not tied to the rank as LoRA's alpha / r is, and the first setting to tune (0.04 to 4).
    dropout: share of its inputs that are dropped while training, in [0, 1).
    cap: whether a layer with fewer output features uses their number as its rank; otherwise it is refused.
    """

    rank: int = 16
    kernel_rank: int = 2
    scale: float = 4.0
    dropout: float = 0.0
    cap: bool = False

    def __post_init__(self) -> None:
        require_in("[1, inf)", rank=self.rank, kernel_rank=self.kernel_rank)
        require_in("(0, inf)", scale=self.scale)
        require_in("[0, 1)", dropout=self.dropout)

    def build(self, layer: nn.Module, name: str) -> "FLoRAUpdate":
        shape = LayerShape.of(layer)
        if self.rank > shape.out_features and not self.cap:
            raise UserError(
                f"rank={self.rank} is above the {shape.out_features} output features of {name}; lower it, or set "
                "cap=True to use the largest rank that such layers have"
            )
        wanted = (self.rank, self.rank, *(self.kernel_rank,) * len(shape.modes[2:]))
        ranks = tuple(min(rank, size) for rank, size in zip(wanted, shape.modes, strict=True))
        return FLoRAUpdate(layer, ranks, self.scale, self.dropout)


class FLoRAUpdate(Adapter):
    """scale * core x_1 factors[0] x_2 factors[1] ...; axes as in `LayerShape.modes`: output, input, kernel."""

    def __init__(self, layer: nn.Module, ranks: tuple[int, ...], scale: float, dropout: float) -> None:
        super().__init__(layer)
        options = like(layer)
        self.core = nn.Parameter(torch.zeros(ranks, **options))
        self.factors = nn.ParameterList(
            torch.empty(size, rank, **options) for size, rank in zip(self.layer.modes, ranks, strict=True)
        )
        for factor in self.factors:
            nn.init.kaiming_normal_(factor, a=math.sqrt(3))
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out, inner, *kernel = self.factors
        x = x.to(inner.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        core = compose(self.core * self.scale, [None, None, *kernel])
        if self.layer.linear:
            return F.linear(F.linear(F.linear(x, inner.mT), core), out)
        z = self.layer.pointwise(x, self.layer.for_each_group(inner.mT))
        return self.layer.pointwise(self.layer.convolve(z, self.layer.for_each_group(core)), out)

    def delta(self) -> Tensor:
        return self.layer.shaped(TuckerFrame(list(self.factors)).push(self.core * self.scale).flatten(1))

    def low_rank(self) -> tuple[Tensor, Tensor]:
        out, *others = self.factors
        return out * self.scale, compose(self.core, [None, *others]).flatten(1)
