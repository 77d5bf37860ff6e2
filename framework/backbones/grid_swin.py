"""Swin transformers of samples with 1 to 3 axes: of images, volumes and clips, of any size.

Source: Liu et al., "Swin Transformer", ICCV 2021, arXiv 2103.14030: attention inside windows, which every second block
shifts by half a window, with a learned bias for each relative position; between stages 2 x 2 neighbours become one
token. With three axes windows have three sides, and 2 x 2 x 2 neighbours are merged (Tang et al., "Swin UNETR", CVPR
2022, arXiv 2111.14791). Grids that windows or pairs do not fill are padded with zeros, to which nothing attends.
Shapes: B samples, C channels, grid of as many axes as samples have, D width, W windows, T tokens of one, h heads.
"""

import math
from collections.abc import Sequence
from itertools import product

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.placed_vit import GridPatches
from lightspan.core.errors import UserError
from lightspan.nn.init import CONVOLUTIONS
from lightspan.nn.sequences.attention import biased_attention
from lightspan.nn.sequences.patches import patchify, unpatchify
from lightspan.nn.sequences.positions import sincos

# A recipe may name the class listed here.
__all__ = ["GridSwin"]


class WindowAttention(nn.Module):
    """Attention among the tokens of a window, [B grid... D] -> the same.

    Args:
        width, heads: width a multiple of heads.
        window: sides.
        shifted: whether windows lie half a window further on, but for axes that one window covers.
        dropout: of attention and of what it gives, in [0, 1).
    """

    parameter_kinds = {"relative": "vectors"}  # noqa: RUF012 - read by lightspan.optim.groups

    def __init__(self, width: int, heads: int, window: Sequence[int], shifted: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.window, self.shifted, self.dropout = heads, tuple(window), shifted, dropout
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.relative = nn.Parameter(torch.empty(math.prod(2 * side - 1 for side in window), heads))
        nn.init.trunc_normal_(self.relative, std=0.02)

    def forward(self, x_BD: Tensor) -> Tensor:
        grid, axes = x_BD.shape[1:-1], [*range(1, x_BD.ndim - 1)]
        # A window that is wider than the grid is cut to it.
        window = [min(side, length) for side, length in zip(self.window, grid, strict=True)]
        shift = [side // 2 if self.shifted and side < n else 0 for side, n in zip(window, grid, strict=True)]
        room = [-length % side for side, length in zip(window, grid, strict=True)]
        padded = [length + more for length, more in zip(grid, room, strict=True)]
        x_BD = F.pad(x_BD, [0, 0, *(n for more in reversed(room) for n in (0, more))])
        x_BD = x_BD.roll([-each for each in shift], axes)
        x_BWTD = patchify(x_BD.movedim(-1, 1), window).unflatten(2, (math.prod(window), x_BD.shape[-1]))
        q, k, v = self.qkv(x_BWTD).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)  # [B W h T d] each
        mask_WhTT = self._bias(window).to(q.dtype)[None]
        if (apart_WTT := _apart(grid, padded, window, shift, q.device)) is not None:
            mask_WhTT = mask_WhTT.masked_fill(apart_WTT[:, None], -math.inf)
        dropout = self.dropout if self.training else 0.0
        out_BWhTd = biased_attention(q, k, v, mask_WhTT, dropout)
        out = F.dropout(self.proj(out_BWhTd.transpose(2, 3).flatten(3)).flatten(2), self.dropout, self.training)
        grids = [length // side for side, length in zip(window, padded, strict=True)]
        x_BD = unpatchify(out, window, grids).movedim(1, -1).roll(shift, axes)
        return x_BD[(slice(None), *(slice(length) for length in grid))]

    def _bias(self, window: Sequence[int]) -> Tensor:
        """[h T T], from the table of all relative positions in a whole window."""
        sides = [torch.arange(side, device=self.relative.device) for side in window]
        at_TA = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, -2)
        apart_TTA = at_TA[:, None] - at_TA[None]
        number_TT = torch.zeros_like(apart_TTA[..., 0])
        for axis, side in enumerate(self.window):
            number_TT = number_TT * (2 * side - 1) + apart_TTA[..., axis] + side - 1
        return self.relative[number_TT.flatten()].view(*number_TT.shape, -1).permute(2, 0, 1)


def _apart(
    grid: Sequence[int], padded: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device
) -> Tensor | None:
    """Which tokens of a window must not meet, bool [W T T]: those that shifting brought together from opposite edges,
    and padding with others. None if all may.
    """
    if not any(shift) and [*grid] == [*padded]:
        return None
    part = torch.zeros(padded, dtype=torch.long, device=device)
    for axis, (length, real, side, moved) in enumerate(zip(padded, grid, window, shift, strict=True)):
        at = torch.arange(length, device=device)
        edge = (at >= length - side).long() + (at >= length - moved).long() if moved else torch.zeros_like(at)
        # Padding attends to padding, so that no token is without anything to attend to.
        number = edge * 2 + ((at + moved) % length >= real).long()
        part = part * 6 + number.view([-1 if other == axis else 1 for other in range(len(padded))])
    part_WT = patchify(part[None, None], window)[0]
    return part_WT[:, :, None] != part_WT[:, None]


class SwinBlock(nn.Module):
    """Window attention and an MLP, each after a norm and beside the identity: [B grid... D] -> the same."""

    def __init__(
        self, width: int, heads: int, window: Sequence[int], shifted: bool, drop_path: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window, shifted, dropout)
        self.mlp = nn.Sequential(
            *(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout)),
            *(nn.Linear(4 * width, width), nn.Dropout(dropout)),
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x_BD: Tensor) -> Tensor:
        x_BD = x_BD + self.drop_path(self.attn(self.norm1(x_BD)))
        return x_BD + self.drop_path(self.mlp(self.norm2(x_BD)))


