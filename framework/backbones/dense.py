"""Backbones that say something of every pixel: [B C H W] -> maps [B F H W], with F as `num_features`.

Shapes: B images, C channels, H W image, F width of the maps. Of `UNet` H W stand for as many axes as samples have.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.timm_networks import timm_network
from lightspan.core.errors import UserError
from lightspan.nn.decoders.unetr_decoder import UNETRDecoder, require_maps
from lightspan.nn.init import CONVOLUTIONS

# A recipe may name the classes listed here.
__all__ = ["DecodedMaps", "EncodedMaps", "PooledMaps", "PyramidMaps", "UNet", "UNetEncoder"]

_POOLS = F.max_pool1d, F.max_pool2d, F.max_pool3d


class _Levels(nn.Module):
    """Two convolutions a level, each level half as large and twice as wide as the one before.

    Attributes:
        widths: of the maps, from the finest on.
    """

    def __init__(self, in_chans: int, width: int, levels: int, axes: int) -> None:
        super().__init__()
        name = type(self).__name__
        if min(in_chans, levels) < 1 or width < 4 or width % 4:
            raise UserError(
                f"{name} in_chans={in_chans} and levels={levels} must be at least 1, and width={width} a multiple of 4"
            )
        if not 1 <= axes <= len(CONVOLUTIONS):
            raise UserError(f"{name} axes={axes} must lie in [1, {len(CONVOLUTIONS)}]: 2 for images, 3 for volumes")
        self.axes, self.widths = axes, [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList(_convolutions(*pair, axes) for pair in pairwise([in_chans, *self.widths]))

    def maps(self, x_BCHW: Tensor) -> list[Tensor]:
        """Of each level, from the finest on.

        Raises: UserError for sides that do not halve so often, or samples of another number of axes.
        """
        least = 2 ** (len(self.down) - 1)
        if x_BCHW.ndim != 2 + self.axes or any(side % least for side in x_BCHW.shape[2:]):
            raise UserError(
                f"{type(self).__name__} of {len(self.down)} levels needs sides that are multiples of {least}, "
                f"{self.axes} of them, and those of these samples are {[*x_BCHW.shape[2:]]}; change data.init_args or "
                "levels"
            )
        found = [self.down[0](x_BCHW)]
        for level in self.down[1:]:
            found.append(level(_POOLS[self.axes - 1](found[-1], 2)))
        return found


class UNet(_Levels):
    """Convolutions at ever coarser levels and back up with what each level held (Ronneberger, Fischer, Brox, 2015,
    arXiv 1505.04597; of volumes Çiçek et al., 2016, arXiv 1606.06650). Norms are of groups, so that samples do not see
    one another and nothing runs along.

    Args:
        in_chans: channels of a sample.
        width: F, a multiple of 4.
        levels: at least 1; sides must be multiples of 2^(levels - 1).
        axes: of a sample, 2 of images, 3 of volumes.
    """

    def __init__(self, in_chans: int = 3, width: int = 16, levels: int = 3, axes: int = 2) -> None:
        super().__init__(in_chans, width, levels, axes)
        self.num_features = width
        self.up = nn.ModuleList(_convolutions(3 * each, each, axes) for each in reversed(self.widths[:-1]))

    def scales(self, x_BCHW: Tensor) -> list[Tensor]:
        """Maps on the way up, from the finest on, of the widths `widths`. Raises: UserError as `maps`."""
        *held, x = self.maps(x_BCHW)
        found = [x]
        for level in self.up:
            x = level(torch.cat([held.pop(), F.interpolate(x, scale_factor=2.0, mode="nearest")], dim=1))
            found.append(x)
        return found[::-1]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Raises: UserError as `maps`."""
        return self.scales(x_BCHW)[0]


class UNetEncoder(_Levels):
    """The way down of a `UNet`, its weights with the same names: [B C ...] -> [B num_features], the mean over the
    coarsest map. `lightspan.nn.tokens` reads its levels as layers.

    Args:
        in_chans, width, levels, axes: as in `UNet`.
    """

    def __init__(self, in_chans: int = 3, width: int = 16, levels: int = 3, axes: int = 2) -> None:
        super().__init__(in_chans, width, levels, axes)
        self.num_features = self.widths[-1]

    @property
    def feature_modules(self) -> list[nn.Module]:
        return list(self.down)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Raises: UserError as `maps`."""
        return self.maps(x_BCHW)[-1].flatten(2).mean(dim=2)


class PooledMaps(nn.Module):
    """Means over the maps of all levels, one after the other: [B C ...] -> [B num_features].

    Args:
        encoder: whose `maps` are those of its levels, from the finest on, and `widths` their widths, such as a
            `UNetEncoder` or a `lightspan.backbones.grid_swin.GridSwin`.
    Raises: UserError for an encoder without them.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        widths: Sequence[int] = getattr(encoder, "widths", ())
        if not callable(getattr(encoder, "maps", None)) or not widths:
            raise UserError(
                f"PooledMaps: {type(encoder).__name__} does not tell the maps of its levels as `maps` and their widths "
                "as `widths`; take a UNetEncoder or a GridSwin"
            )
        self.encoder: Any = encoder
        self.num_features = sum(widths)

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The encoder's: one layer of features each, see `lightspan.nn.tokens`."""
        return self.encoder.feature_modules

    def forward(self, x_BC: Tensor) -> Tensor:
        """Raises: UserError as the encoder's `maps`."""
        return torch.cat([each.flatten(2).mean(dim=2) for each in self.encoder.maps(x_BC)], dim=1)


