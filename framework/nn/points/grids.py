"""Features of points as dense grids.

Shapes: M points of all clouds, C channels, B clouds, D H W cells along z, y and x.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightspan.core.devices import wide


def pooled_grid(x_MC: Tensor, at_M3: Tensor, cloud_M: Tensor, clouds: int, sides: Sequence[int]) -> Tensor:
    """The mean over the points in each cell, [B C D H W] in the type of x; 0 of a cell without any. Sums are made in
    float32 or wider: bfloat16 counts to 256 alone.

    Args:
        at_M3: x, y and z in a cloud's box, from 0 to 1; a point beyond belongs to the nearest cell.
        cloud_M: to which cloud a point belongs, int64. clouds: B.
        sides: D, H and W.
    """
    depth, height, width = sides
    sides_3 = torch.tensor([width, height, depth], device=at_M3.device)
    x_M, y_M, z_M = (at_M3 * sides_3).long().clamp_min(0).minimum(sides_3 - 1).unbind(1)
    cell_M = ((cloud_M * depth + z_M) * height + y_M) * width + x_M
    cells = clouds * math.prod(sides)
    given_MC = wide(x_MC)
    sums_VC = given_MC.new_zeros(cells, x_MC.shape[1]).index_add(0, cell_M, given_MC)
    count_V = given_MC.new_zeros(cells).index_add(0, cell_M, torch.ones_like(given_MC[:, 0]))
    means_VC = (sums_VC / count_V.clamp_min(1)[:, None]).to(x_MC.dtype)
    return means_VC.unflatten(0, (clouds, depth, height, width)).movedim(-1, 1)
