"""Convolutional networks that see some cells of their images alone: dense networks made sparse for one pass.

Source: Tian et al., "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling" (SparK), ICLR
2023, arXiv 2301.03580, section 3.1 and the authors' code. Whatever a convolution or a pooling gives is multiplied by
the mask at its own resolution, so that hidden cells stay zero and what is seen does not creep into them layer by layer;
the statistics of a BatchNorm are those of active positions, so that zeros do not shift them. Nothing of an active
position depends on a hidden pixel, and without a hidden cell the network is the dense one. What a network does between
its layers must leave zeros where they are, as sums and products do.
Difference: the authors replace layers and keep the mask in a global variable. Here hooks hold it while a pass runs: the
network stays what it is, any two passes are independent, and a SyncBatchNorm sums over ranks as it always does.
Shapes: B images, C channels, h w sides of a map, H W grid of cells, K active cells, N active positions of a map.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import GELU, DropPath, GELUTanh, LayerNorm2d, Swish
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightspan.core.blocks import recomputes
from lightspan.core.errors import UserError
from lightspan.nn.sequences.patches import cells_to_pixels, patchify

MAPS = nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d | LayerNorm2d
"""Layers whose outputs are maps [B C h w]; a LayerNorm2d normalises each position by itself."""
LAST = nn.Linear | nn.LayerNorm
"""Layers whose outputs are maps with the features last, [B h w C], as in ConvNeXt's blocks."""
POINTWISE = (
    nn.Identity | nn.ReLU | nn.ReLU6 | nn.LeakyReLU | nn.PReLU | nn.ELU | nn.GELU | nn.SiLU | nn.Mish | nn.Hardswish
    | nn.Tanh | nn.Dropout | nn.Dropout2d | DropPath | GELU | GELUTanh | Swish
)  # fmt: skip
"""Layers that leave zeros where they are."""


