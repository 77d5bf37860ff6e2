"""U-Nets of gated scans, VM-UNet and MHS-VM: maps [B F sides...] of pictures and volumes.

Source: Ruan, Xiang, "VM-UNet: Vision Mamba UNet for Medical Image Segmentation", 2024, arXiv 2402.02491, section 3; Ji,
"MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba", 2024, arXiv 2406.05992, which puts its scan into
that network, and its author's code, PixDeep/MHS-VM. Patches become tokens, which go through stages of pre-norm
residual blocks with Swin's patch merging between them (2103.14030), and through as many stages back. What leaves one of
these, and the tokens that entered the stage of its size on the way down, are added and expanded for the next; a linear
map turns each last token into the pixels of its patch.
Shapes: B samples, C channels, sides and grid of as many axes as samples have, D width of a stage, F width of the maps.
"""

import math
from collections.abc import Sequence
from operator import mod
from typing import Any

from torch import Tensor, nn

from lightspan.backbones.grid_swin import PatchMerging
from lightspan.backbones.placed_vit import GridPatches
from lightspan.core.errors import UserError
from lightspan.nn.sequences.multi_head_scan import GatedScan, RoutePlaces, route_places, scanned_patterns
from lightspan.nn.sequences.patches import unpatchify
from lightspan.nn.sequences.scan_routes import PATTERNS, Pattern
from lightspan.nn.stochastic_depth import drop_paths

# A recipe may name the class listed here.
__all__ = ["ScannedUNet"]


class ScanBlock(nn.Module):
    """x + GatedScan(LN(x)): [B grid... D] -> the same."""

    def __init__(self, scan: GatedScan, width: int, drop_path: nn.Module) -> None:
        super().__init__()
        self.norm, self.scan, self.drop_path = nn.LayerNorm(width), scan, drop_path

    def forward(self, x_BD: Tensor, places: RoutePlaces) -> Tensor:
        return x_BD + self.drop_path(self.scan(self.norm(x_BD), places))


class PatchExpanding(nn.Module):
    """Each token becomes a block of them by a linear map, then a norm: [B grid... D] -> [B sides... given].

    Args:
        sides: of the block.
    """

    def __init__(self, width: int, given: int, sides: Sequence[int]) -> None:
        super().__init__()
        self.sides = tuple(sides)
        self.expand = nn.Linear(width, math.prod(sides) * given, bias=False)
        self.norm = nn.LayerNorm(given)

    def forward(self, x_BD: Tensor) -> Tensor:
        cells = self.expand(x_BD).flatten(1, -2)
        return self.norm(unpatchify(cells, self.sides, x_BD.shape[1:-1]).movedim(1, -1))