class DecodedMaps(nn.Module):
    """An encoder and a decoder of all its maps, such as Swin UNETR (Tang et al., 2022, arXiv 2111.14791) without its
    convolutions of the sample itself: [B C sides...] -> maps [B num_features sides...].

    Args:
        encoder: whose `maps` are those of its levels, from the finest on, and `widths` their widths.
        decoder: of these; its `out_chans` are the features.
    Raises: UserError for parts that do not fit.
    """

    def __init__(self, encoder: nn.Module, decoder: UNETRDecoder) -> None:
        super().__init__()
        require_maps(encoder, decoder)
        self.encoder: Any = encoder
        self.decoder, self.num_features = decoder, decoder.out_chans

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The encoder's: one layer of features each, see `lightspan.nn.tokens`."""
        return self.encoder.feature_modules

    def forward(self, x_BC: Tensor) -> Tensor:
        """Raises: UserError as the encoder's `maps`."""
        return self.decoder(self.encoder.maps(x_BC), x_BC.shape[2:])


class EncodedMaps(nn.Module):
    """The maps of an encoder, each half as large as the one before or so, brought to one width, enlarged to the finest,
    joined, and enlarged to the image: the decoder of SegFormer (Xie et al., 2021, arXiv 2105.15203, section 3.2), with
    any encoder.

    Args:
        encoder: [B C H W] -> maps from the finest on, with their widths as `widths`, such as a `MixTransformer`.
        width: F.
        dropout: share of the F maps that training drops whole, in [0, 1); 0.1 in the authors' code.
    """

    def __init__(self, encoder: nn.Module, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise UserError(f"{type(self).__name__} dropout={dropout} must lie in [0, 1)")
        widths: Sequence[int] = getattr(encoder, "widths", ())
        if not widths or width < 1:
            raise UserError(
                f"maps of width={width} of {type(encoder).__name__}: the width must be at least 1, and the encoder has "
                "to tell the widths of its maps as `widths`, such as a MixTransformer"
            )
        self.encoder, self.num_features = encoder, width
        self.narrow = nn.ModuleList(nn.Conv2d(each, width, 1) for each in widths)
        self.join = nn.Sequential(
            *(nn.Conv2d(len(widths) * width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            nn.Dropout2d(dropout),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        maps = [layer(each) for layer, each in zip(self.narrow, self.encoder(x_BCHW), strict=True)]
        finest = maps[0].shape[2:]
        joined = self.join(torch.cat([F.interpolate(each, finest, mode="bilinear") for each in maps], dim=1))
        return F.interpolate(joined, x_BCHW.shape[2:], mode="bilinear")


class PyramidMaps(EncodedMaps):
    """`EncodedMaps` of a timm network.

    Args:
        name: as in `timm.list_models()`, of a network that gives features of several levels.
        width: F.
        pretrained: load published weights from timm's usual source; needs a network connection.
        levels: which of the network's levels, from the finest, 0.
        dropout: as in `EncodedMaps`.
    Raises: UserError for a name that timm does not have, or a network without these levels.
    """

    def __init__(
        self,
        name: str,
        width: int = 256,
        pretrained: bool = False,
        levels: Sequence[int] = (-4, -3, -2, -1),
        dropout: float = 0.1,
    ) -> None:
        try:
            encoder: Any = timm_network(name, pretrained, features_only=True, out_indices=tuple(levels))
        except (RuntimeError, AssertionError, IndexError) as error:
            raise UserError(f"timm gives no maps of levels {[*levels]} of {name!r}: {error}") from error
        encoder.widths = encoder.feature_info.channels()
        super().__init__(encoder, width, dropout)


def _convolutions(taken: int, given: int, axes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (taken, given):
        convolution = CONVOLUTIONS[axes - 1](width, given, 3, padding=1, bias=False)
        layers += [convolution, nn.GroupNorm(4, given), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