@dataclass(frozen=True)
class ActiveCells:
    """Which cells of images are active: a grid, and places counted row by row, int64 [B K], as many of each image."""

    grid: tuple[int, ...]
    see_BK: Tensor

    def mask(self, sides: tuple[int, ...]) -> Tensor:
        """Which positions of maps of these sides lie in active cells: bool [B 1 h w]."""
        hidden_BT = self.see_BK.new_zeros(len(self.see_BK), math.prod(self.grid), dtype=torch.bool)
        active_B1HW = hidden_BT.scatter(1, self.see_BK, True).unflatten(1, (1, *self.grid))
        return cells_to_pixels(active_B1HW, self._cell(sides))

    def places(self, sides: tuple[int, ...]) -> Tensor:
        """Where these are, counted over the map row by row: int64 [B N], cell by cell."""
        every = torch.arange(math.prod(sides), device=self.see_BK.device).view(1, 1, *sides)
        return patchify(every, self._cell(sides))[0, self.see_BK].flatten(1)

    def alone(self, x_BChw: Tensor) -> Tensor:
        """A map with zeros outside of active cells, whatever stood there, also NaN."""
        return x_BChw.where(self.mask(sides_of(x_BChw)), 0)

    def normed(self, norm: nn.Module, x_BChw: Tensor) -> Tensor:
        """A norm of active positions alone, and zeros elsewhere."""
        return self.scattered(norm(self.gathered(x_BChw)), sides_of(x_BChw))

    def gathered(self, x_BChw: Tensor) -> Tensor:
        """Active positions as a map of one column, [B C N 1]."""
        place_BN = self.places(sides_of(x_BChw))
        return x_BChw.flatten(2).gather(2, place_BN[:, None].expand(-1, x_BChw.shape[1], -1))[..., None]

    def scattered(self, x_BCN1: Tensor, sides: tuple[int, ...]) -> Tensor:
        """The inverse of `gathered`, with zeros elsewhere."""
        place_BCN = self.places(sides)[:, None].expand(-1, x_BCN1.shape[1], -1)
        empty_BCT = x_BCN1.new_zeros(*x_BCN1.shape[:2], math.prod(sides))
        return empty_BCT.scatter(2, place_BCN, x_BCN1[..., 0]).unflatten(2, sides)

    def _cell(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        """The sides of a cell on maps of these sides."""
        cell = tuple(side // count for side, count in zip(sides, self.grid, strict=True))
        if any(c * count != side or not c for c, count, side in zip(cell, self.grid, sides, strict=True)):
            raise UserError(
                f"a map of {' x '.join(map(str, sides))} positions cannot be divided among "
                f"{' x '.join(map(str, self.grid))} cells; layers that pool whole images, as in "
                "squeeze-and-excitation, cannot be made sparse"
            )
        return cell


def sides_of(x_BChw: Tensor) -> tuple[int, ...]:
    return tuple(x_BChw.shape[2:])


def require_sparse(network: nn.Module, run: Callable[[], object]) -> list[nn.Module]:
    """The modules of a network that a pass does not call.

    Args:
        run: makes such a pass.
    Raises: UserError for a layer in it that mixes positions in another way than those known here, or lifts zeros.
    """
    called: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(lambda module, args: called.add(module)) for m in network.modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for name, module in network.named_modules():
        is_layer = module in called and not any(True for _ in module.children())
        if is_layer and not isinstance(module, MAPS | LAST | POINTWISE | _BatchNorm):
            raise UserError(
                f"{type(network).__name__} has the layer {name} ({type(module).__name__}), which cannot be made "
                "sparse: known are convolutions, max- and average-pooling, BatchNorm, LayerNorm, linear layers of maps "
                "with the features last, and activations that leave zeros; use a ResNet or a ConvNeXt"
            )
    return [module for module in network.modules() if module not in called]


@contextmanager
def sparse(network: nn.Module, active: ActiveCells) -> Iterator[None]:
    """Inside, the network's layers see and give active cells alone; its images are to be `active.alone`. A network has
    one such pass at a time.

    Raises: UserError for a network that computes parts of a pass a second time, when the mask is gone; and inside for
        maps that cells do not divide, and for a BatchNorm in training with a single active position.
    """
    if recomputes(network):
        raise UserError(
            f"{type(network).__name__} computes activations again in the backward pass, where the mask is not known; "
            "leave activation checkpointing out"
        )
    handles = []
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            norm = _ActiveNorm(active, name)
            handles += [module.register_forward_pre_hook(norm.before), module.register_forward_hook(norm.after)]
        elif isinstance(module, MAPS):
            handles.append(module.register_forward_hook(lambda module, args, x_BChw: active.alone(x_BChw)))
        elif isinstance(module, LAST):
            handles.append(module.register_forward_hook(lambda module, args, x: _features_last(active, x)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _features_last(active: ActiveCells, x_BhwC: Tensor) -> Tensor:
    return active.alone(x_BhwC.movedim(-1, 1)).movedim(1, -1) if x_BhwC.ndim == 4 else x_BhwC


class _ActiveNorm:
    """Hooks of one BatchNorm in one pass."""

    def __init__(self, active: ActiveCells, name: str) -> None:
        self.active, self.name, self.sides = active, name, tuple[int, ...]()

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        (x_BChw,), self.sides = args, sides_of(args[0])
        x_BCN1 = self.active.gathered(x_BChw)
        if module.training and x_BCN1.shape[0] * x_BCN1.shape[2] == 1 and not isinstance(module, nn.SyncBatchNorm):
            raise UserError(
                f"the BatchNorm {self.name} sees a single active position, which has no variance; raise "
                "data.init_args.batch_size, or hide fewer cells"
            )
        return (x_BCN1,)

    def after(self, module: nn.Module, args: Any, x_BCN1: Tensor) -> Tensor:
        return self.active.scattered(x_BCN1, self.sides)
