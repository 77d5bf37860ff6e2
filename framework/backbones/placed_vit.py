"""Vision transformers whose patches lie on three axes: groups of bands, or dates, beside rows and columns.

Shapes: B pictures, C bands, h w their sides, T dates, t of them in a patch, G groups, grid of N patches, D width, K
kept patches, P prefix tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.decoders.grouped_mask_decoder import axis_widths
from lightspan.nn.init import xavier_uniform_
from lightspan.nn.sequences.patches import at_places, grid_of
from lightspan.nn.sequences.positions import sincos_by_axis


class PlacedViT(nn.Module, ABC):
    """A class token and patches with fixed positions, through timm's blocks and a norm, as in MAE's encoder.

    It has the contract of `lightspan.nn.sequences.token_backbone`, with a grid of three axes; it takes pictures of any
    size that patches fill, as positions are fixed. `forward` gives the mean over patches.

    Args:
        width, depth, heads: of the blocks, width a multiple of heads.
        widths: channels of the positions of each axis.
    """

    num_prefix_tokens = 1

    def __init__(self, width: int, depth: int, heads: int, widths: Sequence[int]) -> None:
        super().__init__()
        if min(width, depth, heads) < 1 or width % heads:
            raise UserError(
                f"{type(self).__name__}: width={width} must be a multiple of heads={heads}, and all and depth={depth} "
                "above 0"
            )
        self.num_features, self.axis_widths = width, tuple(widths)
        self.cls_token = nn.Parameter(torch.randn(width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The blocks: one layer of features each, see `lightspan.nn.tokens`."""
        return list(self.blocks)

    @abstractmethod
    def grid(self, image: Tensor) -> tuple[int, int, int]:
        """Of these pictures. Raises: UserError for sides or bands that the network does not take."""

    @abstractmethod
    def patches(self, image: Tensor) -> Tensor:
        """Embedded patches without positions, [B N D], row by row."""

    def tokens(self, image: Tensor, mask_BHW: Tensor | None = None, keep_BK: Tensor | None = None) -> Tensor:
        """Tokens after the norm, the class token first: [B 1+N D], or [B 1+K D] of the kept patches, in their order.

        Raises: UserError for a mask: hidden patches are left out.
        """
        if mask_BHW is not None:
            raise UserError(f"{type(self).__name__} has no mask token; leave hidden patches out by keep_BK")
        table_ND = sincos_by_axis(self.grid(image), self.axis_widths, device=image.device)
        tokens_BND = self.patches(image)
        tokens_BND = tokens_BND + table_ND.to(tokens_BND.dtype)
        if keep_BK is not None:
            tokens_BND = at_places(tokens_BND, keep_BK)
        first_B1D = self.cls_token.to(tokens_BND.dtype).expand(len(tokens_BND), 1, -1)
        return self.norm(self.blocks(torch.cat([first_B1D, tokens_BND], dim=1)))

    def forward(self, image: Tensor) -> Tensor:
        return self.tokens(image)[:, 1:].mean(dim=1)


