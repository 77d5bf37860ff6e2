"""Scans along several routes at once, in subspaces of the channels: the mixing of tokens of vision Mambas.

Source: Ji, "MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba", 2024, arXiv 2406.05992, and the
author's code, PixDeep/MHS-VM. A head is a subspace of the channels with routes of one pattern, each also taken
backwards, along which selective scans with weights of their own (`lightspan.nn.sequences.selective_scan`) give y_i, i =
1 ... k. What the k routes say of a cell is summed, and weighted by how much they differ (scan route attention):

    z = (sum_i y_i) ReLU(c - t),    c = std_i(y_i) / (mean_i(y_i - min_j y_j) + 1e-5)

The deviation is the unbiased one, as in the code: of k = 4 routes c is 0 where all agree, and else in [2/3, 2], so that
the code's thresholds t, 0 and 0.5, lower all features and leave out none; that takes t above 2/3. (The code tests at
t = 0.4 what it trained at 0.5; here t is one.) SS2D of VMamba (arXiv 2401.10166) has one subspace, the raster's, and
sums.
Shapes: B samples, grid of as many axes as samples have, L cells, D channels, h heads, d channels of a head, k routes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.init import CONVOLUTIONS
from lightspan.nn.sequences.scan_routes import PATTERNS, Pattern, routes
from lightspan.nn.sequences.selective_scan import SelectiveScan

EPSILON = 1e-5


class RoutePlaces(NamedTuple):
    """Of all heads' routes over one grid. there: the cell at each step, counted over heads and cells, int64 [h k L];
    back: the step at each cell, counted over heads, routes and steps.
    """

    there: Tensor
    back: Tensor


def scanned_patterns(patterns: Sequence[Pattern] | None) -> tuple[Pattern, ...]:
    """Those of the heads of a `GatedScan`."""
    return ("raster",) if patterns is None else tuple(patterns)


def route_places(patterns: Sequence[Pattern], grid: tuple[int, ...], device: torch.device) -> RoutePlaces:
    """Of the routes of these patterns and, behind each head's, the same backwards."""
    forth_hRL = torch.stack([routes(pattern, grid, device) for pattern in patterns])
    order_hkL = torch.cat([forth_hRL, forth_hRL.flip(2)], dim=1)
    heads, count, length = order_hkL.shape
    head_h11 = torch.arange(heads, device=device)[:, None, None]
    route_hk1 = torch.arange(heads * count, device=device).view(heads, count, 1)
    return RoutePlaces((head_h11 * length + order_hkL).flatten(), (route_hk1 * length + order_hkL.argsort(2)).flatten())


def route_attention(y_BhkLd: Tensor, threshold: float) -> Tensor:
    """z of k > 1 routes, [B h L d]: unchanged by another order of the routes. It is 0, with gradient 0, where all
    routes agree.

    Args:
        threshold: t.
    """
    above = y_BhkLd - y_BhkLd.amin(dim=2, keepdim=True)
    # Not `std`, which warns of a rank without samples. The gradient of a norm of 0 is 0.
    spread = torch.linalg.vector_norm(y_BhkLd - y_BhkLd.mean(dim=2, keepdim=True), dim=2)
    variation_BhLd = spread / math.sqrt(y_BhkLd.shape[2] - 1) / (above.mean(dim=2) + EPSILON)
    return y_BhkLd.sum(dim=2) * F.relu(variation_BhLd - threshold)


