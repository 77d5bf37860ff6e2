"""Maps of samples that are too large for a network at once, from windows that overlap.

Source: Isensee et al., "nnU-Net", Nature Methods 2021, arXiv 1809.10486: neighbours overlap by half, and what a window
says of its voxels weighs less towards its border, by a Gaussian.
Shapes: B samples, C channels, F maps, sides of as many axes as samples have.
"""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in


def window_starts(side: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along an axis: evenly spaced, from the first voxel to the last, at most (1 - overlap) of a
    window apart.
    """
    free = max(side - window, 0)
    count = -(-free // max(1, int(window * (1 - overlap))))
    return [round(number * free / max(count, 1)) for number in range(count + 1)]


def gaussian_window(window: Sequence[int], sigma: float = 0.125) -> Tensor:
    """Weights of a window's voxels, float32 [window...], above 0 and 1 in the middle.

    Args:
        sigma: standard deviation along each axis, as a share of the side.
    """
    weights = torch.ones(())
    for side in window:
        at = torch.arange(side) - (side - 1) / 2
        weights = weights[..., None] * (-0.5 * (at / (sigma * side)) ** 2).exp()
    # The farthest corner of a window may be all that sees a voxel, and would vanish in half precision.
    return (weights / weights.max()).clamp_min(1e-3)


@torch.no_grad()
def sliding_window(
    network: Callable[[Tensor], Tensor],
    x_BC: Tensor,
    window: Sequence[int],
    overlap: float = 0.5,
    batch: int = 4,
    sigma: float = 0.125,
) -> Tensor:
    """Maps of whole samples, [B C sides...] -> [B F sides...]: the weighted mean over all windows that see a voxel.

    A network that says of each voxel something that depends on it alone gives the same as at once. Sides that are
    shorter than the window are padded with zeros for the network.

    Args:
        network: [b C window...] -> [b F window...].
        window: sides, one for each axis.
        overlap: share of a window that its neighbour sees too, in [0, 1).
        batch: windows at once, >= 1.
        sigma: see `gaussian_window`, above 0.
    Raises: UserError for settings outside of these, another number of axes, and maps of another size.
    """
    require_in("[0, 1)", overlap=overlap)
    require_in("(0, inf)", sigma=sigma)
    require_in("[1, inf)", batch=batch)
    sides = x_BC.shape[2:]
    if len(window) != len(sides) or min(window) < 1:
        raise UserError(f"window={[*window]} must have a side of at least 1 for each axis of samples of {[*sides]}")
    room = [max(own - side, 0) for own, side in zip(window, sides, strict=True)]
    if any(room):
        x_BC = torch.nn.functional.pad(x_BC, [n for more in reversed(room) for n in (0, more)])
    starts = [window_starts(side, own, overlap) for side, own in zip(x_BC.shape[2:], window, strict=True)]
    places = [
        (row, tuple(slice(first, first + own) for first, own in zip(corner, window, strict=True)))
        for row in range(len(x_BC))
        for corner in product(*starts)
    ]
    weights, total, seen = gaussian_window(window, sigma).to(x_BC.device), None, None
    for at in range(0, len(places), batch):
        some = places[at : at + batch]
        maps_bF = network(torch.stack([x_BC[row][(slice(None), *box)] for row, box in some]))
        if maps_bF.shape[2:] != tuple(window):
            raise UserError(f"the network gives maps of {[*maps_bF.shape[2:]]} for windows of {[*window]}")
        if total is None or seen is None:
            shape = len(x_BC), maps_bF.shape[1], *x_BC.shape[2:]
            total, seen = x_BC.new_zeros(shape, dtype=torch.float32), x_BC.new_zeros((len(x_BC), 1, *shape[2:]))
            seen = seen.float()
        for (row, box), maps_F in zip(some, maps_bF.float(), strict=True):
            total[row][(slice(None), *box)] += weights * maps_F
            seen[row][(slice(None), *box)] += weights
    assert total is not None
    assert seen is not None
    return (total / seen)[(slice(None), slice(None), *(slice(side) for side in sides))]
