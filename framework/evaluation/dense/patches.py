"""Maps of pixels as patches on a grid, and maps of patches as pixels.

Shapes: N samples, h w pixels, P patches of a grid H W, row by row, d pixels of a patch, C channels. Letters are those
of images: h w and H W stand for as many axes as samples have.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightspan.core.errors import UserError
from lightspan.nn.sequences.patches import patchify

LINEAR = "linear", "bilinear", "trilinear"
"""torch's names of the same interpolation, by the number of axes, less one."""


def fitted(maps_Nhw: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The same maps with sides that the grid divides: enlarged to its next multiple by nearest pixels, if they are not.

    Raises: UserError for maps without a pixel.
    """
    for axis, count in enumerate(grid, start=1):
        side = maps_Nhw.shape[axis]
        if not side:
            raise UserError(f"maps of {list(maps_Nhw.shape[1:])} have no pixel; give each image a map of its own size")
        if longer := -side % count:
            nearest = (torch.arange(side + longer, device=maps_Nhw.device) + 0.5) * (side / (side + longer))
            maps_Nhw = maps_Nhw.index_select(axis, nearest.long().clamp_max(side - 1))
    return maps_Nhw


def pixels_of_patches(maps_Nhw: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The pixels of each patch, [N P d]. Raises: UserError for patches that do not fill the maps."""
    sides = maps_Nhw.shape[1:]
    if len(sides) != len(grid) or any(side % count for side, count in zip(sides, grid, strict=True)):
        raise UserError(
            f"a grid of {' x '.join(map(str, grid))} patches does not fill {' x '.join(map(str, sides))} pixels"
        )
    return patchify(maps_Nhw[:, None], [side // count for side, count in zip(sides, grid, strict=True)])


def at_pixels(maps_NCHW: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Maps of patches enlarged to maps of these sides, linear along each axis: [N C h w].

    Raises: UserError for more than three axes.
    """
    if len(sides) > len(LINEAR):
        raise UserError(f"maps of {len(sides)} axes cannot be enlarged, as torch interpolates up to {len(LINEAR)}")
    return interpolate(maps_NCHW, sides, mode=LINEAR[len(sides) - 1], align_corners=False)


def majority_of_patches(maps_Nhw: Tensor, grid: tuple[int, ...], otherwise: int) -> Tensor:
    """The number that more than half of each patch's pixels have, [N P]; `otherwise` where none has so many.

    Raises: UserError for patches that do not fill the maps.
    """
    pixels_NPd = pixels_of_patches(maps_Nhw, grid)
    middle_NP = pixels_NPd.median(dim=2).values  # of more than half of the pixels, whatever else there is
    most = (pixels_NPd == middle_NP.unsqueeze(2)).sum(dim=2) * 2 > pixels_NPd.shape[2]
    return torch.where(most, middle_NP, otherwise)
