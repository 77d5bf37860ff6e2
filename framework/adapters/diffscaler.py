"""DiffScaler: a task scales and shifts what a layer computes, and adds a bottleneck for what the layer lacks.

Source: Nair, Valanarasu, Patel, "Diffscaler: Enhancing the Generative Prowess of Diffusion Transformers", 2024, arXiv
2404.09976: y' = W x + b + a (W x) + b_k + s W_up ReLU(W_down x). a, b_k and W_up start at zero, which the paper does
not say and a start at the pretrained network requires. For convolutions the bottleneck is two 1x1 kernels.
Each task's numbers are one named adapter, so a network can have any number of tasks.
Shapes: O output features, I inputs of one of them (see `lightspan.adapters.layers`), C channels of them, R bottleneck.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.adapters.adapter import Adapter, AdapterSpec
from lightspan.adapters.layers import like, readable_weight
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in


@dataclass(frozen=True)
class DiffScaler(AdapterSpec):
    """Args:
    rank: width of the bottleneck, >= 0. At 0 there are only scale and shift, and the change can be merged.
    """

    rank: int = 8

    def __post_init__(self) -> None:
        require_in("[0, inf)", rank=self.rank)

    def build(self, layer: nn.Module, name: str) -> "Affiner":
        return Affiner(layer, self.rank)


class Affiner(Adapter):
    """The change of one layer. Layers without a bias get no shift: no plain layer could represent it.

    It can be merged if `strength` (s) is zero or there is no bottleneck.
    """

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__(layer)
        # In a tuple, hidden from torch: the change uses the layer's own weight and bias, which are not part of it.
        self._changed = (layer,)
        outputs, options = self.layer.out_features, like(layer)
        channels = self.layer.fan_in if self.layer.linear else self.layer.weight[1]
        self.scale_O = nn.Parameter(torch.zeros(outputs, **options))
        self.shift_O = None if layer.bias is None else nn.Parameter(torch.zeros(outputs, **options))
        self.rank = rank
        if rank:
            self.strength = nn.Parameter(torch.ones(1, **options))
            self.down_RC = nn.Parameter(torch.empty(rank, channels, **options))
            self.up_OR = nn.Parameter(torch.zeros(outputs, rank, **options))
            nn.init.kaiming_uniform_(self.down_RC, nonlinearity="relu")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        bias_O = self._changed[0].bias
        change = self._beside(self.scale_O) * (y if bias_O is None else y - self._beside(bias_O))  # type: ignore[arg-type]
        if self.shift_O is not None:
            change = change + self._beside(self.shift_O)
        if self.rank:
            hidden = F.relu(self._down(x.to(self.down_RC.dtype)))
            change = change + self.layer.up(hidden, self.strength * self.up_OR)
        return change

    def _down(self, x: Tensor) -> Tensor:
        if self.layer.linear:
            return self.layer.down(x, self.down_RC)
        # At the centre of an empty kernel of the layer's size: stride, padding and groups are then those of the layer.
        kernel = self.down_RC.new_zeros(self.rank, *self.layer.weight[1:])
        kernel.flatten(2)[..., kernel[0, 0].numel() // 2] = self.down_RC
        return self.layer.convolve(x, self.layer.for_each_group(kernel))

    def _beside(self, values_O: Tensor) -> Tensor:
        """One number per feature, in a shape that broadcasts to the layer's output."""
        return values_O if self.layer.linear else values_O.view(-1, *(1,) * len(self.layer.stride))

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        return not self.rank or not self.strength.detach().any()

    def delta(self) -> Tensor:
        """diag(a) W. Raises: UserError while the bottleneck adds something."""
        if not self.mergeable:
            raise UserError(
                f"the bottleneck of DiffScaler(rank={self.rank}) has a ReLU, so its change is not of the weight and "
                "can be neither merged nor exported; keep the adapter, or set its strength to 0 to fold scale and shift"
            )
        return self.layer.shaped(self.scale_O[:, None] * self._matrix())

    def bias_delta(self) -> Tensor | None:
        return self.shift_O

    def low_rank(self) -> tuple[Tensor, Tensor]:
        change_OI = self.layer.matrix(self.delta())
        if self.layer.out_features > self.layer.fan_in:
            return change_OI, torch.eye(self.layer.fan_in).to(change_OI)
        return torch.diag(self.scale_O), self._matrix().to(change_OI)

    def _matrix(self) -> Tensor:
        return self.layer.matrix(readable_weight(self._changed[0]))