class RouteScans(nn.Module):
    """Selective scans in a subspace for each pattern, the channels shared evenly: [B L D] -> [B L D], D a multiple of
    h. In float32 or wider.

    Args:
        width: D.
        patterns: of the h heads.
        axes: of the grid; there are k = 2 axes routes for each head.
        states: of each channel, see `SelectiveScan`.
        threshold: t of `route_attention`; None takes the sum alone.
    """

    def __init__(
        self, width: int, patterns: Sequence[Pattern], axes: int, states: int, threshold: float | None
    ) -> None:
        super().__init__()
        self.heads, self.count, self.threshold = len(patterns), 2 * axes, threshold
        self.scan = SelectiveScan(width // self.heads, self.heads * self.count, states)

    def forward(self, x_BLD: Tensor, places: RoutePlaces) -> Tensor:
        sizes = self.heads, self.count, x_BLD.shape[1]
        x_BhLd = x_BLD.unflatten(2, (self.heads, -1)).transpose(1, 2)
        along_BKLd = x_BhLd.flatten(1, 2)[:, places.there].unflatten(1, (sizes[0] * sizes[1], sizes[2]))
        y_BhkLd = self.scan(along_BKLd).flatten(1, 2)[:, places.back].unflatten(1, sizes)
        z_BhLd = y_BhkLd.sum(dim=2) if self.threshold is None else route_attention(y_BhkLd, self.threshold)
        return z_BhLd.transpose(1, 2).flatten(2)


class MultiHeadScan(nn.Module):
    """Channels into the subspaces of the heads, scans there, a norm, and back: [B L D] -> [B L D].

    A width that h does not divide loses the rest, D mod h dimensions, on the way, as published.

    Args:
        width: D, at least h.
        patterns, axes, states, threshold: as in `RouteScans`.
    """

    def __init__(
        self, width: int, patterns: Sequence[Pattern], axes: int, states: int, threshold: float | None
    ) -> None:
        super().__init__()
        inner = width // len(patterns) * len(patterns)
        self.inward = nn.Linear(width, inner, bias=False)
        self.scans = RouteScans(inner, patterns, axes, states, threshold)
        self.norm, self.outward = nn.LayerNorm(inner), nn.Linear(inner, width, bias=False)

    def forward(self, x_BLD: Tensor, places: RoutePlaces) -> Tensor:
        return self.outward(self.norm(self.scans(self.inward(x_BLD), places).to(x_BLD.dtype)))


class GatedScan(nn.Module):
    """A depthwise convolution over 3 cells a side, scans and a norm, times a gate: [B grid... D] -> [B grid... D].

    With `patterns` it is MHS-VM's, which does not widen and ends with the gate; without, VMamba's SS2D: one scan of the
    raster in twice the width, and a linear map behind the gate.

    Args:
        width: D, at least the number of patterns.
        patterns: of the heads; None is SS2D.
        axes: 2 or 3.
        states: of each channel of a head.
        threshold: t of `route_attention`, which SS2D has not; None sums.
    Raises: UserError for settings outside of these.
    """

    def __init__(
        self,
        width: int,
        patterns: Sequence[Pattern] | None = PATTERNS,
        axes: int = 2,
        states: int = 16,
        threshold: float | None = 0.5,
    ) -> None:
        super().__init__()
        require_in("[0, inf)", threshold=threshold)
        wrong = [pattern for pattern in patterns or () if pattern not in PATTERNS]
        if wrong or patterns == [] or axes not in (2, 3) or width < len(patterns or [""]):
            raise UserError(
                f"GatedScan: patterns={patterns} must be some of {', '.join(PATTERNS)}, no more of them than width="
                f"{width}, or null, and axes={axes} 2 or 3"
            )
        inner = width if patterns is not None else 2 * width
        heads = scanned_patterns(patterns)
        self.inward = nn.Linear(width, 2 * inner, bias=False)
        self.conv = CONVOLUTIONS[axes - 1](inner, inner, 3, padding=1, groups=inner)
        if patterns is None:
            self.scans: nn.Module = RouteScans(inner, heads, axes, states, None)
        else:
            self.scans = MultiHeadScan(inner, heads, axes, states, threshold)
        self.norm = nn.LayerNorm(inner)
        self.outward = nn.Linear(inner, width, bias=False) if patterns is None else nn.Identity()

    def forward(self, x_BD: Tensor, places: RoutePlaces) -> Tensor:
        """Args:
        places: `route_places(scanned_patterns(patterns), grid, device)`, which layers of one grid share.
        """
        grid = x_BD.shape[1:-1]
        x_BD, gate_BD = self.inward(x_BD).chunk(2, dim=-1)
        x_BLD = F.silu(self.conv(x_BD.movedim(-1, 1))).flatten(2).mT
        y_BLD = self.norm(self.scans(x_BLD, places).to(x_BLD.dtype))
        return self.outward(y_BLD.unflatten(1, grid) * F.silu(gate_BD))
