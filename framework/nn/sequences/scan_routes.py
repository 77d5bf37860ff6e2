"""Routes through the cells of a grid: orders in which a network for sequences reads pictures and volumes.

Source: figure 2 of MHS-VM (Ji, 2024, arXiv 2406.05992), whose names are C, X, S and Z. With three axes, which the paper
does not have, a route goes through the slices along one axis, in each one as through a picture, and back through every
second one, so that what is next to a cell on a route stays next to it on the grid.
Shapes: L cells, R routes.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lightspan.core.errors import UserError

Pattern = Literal["snake", "diagonal", "spiral", "raster"]
"""`snake` (C): line by line, every second one backwards. `diagonal` (X): along diagonals, every second one backwards;
the next cell is a diagonal neighbour or one on the border. `spiral` (S): clockwise from the corner inwards. `raster`
(Z): line by line, each from its start.
"""
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)


def routes(pattern: Pattern, grid: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """The cells in the order of each route, counted over the grid row by row: int64 [R L].

    Of pictures there are two, by rows and by columns, or of diagonals and spirals the pattern and its mirror image
    (left to right, and upside down); of volumes three, by the axis along which a route changes slices.

    Raises: UserError for another pattern, or a grid of other than two or three axes.
    """
    if pattern not in PATTERNS or len(grid) not in (2, 3):
        raise UserError(
            f"a scan of pattern {pattern!r} over a grid of {[*grid]}: patterns are {', '.join(PATTERNS)}, and a grid "
            "has 2 axes, or 3 of volumes"
        )
    cells = torch.arange(math.prod(grid), device=device).view(grid)
    if len(grid) == 3:
        turned = [cells.permute(*range(first, 3), *range(first)) for first in range(3)]
    elif pattern in ("snake", "raster"):
        turned = [cells, cells.T]
    else:
        turned = [cells, cells.flip(1 if pattern == "diagonal" else 0)]
    return torch.stack([_route(pattern, each) for each in turned])


def _route(pattern: Pattern, cells: Tensor) -> Tensor:
    """The cells [sides...] in their order, [L]."""
    if pattern == "raster":
        return cells.flatten()
    if cells.ndim == 3:
        places = torch.arange(cells[0].numel(), device=cells.device).view(cells.shape[1:])
        cells = cells.flatten(1)[:, _route(pattern, places)]
    elif pattern != "snake":
        return cells.flatten()[_keys(pattern, cells).flatten().argsort()]
    lines = torch.arange(len(cells), device=cells.device)[:, None]
    return torch.where(lines % 2 == 1, cells.flip(1), cells).flatten()


def _keys(pattern: Pattern, cells: Tensor) -> Tensor:
    """Numbers that ascend along the route through the cells [H W] of a picture."""
    height, width = cells.shape
    row_H1 = torch.arange(height, device=cells.device)[:, None]
    column_W = torch.arange(width, device=cells.device)
    room = 4 * (height + width)  # more than a diagonal or a ring has cells
    if pattern == "diagonal":
        diagonal_HW = row_H1 + column_W
        return room * diagonal_HW + torch.where(diagonal_HW % 2 == 1, row_H1, height - row_H1)
    below_H1, right_W = height - 1 - row_H1, width - 1 - column_W
    ring_HW = torch.minimum(torch.minimum(row_H1, below_H1), torch.minimum(column_W, right_W))
    wide_HW, high_HW = width - 1 - 2 * ring_HW, height - 1 - 2 * ring_HW  # steps along its sides
    on_the_left = 2 * wide_HW + high_HW + below_H1 - ring_HW
    at_the_foot = torch.where(below_H1 == ring_HW, wide_HW + high_HW + right_W - ring_HW, on_the_left)
    on_the_right = torch.where(right_W == ring_HW, wide_HW + row_H1 - ring_HW, at_the_foot)
    return room * ring_HW + torch.where(row_H1 == ring_HW, column_W - ring_HW, on_the_right)
