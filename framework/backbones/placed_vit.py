"""Vision transformers of samples with any number of axes: of series, pictures, volumes and clips, of groups of bands
beside rows and columns, of registered modalities, and of dates.

Shapes: B samples, C channels or bands, h w their sides (as many as there are axes), T dates, t of them in a patch, G
groups, M modalities, grid of N patches, D width, K kept patches, P prefix tokens, L = P + N or P + K.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.decoders.grouped_mask_decoder import axis_widths
from lightspan.nn.decoders.masked_sequence import positions
from lightspan.nn.decoders.modality_decoder import widths_of_places
from lightspan.nn.init import CONVOLUTIONS, xavier_uniform_
from lightspan.nn.sequences.patches import at_places, grid_of
from lightspan.nn.sequences.positions import LearnedPositions

# A recipe may name the classes listed here.
__all__ = ["GridViT", "GroupedViT", "ModalityViT", "SeriesViT"]


class PlacedViT(nn.Module, ABC):
    """A class token and patches with positions, through timm's blocks and a norm, as in MAE's encoder.

    It has the contract of `lightspan.nn.sequences.token_backbone` and takes samples of any size that patches fill.
    `forward` gives the mean over patches.

    Args:
        width, depth, heads: of the blocks, width a multiple of heads.
        widths: channels of fixed positions of each axis, which sum to width; None shares them evenly.
        mlp_ratio: hidden width of the blocks' MLPs over `width`, above 0.

    Attributes:
        patch_embed: samples to embedded patches without positions, [B grid... D]; made by the subclass.
        learned: positions that take the place of fixed ones, if there are any.
    """

    num_prefix_tokens = 1
    patch_embed: nn.Module

    def __init__(
        self, width: int, depth: int, heads: int, widths: Sequence[int] | None = None, mlp_ratio: float = 4.0
    ) -> None:
        super().__init__()
        require_in("(0, inf)", mlp_ratio=mlp_ratio)
        if min(width, depth, heads) < 1 or width % heads:
            raise UserError(
                f"{type(self).__name__}: width={width} must be a multiple of heads={heads}, and all and depth={depth} "
                "above 0"
            )
        self.num_features, self.axis_widths = width, None if widths is None else tuple(widths)
        self.cls_token = nn.Parameter(torch.randn(width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, mlp_ratio, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.learned: LearnedPositions | None = None

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The blocks: one layer of features each, see `lightspan.nn.tokens`."""
        return list(self.blocks)

    @abstractmethod
    def grid(self, image: Tensor) -> tuple[int, ...]:
        """Of these samples. Raises: UserError for sides or channels that the network does not take."""

    def tokens(self, image: Tensor, mask_BHW: Tensor | None = None, keep_BK: Tensor | None = None) -> Tensor:
        """Tokens after the norm, the class token first: [B 1+N D], or [B 1+K D] of the kept patches, in their order.

        Raises: UserError for a mask: hidden patches are left out.
        """
        return self.norm(self.blocks(self.placed(image, mask_BHW, keep_BK)))

    def placed(self, image: Tensor, mask_BHW: Tensor | None, keep_BK: Tensor | None) -> Tensor:
        """What the blocks get: the class token and patches with positions, [B L D]. Arguments as in `tokens`."""
        if mask_BHW is not None:
            raise UserError(f"{type(self).__name__} has no mask token; leave hidden patches out by keep_BK")
        grid = self.grid(image)
        tokens_BND = self.patch_embed(image).flatten(1, -2)
        if self.learned is None:
            tokens_BND = tokens_BND + positions(tokens_BND, grid, self.axis_widths)
        else:
            tokens_BND = tokens_BND + self.learned(grid).to(tokens_BND.dtype)
        if keep_BK is not None:
            tokens_BND = at_places(tokens_BND, keep_BK)
        first_B1D = self.cls_token.to(tokens_BND.dtype).expand(tokens_BND.shape[0], 1, -1)
        return torch.cat([first_B1D, tokens_BND], dim=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.tokens(image)[:, 1:].mean(dim=1)


class GridPatches(nn.Module):
    """Patches by a linear map, a convolution whose stride is its kernel: [B C sides...] -> [B grid... D]."""

    flatten, output_fmt = False, "NHWC"  # timm's names for a map with the features last, read by lightspan.nn.tokens

    def __init__(self, in_chans: int, width: int, patch: Sequence[int]) -> None:
        super().__init__()
        sides: Any = tuple(patch)  # as many as the convolution has axes
        self.proj = CONVOLUTIONS[len(sides) - 1](in_chans, width, sides, sides)

    def forward(self, x_BC: Tensor) -> Tensor:
        return self.proj(x_BC).movedim(1, -1)


class GroupPatches(nn.Module):
    """Patches of each group of channels by a linear map of its own: [B C sides...] -> [B G grid... D]."""

    flatten, output_fmt = False, "NHWC"

    def __init__(self, groups: Sequence[Sequence[int]], width: int, patch: Sequence[int]) -> None:
        super().__init__()
        self.groups = groups
        self.parts = nn.ModuleList(GridPatches(len(group), width, patch) for group in groups)

    def forward(self, x_BC: Tensor) -> Tensor:
        parts = zip(self.parts, self.groups, strict=True)
        return torch.stack([part(x_BC[:, list(group)]) for part, group in parts], dim=1)


class GridViT(PlacedViT):
    """Patches of samples with 1 to 3 axes after the channels: series [B C L], pictures [B C h w], volumes [B C D h w]
    or clips [B C T h w] -> [B D], with tokens of a grid of as many axes.

    On a grid of two axes it is MAE's encoder (He et al., 2021, arXiv 2111.06377).

    Args:
        patch: sides of a patch in pixels, one for each axis.
        in_chans: C.
        width, depth, heads: 768, 12 and 12 is ViT-B.
        axis_widths: channels of the fixed positions of each axis, in the order of `patch`, each a multiple of 2, which
            sum to width; None shares them evenly.
        learned_grid: patches along each axis for which positions are learned, and interpolated for other sizes; None
            takes fixed sines and cosines.
        mlp_ratio: hidden width of the blocks' MLPs over `width`.
    Raises: UserError for sizes that do not fit.
    """

    def __init__(
        self,
        patch: Sequence[int],
        in_chans: int = 1,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        axis_widths: Sequence[int] | None = None,
        learned_grid: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
    ) -> None:
        name = type(self).__name__
        if not 1 <= len(patch) <= len(CONVOLUTIONS) or min(*patch, in_chans) < 1:
            raise UserError(
                f"{name}: patch={[*patch]} must have a side for each of 1 to {len(CONVOLUTIONS)} axes, and these and "
                f"in_chans={in_chans} be at least 1"
            )
        if axis_widths is not None and (len(axis_widths) != len(patch) or sum(axis_widths) != width):
            raise UserError(
                f"{name}: axis_widths={[*axis_widths]} must be as many as the {len(patch)} axes of patch, and sum to "
                f"width={width}"
            )
        if learned_grid is not None and len(learned_grid) != len(patch):
            raise UserError(f"{name}: learned_grid={[*learned_grid]} must have the {len(patch)} axes of patch")
        super().__init__(width, depth, heads, axis_widths, mlp_ratio)
        self.in_chans, self.patch = in_chans, tuple(patch)
        self.patch_embed = GridPatches(in_chans, width, self.patch)
        xavier_uniform_(self)
        if learned_grid is not None:
            self.learned = LearnedPositions(learned_grid, width)
        else:
            positions(torch.zeros(1, 1, width), [1] * len(patch), axis_widths)  # which refuses widths that do not fit

    @property
    def patch_shape(self) -> tuple[int, ...]:
        return *self.patch, self.in_chans

    def grid(self, image: Tensor) -> tuple[int, ...]:
        if image.ndim != 2 + len(self.patch) or image.shape[1] != self.in_chans:
            raise UserError(
                f"a batch of {[*image.shape]} does not fit {type(self).__name__} for in_chans={self.in_chans} and "
                f"patches of {' x '.join(map(str, self.patch))}: it takes [B, {self.in_chans}] and {len(self.patch)} "
                "more axes; let the data give these, or make the network for them"
            )
        return grid_of(image.shape[2:], self.patch)


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
        self.patch_embed = GroupPatches(self.groups, width, (patch_size, patch_size))
        xavier_uniform_(self)

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        return self.patch_size, self.patch_size, self.in_chans

    def grid(self, image: Tensor) -> tuple[int, ...]:
        if image.ndim != 4 or image.shape[1] != self.in_chans:
            raise UserError(
                f"a batch of {[*image.shape]} does not fit a network for {self.in_chans} bands, which takes [B C h w]; "
                "let the data give these, or make the network for them: the backbone's groups, and the upsampler's "
                "channels, count bands"
            )
        return len(self.groups), *grid_of(image.shape[2:], (self.patch_size, self.patch_size))


class ModalityViT(GridViT):
    """Registered modalities, such as MR sequences, each with tokens of its own: [B M D h w] -> [B D], with tokens of a
    grid (M, D/p, h/p, w/p).

    Source: "BM-MAE", 2025, arXiv 2505.00568: a linear map for each modality, and the same fixed positions for
    all of them; nothing else tells modalities apart. The tokens of the modalities that a sample has come out as if
    there were no others.

    Args:
        patch: sides of a patch, one for each of 1 to 3 axes.
        in_chans: M.
        width, depth, heads, mlp_ratio: 768, 12, 12 and 2 is the source's. Width is a multiple of 2 for each axis.
    Raises: UserError for sizes that do not fit.
    """

    def __init__(
        self,
        patch: Sequence[int],
        in_chans: int = 4,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 2.0,
    ) -> None:
        super().__init__(patch, in_chans, width, depth, heads, mlp_ratio=mlp_ratio)
        self.axis_widths = widths_of_places(width, len(self.patch))
        self.patch_embed = GroupPatches([[modality] for modality in range(in_chans)], width, self.patch)
        xavier_uniform_(self.patch_embed)

    def grid(self, image: Tensor) -> tuple[int, ...]:
        return self.in_chans, *super().grid(image)

    def tokens(
        self,
        image: Tensor,
        mask_BHW: Tensor | None = None,
        keep_BK: Tensor | None = None,
        present_BM: Tensor | None = None,
    ) -> Tensor:
        """See `PlacedViT.tokens`.

        Args:
            present_BM: bool, the modalities that a sample has; no token sees those of others, which may hold anything
                and come out as anything. None: all.
        """
        if present_BM is not None:  # NaN times a weight of 0 is NaN
            image = image.where(present_BM.view(*present_BM.shape, *[1] * len(self.patch)), 0)
        tokens_BLD = self.placed(image, mask_BHW, keep_BK)
        if present_BM is None:
            return self.norm(self.blocks(tokens_BLD))
        seen_BL = F.pad(self.known(present_BM, self.grid(image), keep_BK), (1, 0), value=True)
        for block in self.blocks:
            tokens_BLD = block(tokens_BLD, attn_mask=seen_BL[:, None, None])
        return self.norm(tokens_BLD)

    def known(self, present_BM: Tensor, grid: Sequence[int], keep_BK: Tensor | None = None) -> Tensor:
        """Whether a token is of a modality that its sample has: bool [B N], or [B K] of the kept ones."""
        known_BN = present_BM.repeat_interleave(math.prod(grid[1:]), dim=1)
        return known_BN if keep_BK is None else known_BN.gather(1, keep_BK)

    def at_places(self, image: Tensor, present_BM: Tensor | None = None) -> Tensor:
        """For each place the mean of its tokens over the modalities that a sample has, as the source's segmentation
        reads them: [B N/M D], row by row; 0 where a sample has none.
        """
        tokens_BMND = self.tokens(image, present_BM=present_BM)[:, 1:].unflatten(1, (self.in_chans, -1))
        if present_BM is None:
            return tokens_BMND.mean(dim=1)
        total_BND = tokens_BMND.masked_fill(~present_BM[:, :, None, None], 0).sum(dim=1)
        return total_BND / present_BM.sum(dim=1).clamp_min(1)[:, None, None]

    def forward(self, image: Tensor, present_BM: Tensor | None = None) -> Tensor:
        """The mean over the tokens of the modalities that a sample has."""
        return self.at_places(image, present_BM).mean(dim=1)


class SeriesViT(GridViT):
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
        super().__init__((frames, patch_size, patch_size), in_chans, width, depth, heads, series_widths(width))

    def grid(self, image: Tensor) -> tuple[int, ...]:
        if image.ndim != 5:
            raise UserError(
                f"a batch of {[*image.shape]} does not fit SeriesViT, which takes [B C T h w], with an axis of dates; "
                "let the data give these (dates=1 for single pictures)"
            )
        return super().grid(image)


def series_widths(width: int) -> tuple[int, int, int]:
    """Channels of the positions of time, row and column. Raises: UserError for a width that is no multiple of 16."""
    if width < 16 or width % 16:
        raise UserError(f"width={width} must be a multiple of 16, of which time has 4 shares and each side 6")
    return width // 16 * 4, width // 16 * 6, width // 16 * 6
