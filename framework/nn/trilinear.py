"""Values between the middles of voxels, with as many derivatives as one likes.

`torch.nn.functional.grid_sample` has no second derivative, which a loss on the slope of a field needs (PonderV2, arXiv
2310.08586, section 3.2, which has an operation of its own for it).
Shapes: B grids, C channels, D H W voxels along z, y and x, N places.
"""

import torch
from torch import Tensor


def trilinear(grid_BC: Tensor, at_BN3: Tensor) -> Tensor:
    """Of grids [B C D H W], linearly between the middles of voxels, [B N C]: `grid_sample` with align_corners=False
    and padding_mode="border".

    Args:
        at_BN3: x, y and z, from 0 at the first side of the grid to 1 at the last; beyond its outer middles a grid is
            constant.
    """
    B, C, D, H, W = grid_BC.shape
    rows_VC = grid_BC.movedim(1, -1).reshape(-1, C)
    sides_3 = torch.tensor([W, H, D], device=at_BN3.device)
    place_BN3 = (at_BN3 * sides_3 - 0.5).clamp_min(0).minimum((sides_3 - 1).to(at_BN3.dtype))
    low_BN3 = place_BN3.detach().floor().long().minimum((sides_3 - 2).clamp_min(0))
    share_BN3 = place_BN3 - low_BN3
    first_BN = torch.arange(B, device=at_BN3.device)[:, None] * (D * H * W)
    found = None
    for corner in range(8):
        step_3 = torch.tensor([corner & 1, corner >> 1 & 1, corner >> 2], device=at_BN3.device)
        x_BN, y_BN, z_BN = (low_BN3 + step_3).minimum(sides_3 - 1).unbind(-1)
        part_BNC = rows_VC[first_BN + (z_BN * H + y_BN) * W + x_BN]
        weight_BN = torch.where(step_3 == 1, share_BN3, 1 - share_BN3).prod(dim=-1)
        part_BNC = weight_BN[..., None] * part_BNC
        found = part_BNC if found is None else found + part_BNC
    assert found is not None
    return found
