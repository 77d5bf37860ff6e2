"""Patches through small convolutions, for transformers that learn from few pictures or in few steps, such as of words.

Source: Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021, arXiv 2106.14881, section 4: 3 x 3
convolutions of stride 2 in place of the one that cuts a picture into patches. Differences: two of them, GELU, no
normalisation, and in place of further ones a convolution as large as a patch and its margin.
Shapes: B images, C h w image, T patches, D width, H W grid.
"""

from itertools import pairwise
from typing import Any

from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lightspan.backbones.vit import TokenViT
from lightspan.core.errors import UserError
from lightspan.nn.sequences.patches import grid_of

# A recipe may name the function listed here.
__all__ = ["column_vit"]

CHANNELS = 16, 32
STRIDE = 4  # of both convolutions


class ConvPatches(PatchEmbed):
    """[B C h w] -> [B T D]; each patch also sees margins of its neighbours. timm's VisionTransformer takes the class as
    `embed_layer`.

    Args:
        img_size, patch_size, in_chans, embed_dim, options: those of timm's PatchEmbed.
    Raises: UserError for patches whose sides are no multiples of 4 pixels.
    """

    def __init__(
        self, img_size: Any = 224, patch_size: Any = 16, in_chans: int = 3, embed_dim: int = 768, **options: Any
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim, **options)
        if any(side % STRIDE for side in self.patch_size):
            raise UserError(
                f"ConvPatches patch_size={' x '.join(map(str, self.patch_size))}: sides must be multiples of {STRIDE} "
                "pixels, the stride of its first convolutions"
            )
        cut: Any = self.get_submodule("proj")
        made = _Convolutions(in_chans, embed_dim, self.patch_size, cut.bias is not None)
        self.proj = made.to(cut.weight.device, cut.weight.dtype)


class _Convolutions(nn.Sequential):
    """[B C h w] -> [B D H W] of patches."""

    def __init__(self, in_channels: int, width: int, patch: tuple[int, int], bias: bool) -> None:
        cells = tuple(side // STRIDE for side in patch)
        layers: list[nn.Module] = []
        for before, after in pairwise((in_channels, *CHANNELS)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GELU()]
        kernel = tuple(side + 2 for side in cells)
        layers.append(nn.Conv2d(CHANNELS[-1], width, kernel, stride=cells, padding=1, bias=bias))  # type: ignore[arg-type]
        super().__init__(*layers)
        self.in_channels = in_channels  # as a convolution tells them


def column_vit(
    img_size: tuple[int, int] = (20, 64),
    column: int = 4,
    in_chans: int = 3,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
) -> TokenViT:
    """A transformer of a picture's columns from left to right, which are `ConvPatches`, with fixed positions. Its
    features are the mean over columns. Not for methods that hide patches, of which neighbours see a margin.

    Args:
        img_size: height and width in pixels, multiples of 4 and of `column`.
        column: width of a column in pixels, a multiple of 4.
        width, depth, heads: of the transformer; width a multiple of 4 and of heads.
    Raises: UserError for sizes that do not fit each other.
    """
    if min(in_chans, width, depth, heads) < 1 or width % heads or width % 4:
        raise UserError(
            f"column_vit: width={width} must be a multiple of 4 and of heads={heads}, and all and depth={depth} and "
            f"in_chans={in_chans} above 0"
        )
    patch = (img_size[0], column)
    grid_of(img_size, patch)
    network = VisionTransformer(
        img_size, patch, in_chans, num_classes=0, global_pool="avg", embed_dim=width, depth=depth, num_heads=heads,
        class_token=False, fc_norm=False, embed_layer=ConvPatches,
    )  # fmt: skip
    return TokenViT(network, sincos=True)
