"""Maps of pixels as patches on a grid.

Shapes: N images, h w pixels, P patches of a grid H W, row by row, d pixels of a patch.
"""

import torch
from torch import Tensor

from lightspan.core.errors import UserError


def fitted(maps_Nhw: Tensor, grid: tuple[int, int]) -> Tensor:
    """The same maps with sides that the grid divides: enlarged to its next multiple by nearest pixels, if they are not.

    Raises: UserError for maps without a pixel.
    """
    for axis, count in zip((1, 2), grid, strict=True):
        side = maps_Nhw.shape[axis]
        if not side:
            raise UserError(f"maps of {list(maps_Nhw.shape[1:])} have no pixel; give each image a map of its own size")
        if longer := -side % count:
            nearest = (torch.arange(side + longer, device=maps_Nhw.device) + 0.5) * (side / (side + longer))
            maps_Nhw = maps_Nhw.index_select(axis, nearest.long().clamp_max(side - 1))
    return maps_Nhw


def pixels_of_patches(maps_Nhw: Tensor, grid: tuple[int, int]) -> Tensor:
    """The pixels of each patch, [N P d]. Raises: UserError for patches that do not fill the maps."""
    height, width = maps_Nhw.shape[1:]
    if height % grid[0] or width % grid[1]:
        raise UserError(f"a grid of {grid[0]} x {grid[1]} patches does not fill {height} x {width} pixels")
    rows = maps_Nhw.unflatten(1, (grid[0], height // grid[0])).unflatten(3, (grid[1], width // grid[1]))
    return rows.transpose(2, 3).flatten(3).flatten(1, 2)


def majority_of_patches(maps_Nhw: Tensor, grid: tuple[int, int], otherwise: int) -> Tensor:
    """The number that more than half of each patch's pixels have, [N P]; `otherwise` where none has so many.

    Raises: UserError for patches that do not fill the maps.
    """
    pixels_NPd = pixels_of_patches(maps_Nhw, grid)
    middle_NP = pixels_NPd.median(dim=2).values  # of more than half of the pixels, whatever else there is
    most = (pixels_NPd == middle_NP.unsqueeze(2)).sum(dim=2) * 2 > pixels_NPd.shape[2]
    return torch.where(most, middle_NP, otherwise)