class GroupedViT(PlacedViT):
    """Each group of bands has tokens of its own: pictures [B C h w] -> [B D], with tokens of a grid (G, h/p, w/p).

    Source: Cong et al., "SatMAE", 2022, arXiv 2207.08051; positions are sines and cosines of column, row and group.

    Args:
        groups: bands of each group by their place in the pictures; each of the C bands is in one of them.
        width, depth, heads: 768, 12 and 12 is ViT-B.
        patch_size: p.
        group_width: channels of the positions that tell the group, see
            `lightspan.nn.decoders.grouped_mask_decoder.GroupedMaskDecoder`.
    Raises: UserError for groups that are no division of the bands, and for sizes that do not fit.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        patch_size: int = 8,
        group_width: int = 256,
    ) -> None:
        super().__init__(width, depth, heads, axis_widths(width, group_width))
        self.groups, self.patch_size = tuple(tuple(group) for group in groups), patch_size
        bands = [band for group in self.groups for band in group]
        if not bands or sorted(bands) != list(range(len(bands))) or not all(self.groups):
            raise UserError(
                f"groups={[*map(list, self.groups)]} must have each of the bands 0 to {max(len(bands) - 1, 0)} once, "
                "and no group be empty"
            )
        if len(self.groups) > 1 and not group_width:
            raise UserError(f"group_width=0 tells {len(self.groups)} groups not apart; give it a multiple of 2")
        if patch_size < 1:
            raise UserError(f"patch_size={patch_size} must be at least 1")
        self.in_chans = len(bands)
        self.embed = nn.ModuleList(nn.Conv2d(len(group), width, patch_size, patch_size) for group in self.groups)
        xavier_uniform_(self)

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        return self.patch_size, self.patch_size, self.in_chans

    def grid(self, image: Tensor) -> tuple[int, int, int]:
        _require_bands(image, self.in_chans, 4)
        height, width = grid_of(image.shape[2:], (self.patch_size, self.patch_size))
        return len(self.groups), height, width

    def patches(self, image: Tensor) -> Tensor:
        parts = zip(self.embed, self.groups, strict=True)
        return torch.cat([embed(image[:, list(group)]).flatten(2).mT for embed, group in parts], dim=1)


class SeriesViT(PlacedViT):
    """Patches of time, height and width: series [B C T h w] -> [B D], with tokens of a grid (T/t, h/p, w/p).

    Source: Jakubik et al., "Prithvi", 2023, arXiv 2310.18660, and its code: of the positions' channels 6/16 tell the
    column, 6/16 the row and 4/16 the time. Any number of dates fits, as positions are computed from it.

    Args:
        in_chans: C.
        width, depth, heads: 768, 12 and 12 is that of Prithvi-100M; width is a multiple of 16.
        patch_size: p.
        frames: t.
    Raises: UserError for sizes that do not fit.
    """

    def __init__(
        self,
        in_chans: int = 6,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        patch_size: int = 16,
        frames: int = 1,
    ) -> None:
        super().__init__(width, depth, heads, series_widths(width))
        if min(in_chans, patch_size, frames) < 1:
            raise UserError(
                f"SeriesViT: in_chans={in_chans}, patch_size={patch_size} and frames={frames} must be at least 1"
            )
        self.in_chans, self.patch = in_chans, (frames, patch_size, patch_size)
        self.embed = nn.Conv3d(in_chans, width, self.patch, self.patch)
        xavier_uniform_(self)

    @property
    def patch_shape(self) -> tuple[int, int, int, int]:
        return *self.patch, self.in_chans

    def grid(self, image: Tensor) -> tuple[int, int, int]:
        _require_bands(image, self.in_chans, 5)
        time, height, width = grid_of(image.shape[2:], self.patch)
        return time, height, width

    def patches(self, image: Tensor) -> Tensor:
        return self.embed(image).flatten(2).mT


def series_widths(width: int) -> tuple[int, int, int]:
    """Channels of the positions of time, row and column. Raises: UserError for a width that is no multiple of 16."""
    if width < 16 or width % 16:
        raise UserError(f"width={width} must be a multiple of 16, of which time has 4 shares and each side 6")
    return width // 16 * 4, width // 16 * 6, width // 16 * 6


def _require_bands(image: Tensor, bands: int, axes: int) -> None:
    if image.ndim != axes or image.shape[1] != bands:
        kind, setting = (
            ("[B C h w]", "backbone's groups, and the upsampler's channels,")
            if axes == 4
            else ("[B C T h w], with an axis of dates (dates=1 of the data for single pictures)", "backbone's in_chans")
        )
        raise UserError(
            f"a batch of {[*image.shape]} does not fit a network for {bands} bands, which takes {kind}; let the data "
            f"give these, or make the network for them: the {setting} count bands"
        )
