"""What an adapter knows of the layer it changes: its sizes, and how a thin matrix is applied to the layer's input.

A layer's weight is read as one matrix [O I]: O output features, I the inputs that one of them sees, for a convolution
(input channels / groups) x kernel positions. R is the rank of a change. A change of rank R is applied as two cheap
steps, `down` to R numbers a position and `up` to O, and never needs the matrix [O I] itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lightspan.errors import UserError

_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
TAKEN = "nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d and transformers' Conv1D with floating-point weights"


def supported(layer: nn.Module) -> bool:
    """Whether `LayerShape.of` can read the layer: one of `TAKEN`, or a subclass."""
    weight = getattr(layer, "weight", None)
    known = isinstance(layer, (nn.Linear, *_CONVOLUTIONS)) or _is_transposed(layer)
    return known and isinstance(weight, Tensor) and weight.is_floating_point()


def _is_transposed(layer: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer whose weight is stored as [in, out]. Told by name, so that
    transformers need not be imported.
    """
    return any((c.__module__, c.__name__) == ("transformers.pytorch_utils", "Conv1D") for c in type(layer).__mro__)


@dataclass(frozen=True)
class LayerShape:
    """Sizes and geometry of a linear layer or convolution.

    Args:
        weight: shape of the weight as the layer stores it.
        transposed: whether a linear layer stores [I O].
        groups: of a convolution, 1 for linear layers.
        stride, padding, dilation: of a convolution, () for linear layers.
        border: how many positions are added on each side before a convolution that pads by `padding_mode`.
    """

    weight: tuple[int, ...]
    transposed: bool = False
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    border: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: nn.Module) -> "LayerShape":
        """Raises: UserError for a layer that is none of `TAKEN`."""
        if not supported(layer):
            raise UserError(f"adapters take {TAKEN}, not {type(layer).__name__}")
        weight = tuple(weight_of(layer).shape)
        if not isinstance(layer, tuple(_CONVOLUTIONS)):
            return cls(weight, transposed=_is_transposed(layer))
        conv: Any = layer
        border = tuple(conv._reversed_padding_repeated_twice)
        return cls(weight, False, conv.groups, conv.stride, conv.padding, conv.dilation, conv.padding_mode, border)

    @property
    def linear(self) -> bool:
        return len(self.weight) == 2

    @property
    def out_features(self) -> int:
        """O."""
        return self.weight[1] if self.transposed else self.weight[0]

    @property
    def fan_in(self) -> int:
        """I."""
        return torch.Size(self.weight).numel() // self.out_features

    @property
    def modes(self) -> tuple[int, ...]:
        """Sizes of the weight's axes in one order for all layers: O, input channels of one group, kernel."""
        return self.weight[::-1] if self.transposed else self.weight

    @property
    def largest_rank(self) -> int:
        """The rank that a change of this weight can have."""
        return min(self.out_features, self.fan_in)

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight-shaped tensor as [O I]."""
        return weight.mT if self.transposed else weight.flatten(1)

    def shaped(self, matrix_OI: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        return matrix_OI.mT if self.transposed else matrix_OI.view(self.weight)

    def down(self, x: Tensor, down_RI: Tensor) -> Tensor:
        """R numbers a position: [... R] for linear layers, [B groups*R ...] for convolutions, group after group."""
        if self.linear:
            return F.linear(x, down_RI)
        return self.convolve(x, self.for_each_group(down_RI.view(-1, *self.weight[1:])))

    def scale(self, z: Tensor, scale_R: Tensor) -> Tensor:
        """Multiplies what `down` gave by one number a component."""
        if self.linear:
            return z * scale_R
        return z * self.for_each_group(scale_R).view(-1, *(1,) * len(self.stride))

    def up(self, z: Tensor, up_OR: Tensor) -> Tensor:
        """O numbers a position from what `down` gave."""
        if self.linear:
            return F.linear(z, up_OR)
        return self.pointwise(z, up_OR)

    def convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Convolves with another kernel of the same spatial size, with the layer's stride, padding and groups."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.border, mode=self.padding_mode), (0,) * len(self.stride)
        return self._convolution(x, kernel, None, self.stride, padding, self.dilation, self.groups)

    def pointwise(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Convolves with a kernel [out, in of one group] of spatial size 1, group by group."""
        return self._convolution(x, matrix.view(*matrix.shape, *(1,) * len(self.stride)), groups=self.groups)

    def for_each_group(self, tensor: Tensor) -> Tensor:
        """Repeats a tensor along its first axis, once a group."""
        return tensor if self.groups == 1 else tensor.repeat(self.groups, *(1,) * (tensor.ndim - 1))

    @property
    def _convolution(self) -> Callable[..., Tensor]:
        return (F.conv1d, F.conv2d, F.conv3d)[len(self.stride) - 1]


def weight_of(layer: nn.Module) -> Tensor:
    """A layer's weight, for the type checker: a module's attributes may be anything to it."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts, gathered where ranks hold some each; all of them have to call it then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
