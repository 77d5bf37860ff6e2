"""A change of the whole weight: what fine-tuning trains, kept beside the layer so that tasks can be switched.

For layers that are small or specific to a task, such as a table of classes.
Shapes: O output features, I inputs of one of them (see `lightspan.adapters.layers`), R rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.adapters.adapter import Adapter, AdapterSpec
from lightspan.adapters.layers import like


@dataclass(frozen=True)
class Full(AdapterSpec):
    """Trains as many numbers as the weight has; the bias is unchanged."""

    def build(self, layer: nn.Module, name: str) -> "FullChange":
        return FullChange(layer)


class FullChange(Adapter):
    """y' = y + change x, the change zero at first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.change = nn.Parameter(torch.zeros(self.layer.weight, **like(layer)))
        if kind := (getattr(layer, "parameter_kinds", None) or {}).get("weight"):
            self.parameter_kinds = {"change": kind}  # a change of a table is one, too

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.to(self.change.dtype)
        return F.linear(x, self.layer.matrix(self.change)) if self.layer.linear else self.layer.convolve(x, self.change)

    def delta(self) -> Tensor:
        return self.change

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """The change itself, and an identity of the size of its shorter side."""
        change_OI, identity = self.layer.matrix(self.change), torch.eye(self.layer.largest_rank).to(self.change)
        return (identity, change_OI) if self.layer.out_features == len(identity) else (change_OI, identity)
