"""What an adapter knows about the layer it changes: its sizes, and how a thin matrix is applied to the layer's input.

A layer's weight is read as one matrix [O I]: O output features, I the inputs that one of them sees, for a convolution
(input channels / groups) x kernel positions. R is the rank of a change. A change of rank R is applied as two cheap
steps, `down` to R numbers per position and `up` to O, and never needs the matrix [O I] itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lightspan.core.devices import wide_type
from lightspan.core.errors import UserError

_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TAKEN = (
    "nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d and transformers' Conv1D with floating-point weights, and quantised "
    "layers derived from nn.Linear"
)


def known_kind(layer: nn.Module) -> type[nn.Module] | None:
    """The class in `TAKEN` that a layer has or derives from; None for others."""
    for kind in type(layer).__mro__:
        # transformers' Conv1D (GPT-2), a linear layer whose weight is stored as [in, out], is recognised by name, so
        # that transformers need not be imported.
        transposed = (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
        if transposed or kind is nn.Linear or kind in _CONVOLUTIONS:
            return kind
    return None


def is_open(layer: nn.Module) -> bool:
    """Whether the layer's weight may be read and written as numbers, and its output depends on nothing else but the
    bias: a plain floating-point parameter under the forward pass of a known class.

    That excludes quantised layers, whose weight is packed or only looks like floats, layers with a forward pass of
    their own, and weights that are recomputed each time (weight norm), which cannot be written to.
    """
    kind: Any = known_kind(layer)
    if kind is None or _runs_its_own(layer, kind):
        return False
    weight = layer._parameters.get("weight")
    return weight is not None and (type(weight) is nn.Parameter or isinstance(weight, DTensor)) and _floats(weight)


def obstacle(layer: nn.Module) -> str | None:
    """Why the layer can have no adapter, as the end of a sentence; None if it can.

    A linear layer that is not open can still have one: y = f(x) + change(x) needs only the sizes of f.
    """
    kind = known_kind(layer)
    if kind is None:
        return f"adapters take {TAKEN}, not {type(layer).__name__}"
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(weight, nn.UninitializedParameter):
        return "it has no weight yet; run the model once first"
    if is_open(layer):
        return None
    plain = type(weight) is nn.Parameter and not _floats(weight) and not _runs_its_own(layer, kind)
    if plain:
        return f"its weight is {weight.dtype}; adapters take {TAKEN}"
    if kind is not nn.Linear:
        return (
            f"{type(layer).__name__} has its own forward pass or a weight that is not a plain parameter, which "
            f"adapters accept only for linear layers; use {kind.__name__}, or leave it out"
        )
    return None


def _runs_its_own(layer: nn.Module, kind: Any) -> bool:
    return any(getattr(type(layer), f, None) is not getattr(kind, f, None) for f in ("forward", "_conv_forward"))


def _floats(tensor: Tensor) -> bool:
    return tensor.dtype in _FLOATS


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
        """Raises: UserError for a layer that is not of a kind in `TAKEN`."""
        if reason := obstacle(layer):
            raise UserError(f"no adapter for this layer: {reason}")
        conv: Any = layer
        if not is_open(layer):  # the weight may be packed, so its shape means nothing
            return cls((conv.out_features, conv.in_features))
        weight = tuple(weight_of(layer).shape)
        if (kind := known_kind(layer)) not in _CONVOLUTIONS:
            return cls(weight, transposed=kind is not nn.Linear)
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
        """R numbers per position: [... R] for linear layers, [B groups*R ...] for convolutions, group after group."""
        if self.linear:
            return F.linear(x, down_RI)
        return self.convolve(x, self.for_each_group(down_RI.view(-1, *self.weight[1:])))

    def scale(self, z: Tensor, scale_R: Tensor) -> Tensor:
        """Multiplies the output of `down` by one number per component."""
        if self.linear:
            return z * scale_R
        return z * self.for_each_group(scale_R).view(-1, *(1,) * len(self.stride))

    def up(self, z: Tensor, up_OR: Tensor) -> Tensor:
        """O numbers per position from the output of `down`."""
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
        """Repeats a tensor along its first axis, once per group."""
        return tensor if self.groups == 1 else tensor.repeat(self.groups, *(1,) * (tensor.ndim - 1))

    @property
    def _convolution(self) -> Callable[..., Tensor]:
        return (F.conv1d, F.conv2d, F.conv3d)[len(self.stride) - 1]


def weight_of(layer: nn.Module) -> Tensor:
    """A layer's weight, for the type checker: to which a module's attributes may be anything."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def readable_weight(layer: nn.Module) -> Tensor:
    """The weight, for an adapter that is computed from it. Raises: UserError for a layer that is not open."""
    if not is_open(layer):
        raise UserError(
            f"this adapter uses the weight, but that of {type(layer).__name__} is quantised or computed, so it "
            "cannot be read; choose LoRA, PaCA, GatedLoRA, FLoRA or Full"
        )
    return weight_of(layer)


def like(layer: nn.Module) -> dict[str, Any]:
    """Device and dtype of a layer's adapter: as of the layer, but float32 for half-precision and quantised layers."""
    weight = weight_of(layer)
    dtype = wide_type(weight.dtype) if _floats(weight) else torch.float32
    return {"dtype": dtype, "device": weight.device}


def fitting_rank(rank: int, layer: nn.Module, name: str, cap: bool) -> int:
    """The rank itself, or with `cap` the largest that a change of the layer's weight can have.

    Raises: UserError for a larger one without `cap`.
    """
    shape = LayerShape.of(layer)
    if rank > shape.largest_rank and not cap:
        sizes = " x ".join(map(str, shape.weight))
        raise UserError(
            f"rank={rank} is above {shape.largest_rank}, the largest for {name} of shape {sizes}; lower it, or set "
            "cap=True to use the largest possible rank in such layers"
        )
    return min(rank, shape.largest_rank)