class ScannedUNet(nn.Module):
    """[B C sides...] -> maps [B F sides...], F = width / the longest side of a patch. MHS-VM as it stands.

    Blocks of one grid share the routes over it. Samples must have sides of patch times 2^(stages - 1), or multiples.

    Args:
        patch: sides of a patch, one for each of 2 or 3 axes.
        in_chans: C.
        width: D of the first stage, a multiple of the longest side of a patch; each further one is twice as wide.
        depths: blocks of each stage down.
        depths_up: blocks of each stage back, from the coarsest on; None is as down.
        patterns, states, threshold: of each block's scan, see `lightspan.nn.sequences.multi_head_scan.GatedScan`.
            patterns=null is VM-UNet.
        drop_path: share of residual branches that training drops in the coarsest stage, rising from 0 on the way down
            and falling to 0 on the way back.
    Raises: UserError for settings that do not fit.
    """

    num_prefix_tokens = 0
    output_fmt = "NHWC"  # timm's name for the axes of what a stage gives

    def __init__(
        self,
        patch: Sequence[int] = (4, 4),
        in_chans: int = 3,
        width: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        depths_up: Sequence[int] | None = (2, 2, 2, 1),
        patterns: Sequence[Pattern] | None = PATTERNS,
        states: int = 16,
        threshold: float | None = 0.5,
        drop_path: float = 0.2,
    ) -> None:
        super().__init__()
        back = [*reversed(depths)] if depths_up is None else [*depths_up]
        axes = len(patch)
        if axes not in (2, 3) or min(*patch, in_chans, width) < 1 or width % max(patch):
            raise UserError(
                f"ScannedUNet: patch={[*patch]} must have a side for each of 2 or 3 axes, these and in_chans="
                f"{in_chans} be at least 1, and width={width} a multiple of the longest side of a patch"
            )
        if not depths or len(back) != len(depths) or min(*depths, *back) < 1:
            raise UserError(
                f"ScannedUNet: depths={[*depths]} and depths_up={depths_up} must have as many stages, each with at "
                "least one block"
            )
        self.in_chans, self.patch, self.axes = in_chans, tuple(patch), axes
        self.widths = [width * 2**stage for stage in range(len(depths))]
        self.num_features = width // max(patch)

        def stages(numbers: Sequence[int], widths: Sequence[int], paths: Sequence[nn.Module]) -> Any:
            left = iter(paths)
            return nn.ModuleList(
                nn.ModuleList(
                    ScanBlock(GatedScan(own, patterns, axes, states, threshold), own, next(left)) for _ in range(count)
                )
                for count, own in zip(numbers, widths, strict=True)
            )

        self.patterns = scanned_patterns(patterns)
        self.patch_embed, self.embed_norm = GridPatches(in_chans, width, self.patch), nn.LayerNorm(width)
        self.down: Any = stages(depths, self.widths, drop_paths(drop_path, sum(depths), "ScannedUNet"))
        self.merge = nn.ModuleList(PatchMerging(own, axes) for own in self.widths[:-1])
        self.up: Any = stages(back, self.widths[::-1], drop_paths(drop_path, sum(back), "ScannedUNet")[::-1])
        self.expand = nn.ModuleList(PatchExpanding(2 * own, own, [2] * axes) for own in reversed(self.widths[:-1]))
        self.last = PatchExpanding(width, self.num_features, self.patch)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The last block of each stage on the way down: one layer of features each, see `lightspan.nn.tokens`."""
        return [stage[-1] for stage in self.down]

    def _ways(self, x_BC: Tensor) -> tuple[list[Tensor], list[Tensor], list[RoutePlaces]]:
        """(what enters each stage on the way down, what leaves it, the routes over its grid), from the finest on.

        Raises: UserError for samples of another shape.
        """
        least = [side * 2 ** (len(self.widths) - 1) for side in self.patch]
        sides = x_BC.shape[2:]
        if len(sides) != self.axes or x_BC.shape[1] != self.in_chans or not all(sides) or any(map(mod, sides, least)):
            raise UserError(
                f"ScannedUNet of {len(self.down)} stages and patch={[*self.patch]} takes samples of in_chans="
                f"{self.in_chans} and {self.axes} sides that are multiples of {least}, and these are "
                f"{[*x_BC.shape[1:]]}; change data.init_args, or make the network for them"
            )
        entered, left, places = [], [], []
        x_BD = self.embed_norm(self.patch_embed(x_BC))
        for number, stage in enumerate(self.down):
            x_BD = self.merge[number - 1](x_BD) if number else x_BD
            entered.append(x_BD)
            places.append(route_places(self.patterns, x_BD.shape[1:-1], x_BD.device))
            for block in stage:
                x_BD = block(x_BD, places[-1])
            left.append(x_BD)
        return entered, left, places

    def maps(self, x_BC: Tensor) -> list[Tensor]:
        """Of each stage of the way down, from the finest on: [B D grid...]. Raises: UserError as `forward`."""
        return [each.movedim(-1, 1) for each in self._ways(x_BC)[1]]

    def forward(self, x_BC: Tensor) -> Tensor:
        """Raises: UserError for samples of other channels, axes or sides than fit."""
        entered, (*_, x_BD), places = self._ways(x_BC)
        for number, (stage, own) in enumerate(zip(self.up, reversed(places), strict=True)):
            x_BD = self.expand[number - 1](x_BD + entered[-number]) if number else x_BD
            for block in stage:
                x_BD = block(x_BD, own)
        return self.last(x_BD).movedim(-1, 1)
