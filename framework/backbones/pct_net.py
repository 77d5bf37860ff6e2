"""PCT-Net: a U-shaped network of volumes whose coarse levels convolve and attend side by side.

Source: Wang et al., "MIS-FM", 2023, arXiv 2306.16925, section 3.3, and its code. Two levels of convolutions embed a
volume at its own and half its resolution; three levels below, from a quarter on, have blocks that add two convolutions
to two Swin blocks (`lightspan.backbones.grid_swin`); the way up joins what each level held. Norms and activations come
before convolutions.
Differences from the code: relative positions have a table entry each, where two axes of the code's share some; windows
are cut to the sides of the grid one by one, where its code cuts all to the shortest.
Shapes: B volumes, C channels, D H W voxels.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightspan.backbones.grid_swin import SwinBlock
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in

# A recipe may name the class listed here.
__all__ = ["PCTNet"]

Sides = tuple[int, int, int]


class PCTNet(nn.Module):
    """[B C D H W] -> maps [B num_features D H W]; `scales` gives those of the four levels of the way up.

    Args:
        in_chans: C.
        widths: of the five levels.
        heads: of the three that attend; each divides its width.
        depth: Swin blocks of a level, shifted by turns.
        window: side in voxels of the level.
        dropout: inside the levels that attend, in [0, 1).
        drop_path: share of residual branches of the Swin blocks that training drops, in [0, 1).
        flat: how many of the two finest levels convolve within slices and keep their number, for slices that are
            farther apart than pixels: 0 to 2.
    """

    axes = 3

    def __init__(
        self,
        in_chans: int = 1,
        widths: Sequence[int] = (24, 48, 128, 256, 512),
        heads: Sequence[int] = (4, 8, 16),
        depth: int = 2,
        window: int = 6,
        dropout: float = 0.2,
        drop_path: float = 0.2,
        flat: int = 0,
    ) -> None:
        super().__init__()
        require_in("[0, 1)", dropout=dropout, drop_path=drop_path)
        require_in("[0, 2]", flat=flat)
        require_in("[1, inf)", in_chans=in_chans, widths=widths, heads=heads, depth=depth, window=window)
        if len(widths) != 5 or len(heads) != 3 or any(w % h for w, h in zip(widths[2:], heads, strict=True)):
            raise UserError(
                f"PCTNet: widths={[*widths]} must be five, and heads={[*heads]} three that divide the last three widths"
            )
        self.widths, self.num_features = [*widths[:4]], widths[0]
        kernels: list[Sides] = [(1, 3, 3)] * flat + [(3, 3, 3)] * (5 - flat)
        steps: list[Sides] = [(1, 2, 2)] * flat + [(2, 2, 2)] * (4 - flat)
        self.least = [2 ** sum(step[axis] == 2 for step in steps) for axis in range(3)]
        self.embed = _convolution(in_chans, widths[0], kernels[0])
        finer, coarser = [*pairwise(widths)], kernels[1:]
        self.shrink = nn.ModuleList(
            nn.Sequential(nn.MaxPool3d(step), *_preactivated(*pair, kernel))
            for pair, step, kernel in zip(finer, steps, coarser, strict=True)
        )
        self.enlarge = nn.ModuleList(
            nn.Sequential(nn.BatchNorm3d(high), nn.PReLU(), nn.ConvTranspose3d(high, low, step, step))
            for (low, high), step in zip(finer, steps, strict=True)
        )
        self.join = nn.ModuleList(
            _preactivated(2 * low, low, kernel) for low, kernel in zip(self.widths, kernels, strict=False)
        )

        def block(level: int) -> nn.Module:
            if level < 2:
                return _Convolutions(widths[level], kernels[level], 0.0)
            return _ConvTrans(widths[level], heads[level - 2], depth, window, dropout, drop_path)

        self.down, self.up = (nn.ModuleList(map(block, range(count))) for count in (5, 4))
        self.activate = nn.ModuleList(nn.Sequential(nn.BatchNorm3d(width), nn.PReLU()) for width in self.widths)

    def scales(self, x_BCDHW: Tensor) -> list[Tensor]:
        """Maps of the way up from the finest on, of the widths `widths`.

        Raises: UserError for sides that do not halve so often.
        """
        if x_BCDHW.ndim != 5 or any(side % least for side, least in zip(x_BCDHW.shape[2:], self.least, strict=True)):
            raise UserError(
                f"PCTNet needs volumes whose sides are multiples of {self.least}, and these are "
                f"{[*x_BCDHW.shape[2:]]}; change data.init_args.size"
            )
        held = [self.down[0](self.embed(x_BCDHW))]
        for shrink, down in zip(self.shrink, self.down[1:], strict=True):
            held.append(down(shrink(held[-1])))
        found = [held.pop()]
        for level in reversed(range(4)):
            joined = torch.cat([held.pop(), self.enlarge[level](found[-1])], dim=1)
            found.append(self.up[level](self.join[level](joined)))
        return [activate(each) for activate, each in zip(self.activate, reversed(found[1:]), strict=True)]

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Raises: UserError as `scales`."""
        return self.scales(x_BCDHW)[0]


class _Convolutions(nn.Sequential):
    """Two convolutions after their norms."""

    def __init__(self, width: int, kernel: Sides, dropout: float) -> None:
        first, second = _preactivated(width, width, kernel), _preactivated(width, width, kernel)
        norm, activation, convolution = second
        super().__init__(*first, norm, activation, nn.Dropout(dropout), convolution)


class _ConvTrans(nn.Module):
    """Two convolutions beside Swin blocks, whose results are added."""

    def __init__(self, width: int, heads: int, depth: int, window: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.conv, self.drop = _Convolutions(width, (3, 3, 3), dropout), nn.Dropout(dropout)
        sides = [window] * 3
        self.trans = nn.Sequential(
            *(SwinBlock(width, heads, sides, number % 2 == 1, drop_path, dropout) for number in range(depth))
        )

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        attended = self.trans(self.drop(x_BCDHW.movedim(1, -1))).movedim(-1, 1)
        return self.conv(x_BCDHW) + attended


def _convolution(taken: int, given: int, kernel: Sides) -> nn.Conv3d:
    depth, height, width = (side // 2 for side in kernel)
    return nn.Conv3d(taken, given, kernel, padding=(depth, height, width))


def _preactivated(taken: int, given: int, kernel: Sides) -> nn.Sequential:
    layers: list[Any] = [nn.BatchNorm3d(taken), nn.PReLU(), _convolution(taken, given, kernel)]
    return nn.Sequential(*layers)