class PatchMerging(nn.Module):
    """Pairs along each axis become one token of twice the width: [B grid... D] -> [B grid/2... 2D]. Odd sides are
    padded.
    """

    def __init__(self, width: int, axes: int) -> None:
        super().__init__()
        self.axes = axes
        self.norm = nn.LayerNorm(2**axes * width)
        self.reduction = nn.Linear(2**axes * width, 2 * width, bias=False)

    def forward(self, x_BD: Tensor) -> Tensor:
        grid = x_BD.shape[1:-1]
        x_BD = F.pad(x_BD, [0, 0, *(n for side in reversed(grid) for n in (0, side % 2))])
        parts = [
            x_BD[(slice(None), *(slice(first, None, 2) for first in reversed(firsts)))]
            for firsts in product((0, 1), repeat=self.axes)  # the first axis fastest, as published
        ]
        return self.reduction(self.norm(torch.cat(parts, dim=-1)))


class GridSwin(nn.Module):
    """[B C sides...] -> [B num_features], the mean over the coarsest map. `maps` gives those of all stages.

    Args:
        patch: sides of a patch, one for each of 1 to 3 axes.
        window: sides of a window in patches, one for each axis.
        in_chans: C.
        width: of the first stage; each further one is twice as wide.
        depths, heads: blocks and heads of each stage; heads divide its width.
        drop_path: share of residual branches that training drops in the last block, rising from 0 in the first.
        positions: whether fixed sines and cosines of places are added to patches, as in NeRF-MAE (arXiv 2404.01300);
            width is then a multiple of 2 for each axis.
    Raises: UserError for settings that do not fit.
    """

    num_prefix_tokens = 0
    output_fmt = "NHWC"  # timm's name for the axes of what a stage gives

    def __init__(
        self,
        patch: Sequence[int] = (2, 2, 2),
        window: Sequence[int] = (7, 7, 7),
        in_chans: int = 1,
        width: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        drop_path: float = 0.0,
        positions: bool = False,
    ) -> None:
        super().__init__()
        axes = len(patch)
        if not 1 <= axes <= len(CONVOLUTIONS) or len(window) != axes or min(*patch, *window, in_chans, width) < 1:
            raise UserError(
                f"GridSwin: patch={[*patch]} and window={[*window]} must have a side for each of 1 to "
                f"{len(CONVOLUTIONS)} axes, and these, in_chans={in_chans} and width={width} be at least 1"
            )
        self.widths = [width * 2**stage for stage in range(len(depths))]
        wrong = [own for own, count in zip(self.widths, heads, strict=False) if count < 1 or own % count]
        if not depths or len(heads) != len(depths) or min(depths) < 1 or wrong or not 0 <= drop_path < 1:
            raise UserError(
                f"GridSwin: depths={[*depths]} and heads={[*heads]} must have as many stages, with at least one block, "
                f"heads divide the widths {self.widths}, and drop_path={drop_path} lie in [0, 1)"
            )
        self.in_chans, self.patch, self.num_features = in_chans, tuple(patch), self.widths[-1]
        self.positions = positions
        if positions:
            sincos([1] * axes, width)  # which refuses widths that do not fit
        self.patch_embed, self.embed_norm = GridPatches(in_chans, width, self.patch), nn.LayerNorm(width)
        self.stages, number, last = nn.ModuleList(), 0, max(sum(depths) - 1, 1)
        for stage, (own, depth, count) in enumerate(zip(self.widths, depths, heads, strict=True)):
            layers: list[nn.Module] = [PatchMerging(own // 2, axes)] if stage else []
            for block in range(depth):
                layers.append(SwinBlock(own, count, window, block % 2 == 1, drop_path * number / last))
                number += 1
            self.stages.append(nn.Sequential(*layers))
        self.norm = nn.LayerNorm(self.num_features)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The stages: one layer of features each, see `lightspan.nn.tokens`."""
        return list(self.stages)

    def patches(self, x_BC: Tensor) -> Tensor:
        """What the first stage gets, [B grid... D]. Samples that patches do not fill are padded with zeros.

        Raises: UserError for samples of another number of axes or channels.
        """
        if x_BC.ndim != 2 + len(self.patch) or x_BC.shape[1] != self.in_chans:
            raise UserError(
                f"a batch of {[*x_BC.shape]} does not fit GridSwin for in_chans={self.in_chans}: it takes [B, "
                f"{self.in_chans}] and {len(self.patch)} more axes; let the data give these, or make the network for "
                "them"
            )
        room = [-side % p for side, p in zip(x_BC.shape[2:], self.patch, strict=True)]
        x_BD = self.embed_norm(self.patch_embed(F.pad(x_BC, [n for more in reversed(room) for n in (0, more)])))
        if not self.positions:
            return x_BD
        grid = x_BD.shape[1:-1]
        return x_BD + sincos(grid, x_BD.shape[-1], device=x_BD.device).to(x_BD.dtype).view(*grid, -1)

    def stage_maps(self, x_BD: Tensor) -> list[Tensor]:
        """`maps` of what `patches` gives."""
        found = []
        for stage in self.stages:
            x_BD = stage(x_BD)
            found.append(x_BD)
        found[-1] = self.norm(found[-1])
        return [each.movedim(-1, 1) for each in found]

    def maps(self, x_BC: Tensor) -> list[Tensor]:
        """Of each stage, from the finest on, the last one after a norm: [B D grid...].

        Raises: UserError as `patches`.
        """
        return self.stage_maps(self.patches(x_BC))

    def forward(self, x_BC: Tensor) -> Tensor:
        return self.maps(x_BC)[-1].flatten(2).mean(dim=2)
