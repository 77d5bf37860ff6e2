"""A decoder of maps: from the coarsest to the finest, with a learned token where the encoder saw nothing.

Source: Tian et al., SparK, ICLR 2023, arXiv 2301.03580, section 3.2, and the authors' code: each map is normalised over
active positions, filled with its mask token, projected, and added to what was decoded so far, which blocks double in
side and halve in width.
Shapes: B images, C channels of a map, h w its sides, w width.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.masking.sparse_convs import ActiveCells, sides_of


class UNetBlock(nn.Sequential):
    """Twice the sides: a transposed convolution, then two convolutions with BatchNorm and ReLU6 between them."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(in_chans, in_chans, kernel_size=4, stride=2, padding=1),
            nn.Conv2d(in_chans, in_chans, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(in_chans),
            nn.ReLU6(inplace=True),
            nn.Conv2d(in_chans, out_chans, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_chans),
        )


class UNetDecoder(nn.Module):
    """Maps of an encoder at strides that double, the coarsest first -> images [B in_chans cell*H cell*W].

    Args:
        channels: of the maps, the coarsest first, at least one; a ResNet-50 has [2048, 1024, 512, 256].
        in_chans: of the images, which the encoder reads and this one draws.
        width: of the first block, halved in each further one; a multiple of the cell.
        cell: stride of the coarsest map in pixels, a power of 2; there are log2(cell) blocks, at least as many as maps.
        norm: of the maps: "batch", or "layer" for encoders that have LayerNorms, such as ConvNeXt.
    Raises: UserError for sizes that do not fit.
    """

    def __init__(
        self,
        channels: Sequence[int],
        in_chans: int = 3,
        width: int = 768,
        cell: int = 32,
        norm: Literal["batch", "layer"] = "batch",
    ) -> None:
        super().__init__()
        blocks = round(math.log2(max(cell, 1)))
        if 2**blocks != cell or cell < 2 or width < 1 or width % cell or not 1 <= len(channels) <= blocks:
            raise UserError(
                f"UNetDecoder: cell={cell} must be a power of 2 above 1, width={width} a multiple of it, and channels="
                f"{list(channels)} those of 1 to {max(blocks, 1)} maps"
            )
        if min(*channels, in_chans) < 1 or norm not in ("batch", "layer"):
            raise UserError(
                f"UNetDecoder: channels={list(channels)} and in_chans={in_chans} must be above 0, and norm={norm!r} "
                "batch or layer"
            )
        self.channels, self.in_chans, self.cell = [*channels], in_chans, cell
        widths = [width // 2**level for level in range(blocks + 1)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) if norm == "batch" else LayerNorm2d(c) for c in channels)
        self.mask_tokens = nn.ParameterList(torch.randn(1, c, 1, 1) * 0.02 for c in channels)
        # Tokens, for all their axes: they do not decay. Read by lightspan.optim.groups.
        kinds = dict.fromkeys(map(str, range(len(channels))), "embeddings")
        self.mask_tokens.parameter_kinds = kinds  # type: ignore[assignment]
        self.projections = nn.ModuleList(
            nn.Identity()
            if level == 0 and c == width
            else nn.Conv2d(c, widths[level], 3 if level else 1, padding="same")
            for level, c in enumerate(channels)
        )
        self.blocks = nn.ModuleList(UNetBlock(*pair) for pair in pairwise(widths))
        self.head = nn.Conv2d(widths[-1], in_chans, kernel_size=1)
        for layer in self.modules():
            if isinstance(layer, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(layer, nn.Conv2d):
                nn.init.trunc_normal_(layer.weight, std=0.02)
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def filled(self, level: int, x_BChw: Tensor, active: ActiveCells) -> Tensor:
        """A map, normalised over active positions, with its mask token everywhere else."""
        normed_BChw = active.normed(self.norms[level], x_BChw)
        return normed_BChw.where(active.mask(sides_of(x_BChw)), self.mask_tokens[level].to(normed_BChw.dtype))

    def forward(self, maps: Sequence[Tensor], active: ActiveCells) -> Tensor:
        x_Bwhw = self.projections[0](self.filled(0, maps[0], active))
        for level, block in enumerate(self.blocks):
            if 0 < level < len(maps):
                x_Bwhw = x_Bwhw + self.projections[level](self.filled(level, maps[level], active))
            x_Bwhw = block(x_Bwhw)
        return self.head(x_Bwhw)
