"""A decoder of all maps of an encoder, up to the size of the sample: that of UNETR.

Source: Hatamizadeh et al., "UNETR", WACV 2022, arXiv 2103.10504, as NeRF-MAE (arXiv 2404.01300) puts it behind a Swin
transformer: a map is enlarged by a transposed convolution, joined with the finer one, and passes two convolutions
beside a shortcut; from the finest map on one more such step, without a map to join, enlarges by the sides of a patch.
Norms are of each map by itself and have no weights.
Shapes: B samples, F width of a map, sides and grid of as many axes as samples have.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.nn.init import CONVOLUTIONS

SLOPE = 0.01
_ENLARGING = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d


def _standardised(x_BF: Tensor) -> Tensor:
    """Each map of each sample by itself; one that is constant, or of a single place, is 0."""
    return F.layer_norm(x_BF, x_BF.shape[2:])


class ResidualConvolutions(nn.Module):
    """Two convolutions beside a shortcut, which is a map of each place by itself where the width changes: [B taken
    grid...] -> [B given grid...].
    """

    def __init__(self, taken: int, given: int, axes: int) -> None:
        super().__init__()
        convolution: Any = CONVOLUTIONS[axes - 1]
        self.first = convolution(taken, given, 3, padding=1, bias=False)
        self.second = convolution(given, given, 3, padding=1, bias=False)
        self.shortcut = convolution(taken, given, 1, bias=False) if taken != given else None

    def forward(self, x_BF: Tensor) -> Tensor:
        y_BF = F.leaky_relu(_standardised(self.first(x_BF)), SLOPE)
        if self.shortcut is not None:
            x_BF = _standardised(self.shortcut(x_BF))
        return F.leaky_relu(_standardised(self.second(y_BF)) + x_BF, SLOPE)


class UNETRDecoder(nn.Module):
    """Maps from the finest on, each with half the sides of the one before -> [B out_chans sides...].

    Args:
        widths: of the maps, from the finest on, such as the `widths` of a `lightspan.backbones.grid_swin.GridSwin`. The
            first is at least 2.
        out_chans: of what is decoded.
        patch: sides of a patch, from the finest map to the sample, one for each of 1 to 3 axes.
    Raises: UserError for sizes that do not fit.
    """

    def __init__(self, widths: Sequence[int], out_chans: int = 4, patch: Sequence[int] = (4, 4, 4)) -> None:
        super().__init__()
        axes = len(patch)
        if not widths or min(*widths, out_chans) < 1 or widths[0] < 2:
            raise UserError(
                f"UNETRDecoder: widths={[*widths]} must be those of one or more maps, the first at least 2, and these "
                f"and out_chans={out_chans} at least 1"
            )
        if not 1 <= axes <= len(CONVOLUTIONS) or min(patch) < 1:
            raise UserError(
                f"UNETRDecoder: patch={[*patch]} must have a side of at least 1 for each of 1 to {len(CONVOLUTIONS)} "
                "axes"
            )
        self.widths, self.out_chans, self.patch = [*widths], out_chans, tuple(patch)
        enlarging: Any = _ENLARGING[axes - 1]
        coarser = [*pairwise(self.widths[::-1])]
        self.enlarge = nn.ModuleList(enlarging(high, low, 2, 2, bias=False) for high, low in coarser)
        self.join = nn.ModuleList(ResidualConvolutions(2 * low, low, axes) for _, low in coarser)
        half = self.widths[0] // 2
        self.last = nn.Sequential(
            enlarging(self.widths[0], half, self.patch, self.patch, bias=False), ResidualConvolutions(half, half, axes)
        )
        self.head = CONVOLUTIONS[axes - 1](half, out_chans, 1)

    def forward(self, maps: Sequence[Tensor], sides: Sequence[int]) -> Tensor:
        """What is decoded, [B out_chans sides...]. Where a side of a map is not twice that of the coarser one, what was
        enlarged is cut to it.

        Args:
            sides: of the sample, at most those of the finest map times those of a patch.
        """
        *held, x_BF = maps
        for enlarge, join in zip(self.enlarge, self.join, strict=True):
            finer_BF = held.pop()
            x_BF = join(torch.cat([_cut(enlarge(x_BF), finer_BF.shape[2:]), finer_BF], dim=1))
        return self.head(_cut(self.last(x_BF), sides))


def require_maps(encoder: nn.Module, decoder: UNETRDecoder) -> None:
    """Raises: UserError for an encoder without `maps` of these widths, or with patches of other sides."""
    widths, patch = getattr(encoder, "widths", None), getattr(encoder, "patch", decoder.patch)
    if not callable(getattr(encoder, "maps", None)) or widths is None:
        raise UserError(
            f"{type(encoder).__name__} does not tell the maps of its levels as `maps` and their widths as `widths`; "
            "take a GridSwin"
        )
    for name, taken, given in (("widths", decoder.widths, [*widths]), ("patch", [*decoder.patch], [*patch])):
        if taken != given:
            raise UserError(f"decoder.{name}={taken}, but {type(encoder).__name__} has {name} {given}; set it to these")


def _cut(x_BF: Tensor, sides: Sequence[int]) -> Tensor:
    return x_BF[(slice(None), slice(None), *(slice(side) for side in sides))]
