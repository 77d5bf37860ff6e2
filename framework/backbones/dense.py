"""Backbones that say something of every pixel: [B C H W] -> maps [B F H W], with F as `num_features`.

Shapes: B images, C channels, H W image, F width of the maps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.timm_networks import timm_network
from lightspan.core.errors import UserError

# A recipe may name the classes listed here.
__all__ = ["EncodedMaps", "PyramidMaps", "UNet"]


class UNet(nn.Module):
    """Two convolutions a level, each level half as large and twice as wide as the one before, and back up with what the
    level held (Ronneberger, Fischer, Brox, 2015, arXiv 1505.04597). Norms are of groups, so that images do not see one
    another and nothing runs along.

    Args:
        in_chans: image channels.
        width: F, a multiple of 4.
        levels: at least 1; sides must be multiples of 2^(levels - 1).
    """

    def __init__(self, in_chans: int = 3, width: int = 16, levels: int = 3) -> None:
        super().__init__()
        if min(in_chans, levels) < 1 or width < 4 or width % 4:
            raise UserError(
                f"UNet in_chans={in_chans} and levels={levels} must be at least 1, and width={width} a multiple of 4"
            )
        self.num_features = width
        widths = [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList(map(_convolutions, [in_chans, *widths], widths))
        self.up = nn.ModuleList(_convolutions(3 * each, each) for each in reversed(widths[:-1]))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Raises: UserError for sides that do not halve so often, or samples that are not images."""
        least = 2 ** (len(self.down) - 1)
        if x_BCHW.ndim != 4 or any(side % least for side in x_BCHW.shape[2:]):
            raise UserError(
                f"UNet of {len(self.down)} levels needs sides that are multiples of {least}, two of them, and those of "
                f"these samples are {[*x_BCHW.shape[2:]]}; change data.init_args or levels"
            )
        held: list[Tensor] = []
        x = self.down[0](x_BCHW)
        for level in self.down[1:]:
            held.append(x)
            x = level(F.max_pool2d(x, 2))
        for level in self.up:
            x = level(torch.cat([held.pop(), F.interpolate(x, scale_factor=2.0, mode="nearest")], dim=1))
        return x


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


def _convolutions(taken: int, given: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (taken, given):
        layers += [nn.Conv2d(width, given, 3, padding=1, bias=False), nn.GroupNorm(4, given), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
